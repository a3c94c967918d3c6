"""The user's own arrays: layouts of files, mistakes, and where they stay."""

import os
import pickle
import re

import numpy as np
import pytest

from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import placement
from tests.data import made_sources
from tests.data.made_sources import make

RNG = np.random.default_rng(0)


def images(count, *shape):
  return RNG.integers(0, 256, (count, *(shape or (6, 8, 3))), np.uint8)


def save(path, **arrays):
  """Writes an .npz file, or a folder of .npy files."""
  if path.suffix == ".npz":
    np.savez(path, **arrays)
    return
  path.mkdir()
  for name, array in arrays.items():
    np.save(path / f"{name}.npy", array)


@pytest.mark.parametrize("name", ["file.npz", "folder"])
@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_splits(tmp_path, name, evaluation):
  arrays = {
    "train_images": images(5),
    "train_labels": np.array([[0], [1], [2], [1], [0]], np.uint8),
    "val_images": images(2),
    "val_labels": np.array([[3], [1]], np.uint8),
    "test_images": images(3),
    "test_labels": np.array([0, 1, 0]),
  }
  save(tmp_path / name, **arrays)
  settings = {"path": tmp_path / name, "eval_split": evaluation}
  train, test = (make("arrays", s, **settings) for s in ("train", "eval"))
  np.testing.assert_array_equal(train.images, arrays["train_images"])
  np.testing.assert_array_equal(train.labels, [0, 1, 2, 1, 0])
  part = "test" if evaluation == "test" else "val"
  np.testing.assert_array_equal(test.images, arrays[f"{part}_images"])
  np.testing.assert_array_equal(test.labels, arrays[f"{part}_labels"].ravel())
  assert train.num_classes == test.num_classes == 4  # Of all splits.
  assert isinstance(train.images, np.memmap) == (name == "folder")
  assert train.fingerprint() != test.fingerprint()


@pytest.mark.parametrize("name", ["file.npz", "folder", "folder/images.npy"])
def test_plain_arrays_are_for_training(tmp_path, name):
  top = tmp_path / name.partition("/")[0]
  save(top, images=images(5, 6, 8), labels=np.array([0, 0, 1, 1, 2]))
  settings = {"path": tmp_path / name, "channels": 1}
  train = make("arrays", **settings)
  assert train.images.shape == (5, 6, 8, 1)
  assert train.num_classes == 3
  assert make("arrays", "eval", **settings) is None


def test_gray_is_repeated_and_labels_may_be_absent(tmp_path):
  save(tmp_path / "a.npz", train_images=images(5, 6, 8))
  source = make("arrays", path=tmp_path / "a.npz")
  assert source.images.shape == (5, 6, 8, 3)
  assert (source.images == source.images[..., :1]).all()
  assert source.labels is None
  assert source.num_classes == 0


def test_several_labels_per_image(tmp_path):
  labels = RNG.integers(0, 2, (5, 14))
  save(tmp_path / "a.npz", train_images=images(5), train_labels=labels)
  source = make("arrays", path=tmp_path / "a.npz")
  assert source.multi_label
  assert source.num_classes == 14
  np.testing.assert_array_equal(source.labels, labels)


class Trap:
  """Unpickling it would make a directory."""

  def __reduce__(self):
    return os.mkdir, ("unpickled",)


MISTAKES = {
  "float images": (dict(images=np.zeros((3, 4, 4))), "float64 .* uint8"),
  "rank": (dict(images=images(3, 4)), r"uint8 \[3, 4\]; expected"),
  "empty": (dict(images=images(0)), "is empty"),
  "no side": (dict(images=images(3, 0, 4)), "is empty"),
  "channels": (dict(images=images(3, 4, 4, 5)), "data.channels=5"),
  "length": (dict(images=images(3), labels=np.zeros(4, int)), "4 rows for 3"),
  "float labels": (dict(images=images(3), labels=np.zeros(3)), "float64"),
  "negative": (dict(images=images(3), labels=np.full(3, -1)), "-1 to -1"),
  "huge": (dict(images=images(3), labels=np.full(3, 10**9)), "numbers of cla"),
  "several": (dict(images=images(3), labels=np.full((3, 2), 2)), "0 and 1"),
  "objects": (dict(images=np.array([Trap()] * 3)), "[oO]bject"),
  "no images": (dict(pixels=images(3)), "found pixels; name the split"),
  "other split": (dict(test_images=images(3)), "no train_images: found test_i"),
}


@pytest.mark.parametrize("case", MISTAKES)
@pytest.mark.parametrize("name", ["file.npz", "folder"])
def test_mistakes(tmp_path, monkeypatch, name, case):
  arrays, message = MISTAKES[case]
  save(tmp_path / name, **arrays)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=message) as error:
    make("arrays", path=tmp_path / name)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "unpickled").exists()


def damaged(path, case):
  if case == "pipe":
    os.mkfifo(path)
  elif case == "pickle":
    path.write_bytes(pickle.dumps(Trap()))
  elif case == "text":
    path.write_text("hello")
  elif case == "cut":
    np.savez(path, images=images(50))
    path.write_bytes(path.read_bytes()[:3000])
  elif case == "damaged":
    np.savez(path, images=images(50))
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize(
  "case", ["absent", "pipe", "pickle", "text", "cut", "damaged"]
)
def test_files_that_are_no_arrays(tmp_path, monkeypatch, case):
  monkeypatch.chdir(tmp_path)
  damaged(tmp_path / "file.npz", case)
  with pytest.raises(UserError, match="expected a") as error:
    make("arrays", path=tmp_path / "file.npz")
  assert "\n" not in str(error.value)
  assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize("path", ["", "x.txt"])
def test_a_path_of_something_else(tmp_path, path):
  if path:
    path = tmp_path / path
    path.write_text("")
  with pytest.raises(UserError, match=r"data\.path is"):
    make("arrays", path=path)


# --- Where they stay ----------------------------------------------------------


def placed(monkeypatch, source, where, memory=None):
  said = []
  monkeypatch.setattr(console, "say", said.append)
  if memory is not None:
    monkeypatch.setattr(placement, "_device_memory", lambda mesh: memory)
  found = placement.data_set(source, where, devices.make_mesh())
  return found, said


@pytest.mark.parametrize(
  ("where", "room", "on_devices", "said"),  # Room: shares of all images.
  [
    ("auto", 1.1, "whole", "every device: .* a device has room for"),
    ("auto", 0.2, "part", "8 devices, a part on each: .* a device has room"),
    ("auto", 0.1, "", "the host: .* a device has room for .* of them"),
    ("device", 1.1, "whole", "every device: .* as data.placement says"),
    ("device", 0.1, "part", "8 devices, .* as data.placement says"),
    ("host", 1.1, "", "the host: .* as data.placement says"),
  ],
)
def test_placement(monkeypatch, where, room, on_devices, said):
  source = made_sources.make("synthetic", num_examples=43)
  memory = room * source.images.nbytes / placement.SHARE
  found, (line,) = placed(monkeypatch, source, where, memory)
  if found is None:
    assert not on_devices
  else:
    np.testing.assert_array_equal(found[:43], source.images)
    assert found.sharding.is_fully_replicated == (on_devices == "whole")
    assert len(found) == {"whole": 43, "part": 48}[on_devices]
  assert re.search(said, line), line


def test_files_cannot_stay_on_the_devices(monkeypatch, photo_folder):
  source = made_sources.make("folder", path=photo_folder)
  assert placed(monkeypatch, source, "auto") == (None, [])
  with pytest.raises(UserError, match="reads its images one by one"):
    placed(monkeypatch, source, "device")
