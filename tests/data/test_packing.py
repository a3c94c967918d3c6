"""Packs: what is written, what a run reads of them, and what damage does."""

from __future__ import annotations

import os
import shutil
import signal
import zlib

import numpy as np
import pytest
from PIL import Image

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import boxes, order, pack_files, packing
from imsvd_jax.data import part as part_lib
from imsvd_jax.data.sources import tfds
from tests.data import made_sources
from tests.data.made_sources import encode, make, photograph
from tests.run_command import check_refused, run_imsvd, run_python

BATCH = 8


@pytest.fixture(scope="module", autouse=True)
def small_shards():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(packing, "SHARD_IMAGES", 16)
    yield


@pytest.fixture(scope="module")
def photo_tree(tmp_path_factory):
  """Forty photographs of three classes and two splits, each of its own size."""
  root = tmp_path_factory.mktemp("tree")
  for number in range(48):
    split = "train" if number < 40 else "test"
    folder = root / split / ("class10", "class2", "b.c")[number % 3]
    folder.mkdir(parents=True, exist_ok=True)
    image = photograph(number, 64 + number, 90 - number)
    (folder / f"{number:02}.jpg").write_bytes(encode(image))
  return root


@pytest.fixture(scope="module")
def packed(photo_tree, tmp_path_factory):
  root = tmp_path_factory.mktemp("packed") / "pack"
  notes = made_sources.pack(photo_tree, root)
  assert notes[0] == "train: 40 images, 6.9 kB each."
  return root


@pytest.fixture
def copy(packed, tmp_path):
  shutil.copytree(packed, tmp_path / "pack")
  return tmp_path / "pack"


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- What a run sees ----------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_pack_has_the_order_labels_and_names_of_its_images(
  packed, photo_tree, split
):
  ours, theirs = (
    make(name, split, path=path)
    for name, path in (("pack", packed), ("folder", photo_tree))
  )
  assert ours.num_examples == theirs.num_examples == (40, 8)[split == "eval"]
  assert ours.label_names == theirs.label_names == ("b.c", "class10", "class2")
  np.testing.assert_array_equal(ours.labels, theirs.labels)
  for index in range(ours.num_examples):
    assert ours.relative_name(index) == theirs.relative_name(index)
  steps = [next(made_sources.train_batches(s, BATCH)) for s in (ours, theirs)]
  np.testing.assert_array_equal(steps[0]["index"], steps[1]["index"])
  assert ours.fingerprint() != theirs.fingerprint()


@pytest.mark.parametrize(
  ("options", "limit"),
  [
    ({}, 3),
    pytest.param({"quality": 95, "format": "jpeg"}, 6, marks=pytest.mark.proof),
  ],
)
def test_views_are_those_of_the_images(photo_tree, tmp_path, options, limit):
  """The squares are larger than the images: nothing is lost."""
  made_sources.pack(photo_tree, tmp_path / "p", size=128, **options)
  views, evaluated = [], []
  for name, path in (("pack", tmp_path / "p"), ("folder", photo_tree)):
    source = make(name, path=path, antialias=True)
    views.append(next(made_sources.train_batches(source, 40))["views"][0])
    evaluated.append(
      made_sources.evaluated(source, batch_size=20, resize=20, crop=16)
    )
  for a, b in [views, [found["image"] for found in evaluated]]:
    assert np.abs(a.astype(int) - b).mean() < limit
  np.testing.assert_array_equal(evaluated[0]["label"], evaluated[1]["label"])


def test_boxes_keep_the_proportions_of_the_image(packed):
  source = make("pack", path=packed)
  index = np.arange(40)
  crop = boxes.Crop(16, (0.2, 1.0), (3 / 4, 4 / 3), 0.5)
  uniforms = order.uniforms_of(index * 0, index, seed=0, num_views=1)
  height, width = source.images.sides.T
  drawn = boxes.random_boxes(uniforms, height, width, [crop])
  found = source.images.whole_boxes(index, drawn)
  scale = 48 / source.images.sides[:, None]
  for at in (0, 2):
    exact = drawn[..., at : at + 2] * scale
    assert np.abs(found[..., at : at + 2] - exact).max() <= 1
  assert (found[..., :4] == np.round(found[..., :4])).all()
  assert (found[..., :2] + found[..., 2:4] <= 48).all()
  np.testing.assert_array_equal(found[..., 4], drawn[..., 4])


def test_boxes_of_each_image_are_those_of_one_size():
  uniforms = order.uniforms_of(
    np.zeros(9, int), np.arange(9), seed=0, num_views=2
  )
  crops = [boxes.Crop(16, (0.2, 1.0), (0.1, 0.2), 0.5)] * 2  # Some never fit.
  of_one = boxes.random_boxes(uniforms, 30, 50, crops)
  sides = np.full(9, 30), np.full(9, 50)
  of_each = boxes.random_boxes(uniforms, *sides, crops)
  np.testing.assert_array_equal(of_one, of_each)


def test_a_part_of_a_pack_reads_its_images(packed):
  source = make("pack", path=packed)
  index = np.array([3, 21, 39])
  part = part_lib.take(source, index)
  np.testing.assert_array_equal(part.images[np.arange(3)], source.images[index])
  np.testing.assert_array_equal(np.asarray(part.images), source.images[index])
  np.testing.assert_array_equal(part.labels, source.labels[index])
  pixels = part.reader()({"index": np.int64(1)})
  np.testing.assert_array_equal(pixels, source.images[index[1:2]][0])


def test_unreadable_images_are_left_out_and_named(bad_folder, tmp_path, caplog):
  notes = made_sources.pack(bad_folder, tmp_path / "pack")
  assert notes[0].startswith("train: 34 images")
  assert notes[-1].startswith("Left out 6 unreadable images: ")
  assert sum("it is left out" in text for text in caplog.messages) == 6
  assert make("pack", path=tmp_path / "pack").num_examples == 34
  again = made_sources.pack(bad_folder, tmp_path / "pack")
  assert again == notes
  with pytest.raises(UserError, match="repair or remove it"):
    made_sources.pack(bad_folder, tmp_path / "b", on_bad_image="error")


def test_small_images_are_enlarged_which_is_said(tmp_path):
  (tmp_path / "a").mkdir()
  photograph(0, 20, 90).save(tmp_path / "a" / "1.png")
  notes = made_sources.pack(tmp_path / "a", tmp_path / "pack")
  assert "1 of them were enlarged" in notes[1]
  source = make("pack", path=tmp_path / "pack")
  assert source.images.sides.tolist() == [[90, 20]]
  expected = photograph(0, 20, 90).resize((48, 48), Image.BICUBIC)
  assert np.abs(source.images[[0]][0].astype(int) - expected).max() <= 1


@pytest.mark.proof
def test_gray_jpegs(photo_folder, tmp_path):
  source = make("folder", path=photo_folder, channels=1)
  packing.pack(tmp_path / "pack", {"train": source}, packing.PackOptions())
  images = make("pack", path=tmp_path / "pack", channels=1).images
  assert images[[7]].shape == (1, 256, 256, 1)
  assert images[40:].shape == (0, 256, 256, 1)  # A device without images.


@pytest.mark.proof
@pytest.mark.parametrize("in_memory", [True, False])
def test_tfds_in_memory_and_as_a_stream(
  tfds_dir, tmp_path, monkeypatch, in_memory
):
  if not in_memory:
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
  source = make("tfds:tiny_photos", path=tfds_dir)
  assert (source.stream is None) == in_memory
  options = packing.PackOptions(size=48, format="raw")
  packing.pack(tmp_path / "pack", {"train": source}, options)
  ours = make("pack", path=tmp_path / "pack")
  assert ours.label_names == source.label_names
  np.testing.assert_array_equal(ours.labels, part_lib.labels_of(source))
  assert ours.describe(17) == source.describe(17)


# --- Stops and damage ---------------------------------------------------------


def test_a_pack_that_was_stopped_goes_on_to_the_same_bytes(
  packed, photo_tree, tmp_path, monkeypatch
):
  write = packing.pack_files.write_checked

  def stop(path, content):
    if path.endswith("train-00001.json"):  # Its data are there.
      raise KeyboardInterrupt
    return write(path, content)

  monkeypatch.setattr(packing.pack_files, "write_checked", stop)
  with pytest.raises(KeyboardInterrupt):
    made_sources.pack(photo_tree, tmp_path / "pack")
  with pytest.raises(UserError, match="is not finished; the same `imsvd pack`"):
    make("pack", path=tmp_path / "pack")
  monkeypatch.undo()
  monkeypatch.setattr(packing, "SHARD_IMAGES", 16)
  first = tmp_path / "pack" / "train-00000.data"
  before = first.stat().st_mtime_ns
  (tmp_path / "pack" / "train-00002.data.7.unfinished").write_bytes(b"half")
  with open(tmp_path / "pack" / "train-00001.data", "r+b") as file:
    file.truncate(100)  # A crash of the machine.
  made_sources.pack(photo_tree, tmp_path / "pack")
  assert contents(tmp_path / "pack") == contents(packed)
  assert first.stat().st_mtime_ns == before


KILLED = """
import os, signal, sys
from imsvd_jax.data import packing
from tests.data import made_sources
packing.SHARD_IMAGES = 16
packing._PREFETCH = 1
count = [0]
class Progress(packing.Progress):
  def add(self, number):
    count[0] += 1
    if count[0] == 22:
      os.kill(os.getpid(), signal.SIGKILL)
packing.Progress = Progress
made_sources.pack(sys.argv[2], sys.argv[3])
"""


@pytest.mark.proof
def test_a_kill_loses_and_doubles_nothing(packed, photo_tree, tmp_path):
  words = ("-m", "tests.run_code", KILLED, str(photo_tree), str(tmp_path / "p"))
  assert run_python(*words).returncode == -signal.SIGKILL
  names = set(contents(tmp_path / "p"))
  assert any(name.endswith(".unfinished") for name in names)
  assert "train-00000.json" in names
  assert "train-00001.json" not in names
  made_sources.pack(photo_tree, tmp_path / "p")
  assert contents(tmp_path / "p") == contents(packed)


def flip(path, at=None):
  content = bytearray(path.read_bytes())
  content[len(content) // 2 if at is None else at] ^= 1
  path.write_bytes(content)


def cut(path):
  path.write_bytes(path.read_bytes()[:-1])


def pipe(path):
  path.unlink()
  os.mkfifo(path)


@pytest.mark.parametrize(
  ("name", "damage", "message"),
  [
    ("train-00001.data", cut, r"train-00001\.data has 110591 bytes instead of"),
    ("train-00001.data", os.remove, "cannot be read"),
    ("train-00001.data", pipe, "is not a regular file"),
    ("train-00001.json", flip, r"train-00001\.json has another checksum"),
    ("train-00001.json", cut, None),
    ("train-00001.json", os.remove, "is not there"),
    ("train-00001.json", pipe, "is not a regular file"),
    ("pack.json", lambda path: flip(path, 60), "another checksum"),
    ("pack.json", os.remove, "it has no pack.json"),
    ("train-00001.data", flip, r"checksum at 'train-00001:.*\.jpg'"),
  ],
)
def test_damage_is_one_line(copy, name, damage, message):
  damage(copy / name)
  if message is None:  # The new line at the end.
    make("pack", path=copy)
    return
  with pytest.raises(UserError, match=message) as error:
    np.asarray(make("pack", path=copy).images)
  assert "\n" not in str(error.value)


def test_exchanged_shards_are_noticed(copy):
  """Each is whole, but not where it belongs."""
  for ending in ("json", "data"):
    first, second = (copy / f"train-0000{n}.{ending}" for n in (0, 1))
    first.rename(copy / "first")
    second.rename(first)
    (copy / "first").rename(second)
  with pytest.raises(UserError, match=r"not the one that pack\.json names"):
    make("pack", path=copy)


@pytest.mark.parametrize(
  ("name", "damage"),
  [
    ("train-00001.data", flip),
    *(
      pytest.param(*case, marks=pytest.mark.proof)
      for case in (
        ("train-00000.data", os.remove),
        ("train-00000.json", pipe),
        ("train-00001.data", pipe),
        ("train-00002.json", flip),
      )
    ),
  ],
)
def test_the_same_command_repairs(copy, photo_tree, packed, name, damage):
  damage(copy / name)
  made_sources.pack(photo_tree, copy)
  assert contents(copy) == contents(packed)


def forge(copy, change, name="train-00000.json"):
  """Changes a list or the manifest, and makes all checksums right."""
  _, content = pack_files.read_checked(copy / name)
  change(content)
  digest = pack_files.write_checked(copy / name, content)
  if name != "pack.json":
    _, manifest = pack_files.read_checked(copy / "pack.json")
    manifest["splits"]["train"]["shards"][0] = digest
    pack_files.write_checked(copy / "pack.json", manifest)


@pytest.mark.parametrize(
  "change",
  [
    lambda found: found["names"].pop(),
    lambda found: found["names"].__setitem__(0, 7),
    lambda found: found["labels"].__setitem__(0, 3),
    lambda found: found["labels"].__setitem__(0, -2),
    lambda found: found["labels"].pop(),
    lambda found: found["sides"].__setitem__(0, [0, 5]),
    lambda found: found["sides"].__setitem__(0, [2**40, 5]),
    lambda found: found["ends"].__setitem__(0, 0),
    lambda found: found["ends"].__setitem__(0, 10**30),
    lambda found: found["ends"].__setitem__(0, "x"),
    lambda found: found.pop("crc32"),
  ],
)
def test_a_forged_list_is_refused(copy, change):
  forge(copy, change)
  with pytest.raises(UserError, match="does not fit the pack"):
    make("pack", path=copy)


@pytest.mark.parametrize(
  "change",
  [
    lambda found: found.update(format="imsvd pack 2"),
    lambda found: found.update(size=10**6),
    lambda found: found.update(size=True),
    lambda found: found.update(encoding="pickle"),
    lambda found: found["splits"].update({"../x": found["splits"]["train"]}),
    lambda found: found["splits"]["train"].update(num_classes="3"),
    lambda found: found["splits"]["train"].update(classes=[1, 2, 3]),
    lambda found: found["splits"]["train"].pop("shards"),
    lambda found: found.update(splits=[]),
  ],
)
def test_a_forged_manifest_is_refused(copy, change):
  forge(copy, change, "pack.json")
  with pytest.raises(UserError, match=r"does not say|has the format"):
    make("pack", path=copy)


@pytest.mark.proof
def test_a_huge_jpeg_is_not_decoded(photo_tree, tmp_path):
  made_sources.pack(photo_tree, tmp_path / "p", format="jpeg")
  bomb = encode(Image.new("RGB", (3000, 3000)))

  def change(found):
    content = bomb + (tmp_path / "p" / "train-00000.data").read_bytes()
    (tmp_path / "p" / "train-00000.data").write_bytes(content)
    found["ends"] = [len(bomb), *(end + len(bomb) for end in found["ends"])]
    found["crc32"].insert(0, zlib.crc32(bomb))
    for key in ("names", "sides", "labels"):
      found[key].insert(0, found[key][0])

  forge(tmp_path / "p", change)
  source = make("pack", path=tmp_path / "p")
  source.images[np.array([1])]
  with pytest.raises(UserError, match="not all JPEGs of 48 x 48 pix") as error:
    source.images[np.array([0, 1])]
  # By the look at its header, not by its shape when it is in memory.
  assert "assertion failed" in str(error.value.__cause__.__cause__)


# --- Mistakes -----------------------------------------------------------------


def test_what_cannot_be_packed(copy, photo_tree, tmp_path):
  with pytest.raises(UserError, match="its size is 48, not 32; choose another"):
    made_sources.pack(photo_tree, copy, size=32)
  with pytest.raises(UserError, match="its encoding is 'raw', not 'jpeg'"):
    made_sources.pack(photo_tree, copy, format="jpeg")
  with pytest.raises(UserError, match="its data is folder:"):
    made_sources.pack(photo_tree / "test", copy)
  with pytest.raises(UserError, match=r"is no pack and holds test; give"):
    made_sources.pack(photo_tree, photo_tree)
  with pytest.raises(UserError, match="expected 1 to 100"):
    made_sources.pack(photo_tree, tmp_path / "p", quality=101)
  with pytest.raises(UserError, match="expected 1 to 4096"):
    made_sources.pack(photo_tree, tmp_path / "p", size=10**5)
  source = make("pack", path=copy)
  with pytest.raises(UserError, match="is a pack already"):
    packing.pack(tmp_path / "p", {"train": source}, _raw())
  source = make("folder", path=photo_tree, channels=4)
  with pytest.raises(UserError, match="use --format=raw"):
    packing.pack(tmp_path / "p", {"train": source}, packing.PackOptions())
  source = make("folder", path=photo_tree, value_range="auto")
  with pytest.raises(UserError, match="A pack holds 8 bits per level"):
    packing.pack(tmp_path / "p", {"train": source}, _raw())
  assert not (tmp_path / "p").exists()


def _raw():
  return packing.PackOptions(format="raw")


def test_two_writers_are_one_too_many(copy, photo_tree):
  with (
    packing._alone_in(str(copy)),
    pytest.raises(UserError, match="Another `imsvd pack` writes to"),
  ):
    made_sources.pack(photo_tree, copy)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"path": ""}, "data.path is empty"),
    ({"path": "/"}, "is no pack: it has no pack.json"),
    ({"channels": 1}, "has 3 channels, but data.channels is 1"),
    ({"train_split": "mine"}, "has no split 'mine'; expected one of train, t"),
    ({"num_examples": 3}, "has a fixed size"),
  ],
)
def test_settings_that_do_not_fit_a_pack(packed, settings, message):
  with pytest.raises(UserError, match=message):
    make("pack", **({"path": packed} | settings))


def test_all_bad_is_an_error(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "1.jpg").write_bytes(b"nothing")
  with pytest.raises(
    UserError, match=r"None of the 1 images of .* can be read"
  ):
    made_sources.pack(tmp_path / "a", tmp_path / "pack")


@pytest.mark.proof
def test_the_command_packs_and_a_run_trains_on_it(photo_tree, tmp_path):
  pack = ("pack", f"--data=folder:{photo_tree}", f"--output={tmp_path / 'p'}")
  check_refused(run_imsvd(*pack, "--format=zip"), "expected jpeg or raw")
  made = run_imsvd(*pack, "--size=64")
  assert made.returncode == 0, made.stderr
  assert made.stdout.splitlines()[0].startswith("train: 40 images")
  recipe = ("train", "--config=folder_r18:debug")
  data = ("--config.data.name=pack", "--config.data.num_examples=0")
  path = f"--config.data.path={tmp_path / 'p'}"
  ran = run_imsvd(*recipe, *data, path, f"--workdir={tmp_path / 'w'}")
  assert ran.returncode == 0, ran.stderr
  assert "40 images, 3 classes (b.c, class10, class2)" in ran.stderr
  flip(tmp_path / "p" / "train-00000.data")
  ran = run_imsvd(*recipe, *data, path, f"--workdir={tmp_path / 'w2'}")
  assert ran.returncode == 2
  assert "The pack is damaged" in ran.stderr.splitlines()[-1]
