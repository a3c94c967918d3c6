"""Ten epochs of a folder, and starts far into a run: slow, run by hand.

pytest -s -m slow tests/data/test_long_runs.py
"""

from __future__ import annotations

import os
import pathlib
import time

import pytest
import tensorflow_datasets as tf_datasets

from imsvd_jax.benchmarks import data_throughput
from imsvd_jax.data.sources import tfds
from tests.data import made_sources

pytestmark = pytest.mark.slow

NUM_IMAGES, BATCH, EPOCHS = 256, 32, 10


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> pathlib.Path:
  """JPEGs of 500 x 375 pixels."""
  root = tmp_path_factory.mktemp("photographs")
  data_throughput.write_photographs(str(root), NUM_IMAGES)
  return root


def resident_megabytes() -> float:
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def first_batch_seconds(source, step: int) -> float:
  start = time.perf_counter()
  next(made_sources.train_batches(source, BATCH, start_step=step))
  return time.perf_counter() - start


def near_and_far_seconds(source, far: int) -> tuple[float, float]:
  """The least of three first batches at step 0, and at step `far`."""
  first_batch_seconds(source, 0)
  return tuple(
    min(first_batch_seconds(source, step) for _ in range(3))
    for step in (0, far)
  )


@pytest.mark.parametrize("num_bad", [0, 10])
def test_host_memory_is_flat_over_ten_epochs(photographs, num_bad):
  for path in sorted(photographs.iterdir())[:num_bad]:
    path.write_bytes(path.read_bytes()[:5000])  # Cut short.
  source = made_sources.make("folder", path=photographs)
  views = made_sources.views(size=224)
  batches = made_sources.train_batches(source, BATCH, views=views)
  resident = []
  for epoch in range(EPOCHS):
    for _ in range(NUM_IMAGES // BATCH):
      next(batches)
    resident.append(resident_megabytes())
    print(f"epoch {epoch + 1}: {resident[-1]:.0f} MB resident")
  assert batches.bad_images == EPOCHS * num_bad
  # The first epochs fill TensorFlow's pools.
  assert max(resident[5:]) - max(resident[2:5]) < 30


def test_the_start_of_a_folder_costs_the_same_anywhere(photographs):
  source = made_sources.make("folder", path=photographs)
  near, far = near_and_far_seconds(source, 10**6)
  print(f"first batch at step 0: {near:.2f} s; at step 1,000,000: {far:.2f} s")
  assert far < 2 * near + 0.5


class ManyPhotos(made_sources.TinyPhotos):
  """Records of an ordinary size, all in the one group of files."""

  COUNT = 4000

  def _examples(self, count):
    photos = [
      made_sources.encode(made_sources.photograph(i, 500, 375), quality=90)
      for i in range(8)
    ]
    for i in range(self.COUNT if count == 40 else count):
      yield i, {"image": photos[i % 8], "label": i % 4}


def test_records_are_skipped_undecoded(tmp_path, monkeypatch):
  config = tf_datasets.download.DownloadConfig(num_shards=8)
  ManyPhotos(data_dir=tmp_path).download_and_prepare(download_config=config)
  monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
  source = made_sources.make("tfds:many_photos", path=tmp_path)
  # Beyond the shuffle buffer, which is filled at any start.
  steps = (ManyPhotos.COUNT - tfds.SHUFFLE_BUFFER) // BATCH - 1
  near, far = near_and_far_seconds(source, steps)
  per_second = steps * BATCH / (far - near)
  print(
    f"first batch at step 0: {near:.2f} s; {steps * BATCH} records further:"
    f" {far:.2f} s, {per_second:,.0f} records/s"
  )
  assert per_second > 300
