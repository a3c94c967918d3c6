"""Shards of WebDataset's layout."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from tests.data import made_sources
from tests.data.made_sources import encode, make, photograph


def shard(path, members):
  with tarfile.open(path, "w") as archive:
    for name, content in members:
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))


def example(number, label=None):
  found = [(f"x/{number:03}.jpg", encode(photograph(number, 24, 20)))]
  if label is not None:
    found.append((f"x/{number:03}.cls", str(label).encode()))
  return found


@pytest.fixture
def shards(tmp_path):
  """Eight images in two shards, and three for testing."""
  for part in range(2):
    numbers = range(4 * part, 4 * part + 4)
    members = [m for n in numbers for m in example(n, 8 + n % 3)]
    shard(tmp_path / f"train-{part}.tar", [("._x.jpg", b""), *members])
  test = [*example(9), ("x/009.json", b'{"label": 10}'), *example(10, 9)]
  shard(tmp_path / "test-0.tar", test)
  return tmp_path


def test_images_and_labels_of_shards(shards):
  train, test = (make("tar", split, path=shards) for split in ("train", "eval"))
  assert train.num_examples == 8
  assert train.label_names == test.label_names == ("8", "9", "10")
  assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
  assert test.labels.tolist() == [2, 1]
  assert train.relative_name(5) == "train-1.tar:x/005.jpg"
  assert train.fetch(np.int64(5)).numpy() == example(5)[0][1]
  assert train.summary().endswith("2 shards")
  assert train.fingerprint() != test.fingerprint()
  found = made_sources.evaluated(train, batch_size=4, resize=20, crop=20)
  expected = np.asarray(photograph(5, 24, 20), int)[:, 2:22]
  assert np.abs(found["image"][5] - expected).mean() < 12
  batch = next(made_sources.train_batches(train, 8))
  assert sorted(batch["index"]) == list(range(8))


def test_shards_without_labels(tmp_path):
  shard(tmp_path / "train.tar", [m for n in range(3) for m in example(n)])
  source = make("tar", path=tmp_path)
  assert source.num_classes == 0
  assert source.labels is None


def test_a_cut_shard_gives_what_it_has(shards, caplog):
  content = (shards / "train-1.tar").read_bytes()
  (shards / "train-1.tar").write_bytes(content[:3000])
  source = make("tar", path=shards)
  assert 4 < source.num_examples < 8
  assert "train-1.tar is damaged" in caplog.text


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"train_split": "none"}, r"found no file .*none\*\.tar"),
    ({"path": ""}, "data.path is empty"),
    ({"train_split": "text"}, "No images in the 1 shards of 'text'"),
  ],
)
def test_mistakes(shards, settings, message):
  shard(shards / "text.tar", [("a.txt", b"x")])
  with pytest.raises(UserError, match=message):
    make("tar", **({"path": shards} | settings))


def test_a_class_that_train_lacks_is_refused(shards):
  shard(shards / "test-1.tar", example(11, "new"))
  with pytest.raises(UserError, match="'new', which 'train' does not have"):
    make("tar", "eval", path=shards)
