"""Images on disk, made once for all data tests."""

from __future__ import annotations

import io
import pathlib
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.data import made_sources


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory) -> pathlib.Path:
  """Forty JPEGs in two class folders."""
  root = tmp_path_factory.mktemp("photos")
  for number in range(40):
    folder = root / ("even", "odd")[number % 2]
    folder.mkdir(exist_ok=True)
    image = made_sources.photograph(number, 48 + number % 5, 40 + number % 7)
    (folder / f"{number:02}.jpg").write_bytes(made_sources.encode(image))
  return root


@pytest.fixture(scope="session")
def array_file(tmp_path_factory) -> pathlib.Path:
  """Forty images of 20 x 24 pixels in MedMNIST's layout."""
  path = tmp_path_factory.mktemp("arrays") / "file.npz"
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (40, 20, 24, 3), np.uint8)
  labels = (np.arange(40) % 4)[:, None]
  np.savez(path, train_images=images, train_labels=labels)
  return path


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory, photo_folder) -> pathlib.Path:
  """The same forty JPEGs in two shards, with labels."""
  root = tmp_path_factory.mktemp("shards")
  files = sorted(photo_folder.rglob("*.jpg"), key=lambda path: path.name)
  for part in range(2):
    with tarfile.open(root / f"train-{part}.tar", "w") as shard:
      for file in files[part::2]:
        label = tarfile.TarInfo(f"{file.stem}.cls")
        label.size = 1
        shard.addfile(label, io.BytesIO(str(part).encode()))
        shard.add(file, file.name)
  return root


@pytest.fixture(scope="session")
def photo_pack(tmp_path_factory, photo_folder) -> pathlib.Path:
  """The forty JPEGs of the folder, packed."""
  root = tmp_path_factory.mktemp("packed") / "pack"
  made_sources.pack(photo_folder, root)
  return root


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory, photo_folder) -> pathlib.Path:
  """The same files, six of them replaced by six kinds of unreadable ones."""
  root = tmp_path_factory.mktemp("bad")
  files = sorted(photo_folder.rglob("*.jpg"))
  contents = made_sources.bad_contents().values()
  bad = dict(zip(made_sources.BAD_KEYS, contents, strict=True))
  for number, file in enumerate(files):
    target = root / file.relative_to(photo_folder)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(bad.get(number, file.read_bytes()))
  return root


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> pathlib.Path:
  """Prepared data sets: 40 records in 5 files, and 10 for testing."""
  root = tmp_path_factory.mktemp("tfds")
  config = tfds.download.DownloadConfig(num_shards=5)
  for builder in (made_sources.TinyPhotos, made_sources.TinySpoiledPhotos):
    builder(data_dir=root).download_and_prepare(download_config=config)
  return root
