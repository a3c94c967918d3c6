"""Properties that the batches of every source must have."""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches, faults
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import tfds
from tests.data import made_sources
from tests.data.made_sources import concatenate

NUM_BAD = len(made_sources.BAD_KEYS)
BATCH = 8  # Divides no epoch of 36 or 40 into whole batches of every process.


class Case(NamedTuple):
  source: Source
  num_bad: int


# Name of a case -> the source, the fixture of its path, other settings.
CASES = {
  "digits": ("digits", None, {}),
  "shapes": ("shapes", None, {"num_examples": 36}),
  "scenes": ("scenes", None, {"num_examples": 36}),
  "synthetic": ("synthetic", None, {"num_examples": 36}),
  "large_synthetic": ("synthetic", None, dict(num_examples=36, image_size=70)),
  "arrays": ("arrays", "array_file", {}),
  "folder": ("folder", "photo_folder", {}),
  "tar": ("tar", "photo_shards", {}),
  "pack": ("pack", "photo_pack", {}),
  "bad_folder": ("folder", "bad_folder", {}),
  "tfds_memory": ("tfds:tiny_photos", "tfds_dir", {}),
  "tfds_stream": ("tfds:tiny_photos", "tfds_dir", {}),
  "bad_tfds_memory": ("tfds:tiny_spoiled_photos", "tfds_dir", {}),
  "bad_tfds_stream": ("tfds:tiny_spoiled_photos", "tfds_dir", {}),
}


@pytest.fixture(
  params=[
    # Files are read many times over, bad ones more so: slow.
    pytest.param(
      c, marks=pytest.mark.proof if c.startswith(("bad", "tfds")) else ()
    )
    for c in CASES
  ]
)
def case(request, monkeypatch) -> Case:
  """One source of about forty images."""
  name, fixture, settings = CASES[request.param]
  if fixture is not None:
    settings = {"path": request.getfixturevalue(fixture)}
  stream = request.param.endswith("tfds_stream")
  if stream:
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(tfds, "FILES_PER_GROUP", 2)
    monkeypatch.setattr(tfds, "SHUFFLE_BUFFER", 5)
  num_bad = NUM_BAD if request.param.startswith("bad") else 0
  source = made_sources.make(name, **settings)
  assert (source.stream is not None) == stream
  return Case(source, num_bad)


def test_every_source_is_covered():
  names = {name.partition(":")[0] for name, _, _ in CASES.values()}
  assert names == set(data.SOURCES)


def take(source, steps, **arguments):
  """Batches of the steps in `steps`, a range."""
  arguments = {"batch_size": BATCH, "seed": 3} | arguments
  arguments |= {"start_step": steps.start}
  batches = made_sources.train_batches(source, **arguments)
  return [next(batches) for _ in steps]


def assert_same(a, b):
  tf.nest.map_structure(np.testing.assert_array_equal, a, b)


def test_epochs_resume_and_processes(case):
  source = case.source
  batch = BATCH if source.num_examples < 100 else 479  # digits: 3 per epoch
  steps = range(2 * source.num_examples // batch + 1)
  whole = take(source, steps, batch_size=batch)

  # Shapes and types.
  assert whole[0]["views"][0].shape == (batch, 2, 16, 16, 3)
  assert len(whole[0]["views"]) == 1
  assert whole[0]["views"][0].dtype == np.uint8
  assert whole[0]["index"].dtype == whole[0]["epoch"].dtype == np.int32
  assert set(whole[0]) - {"bad"} == {"views", "index", "epoch"}

  # Each image exactly once per epoch, in another order in the next.
  everything = concatenate(whole)
  orders = [everything["index"][everything["epoch"] == e] for e in (0, 1)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), range(source.num_examples))
  assert (orders[0] != orders[1]).any()
  assert (orders[0] != np.sort(orders[0])).any()
  check_bad(case, source, everything)

  # The two views of an image differ, and so do its views in two epochs.
  views = everything["views"][0]
  assert (views[:, 0] != views[:, 1]).any()
  bad = everything.get("bad", np.zeros(len(views), bool))
  is_one = everything["index"] == everything["index"][~bad][0]
  at = np.flatnonzero(is_one)[[0, -1]]
  assert everything["epoch"][at[0]] != everything["epoch"][at[1]]
  assert (views[at[0]] != views[at[1]]).any()

  # Starting in the middle of an epoch sees what an uninterrupted run sees.
  middle = source.num_examples // batch + 2
  resumed = take(source, range(middle, steps.stop), batch_size=batch)
  assert_same(resumed, whole[middle:])

  # Four processes.
  batch -= batch % 4
  parts = [
    take(source, steps, batch_size=batch, process_index=k, process_count=4)
    for k in range(4)
  ]
  together = [concatenate(step) for step in zip(*parts, strict=True)]
  check_bad(case, source, concatenate(together))
  third = {"batch_size": batch, "process_index": 2, "process_count": 4}
  assert_same(take(source, range(3, 6), **third), parts[2][3:6])
  if source.stream is None:
    whole = whole if batch == BATCH else take(source, steps, batch_size=batch)
    assert_same(together, whole)
  everything = concatenate(together)
  for epoch in (0, 1):
    order = everything["index"][everything["epoch"] == epoch]
    np.testing.assert_array_equal(np.sort(order), range(source.num_examples))


def check_bad(case, source, everything):
  """The same images are bad in every epoch, and no others."""
  assert ("bad" in everything) == (source.images is None)
  if "bad" not in everything:
    return
  bad, again = (
    everything["index"][everything["bad"] & (everything["epoch"] == e)].tolist()
    for e in (0, 1)
  )
  assert len(bad) == case.num_bad
  assert set(bad) == set(again)
  if source.name.startswith("folder"):
    assert set(bad) in (set(), set(made_sources.BAD_KEYS))


@pytest.mark.parametrize("processes", [1, 4])
def test_evaluation_sees_each_image_once(case, processes):
  source = case.source
  settings = dict(batch_size=12, resize=20, crop=16, process_count=processes)
  batches_of = functools.partial(evaluation_batches.eval_batches, **settings)
  parts = [list(batches_of(source, process_index=k)) for k in range(processes)]
  assert len({len(part) for part in parts}) == 1  # All take as many steps.
  batches = [batch for part in parts for batch in part]
  merged = concatenate(batches)
  assert all(b["image"].shape == (12 // processes, 16, 16, 3) for b in batches)
  present = merged["index"] >= 0
  np.testing.assert_array_equal(
    np.sort(merged["index"][present]), range(source.num_examples)
  )
  assert not merged["mask"][~present].any()
  assert (merged["label"][~present] == -1).all()
  assert (merged["label"][present] >= 0).all()
  if source.labels is not None:
    np.testing.assert_array_equal(
      merged["label"][present], source.labels[merged["index"][present]]
    )
  masked_out = merged["index"][present & ~merged["mask"]]
  assert len(masked_out) == case.num_bad
  if case.num_bad and source.name.startswith("folder"):
    assert set(masked_out.tolist()) == set(made_sources.BAD_KEYS)


def test_index_decides_the_views_not_the_batch():
  source = made_sources.make("shapes", num_examples=36)
  rows = lambda b: zip(zip(b["epoch"], b["index"]), b["views"][0])  # noqa: B905
  by_key = {}
  for batch_size in (8, 12):
    everything = concatenate(take(source, range(3), batch_size=batch_size))
    for key, view in rows(everything):
      np.testing.assert_array_equal(by_key.setdefault(key, view), view)
  assert len(by_key) == 36

  other_seed = concatenate(take(source, range(5), seed=4))
  assert (other_seed["index"][:8] != everything["index"][:8]).any()
  for key, view in rows(other_seed):
    if key in by_key:
      assert (view != by_key[key]).any()


@pytest.mark.parametrize("size", [16, 70])
def test_local_views(size):
  """Six smaller views beside the global ones, which stay what they were."""
  source = made_sources.make("synthetic", num_examples=36, image_size=size)
  (batch,) = take(source, range(1), views=made_sources.views(num_local=6))
  shapes = [(8, 2, 16, 16, 3), (8, 6, 8, 8, 3)]
  assert [v.shape for v in batch["views"]] == shapes
  (alone,) = take(source, range(1))
  np.testing.assert_array_equal(batch["views"][0], alone["views"][0])
  local = batch["views"][1].reshape(8, 6, -1)
  assert len(np.unique(local[0], axis=0)) == 6


# --- Bad images ---------------------------------------------------------------


@pytest.fixture
def gray_folder(tmp_path):
  """Ten images whose gray level is ten times their index; 3, 4, 8 are bad."""
  for number in range(10):
    image = made_sources.Image.new("RGB", (20, 20), (10 * number,) * 3)
    contents = made_sources.encode(image, "PNG")
    if number in (3, 4, 8):
      contents = contents[:60]
    (tmp_path / f"{number}.png").write_bytes(contents)
  return tmp_path


def test_bad_images_are_replaced_counted_and_named(gray_folder, caplog):
  source = made_sources.make("folder", path=gray_folder)
  batches = made_sources.train_batches(source, 10)
  with caplog.at_level(logging.WARNING):
    for epoch in range(3):
      batch = next(batches)
      assert batches.bad_images == 3 * (epoch + 1)
      level = batch["views"][0].reshape(10, -1)
      assert (level == level[:, :1]).all()
      shown = dict(zip(batch["index"], level[:, 0] // 10, strict=True))
      assert shown == {i: i for i in range(10)} | {3: 5, 4: 5, 8: 9}
  named = [r.getMessage() for r in caplog.records]
  for number in (3, 4, 8):
    assert sum(f"{number}.png" in message for message in named) == 1


@pytest.mark.proof
def test_good_images_do_not_change_beside_bad_ones(photo_folder, bad_folder):
  good, bad = (
    concatenate(take(made_sources.make("folder", path=path), range(5)))
    for path in (photo_folder, bad_folder)
  )
  np.testing.assert_array_equal(good["index"], bad["index"])
  changed = (good["views"][0] != bad["views"][0]).any(axis=(1, 2, 3, 4))
  assert set(good["index"][changed].tolist()) == set(made_sources.BAD_KEYS)


def test_on_bad_image_error_names_the_file(gray_folder):
  source = made_sources.make("folder", path=gray_folder, on_bad_image="error")
  with pytest.raises(UserError, match=r"[348]\.png; repair or remove"):
    next(made_sources.train_batches(source, 10))


def test_nothing_readable_stops_the_run(tmp_path):
  for number in range(3):
    (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
  source = made_sources.make("folder", path=tmp_path)
  message = r"Cannot read image .*[012]\.jpg or any of the 3 images from it on"
  with pytest.raises(UserError, match=message):
    next(made_sources.train_batches(source, 4))


def scripted(bad_of, *, stream=None, opened=None):
  """Batches of four images, of which those of `bad_of(step)` are bad.

  The fast pipeline fails at a step with bad images, as the real one does.
  """

  def batch(step, careful):
    bad = np.array(bad_of(int(step)), bool)
    if bad.any() and not careful:
      raise ValueError("an image that cannot be read")
    index = 4 * int(step) + np.arange(4, dtype=np.int32)
    return index, bad, np.full(4, bad.all())

  def build(first, careful):
    if opened is not None:
      opened.append((first, careful))
    types = (tf.int32, tf.bool, tf.bool)
    names = ("index", "bad", "black")
    make = lambda step: tf.numpy_function(
      lambda s: batch(s, careful), [step], types
    )
    dataset = tf.data.Dataset.range(first, 1000).map(make)
    return dataset.map(lambda *parts: dict(zip(names, parts, strict=True)))

  return faults.Batches(build, Source("test", 4000, stream=stream), 0, "")


def test_one_bad_file_does_not_slow_the_rest_of_the_run(monkeypatch):
  monkeypatch.setattr(faults, "PATIENCE", 2)
  opened = []
  batches = scripted(lambda s: [s in (3, 4, 9), 0, 0, 0], opened=opened)
  taken = [next(batches) for _ in range(20)]
  # Careful from 3 on until 5 and 6 are good; the second time, until four are.
  switches = [(0, False), (3, True), (7, False), (9, True), (14, False)]
  assert opened == switches
  index = np.concatenate([b["index"] for b in taken])
  np.testing.assert_array_equal(index, np.arange(80))
  assert batches.bad_images == 3
  assert all("black" not in b for b in taken)


def test_a_stream_of_nothing_but_bad_images_stops_the_run():
  """A small batch of them may be chance."""
  stream = object()
  batches = scripted(lambda s: [s % 4 > 0] * 4, stream=stream)
  for _ in range(12):
    next(batches)
  assert batches.bad_images == 36
  batches = scripted(lambda s: [s >= 2] * 4, stream=stream)
  for _ in range(5):
    next(batches)
  message = "record 20 or any of the 16 images drawn with it"
  with pytest.raises(UserError, match=message):
    next(batches)


# --- Mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "process_count"), [(6, 4), (0, 1)])
def test_mistakes_in_training(batch_size, process_count):
  source = made_sources.make("synthetic", num_examples=8)
  with pytest.raises(UserError, match=f"batch_size is {batch_size}"):
    made_sources.train_batches(source, batch_size, process_count=process_count)


def test_crop_larger_than_resize():
  source = made_sources.make("synthetic", num_examples=8)
  with pytest.raises(UserError, match=r"larger than data\.resize"):
    evaluation_batches.eval_batches(source, batch_size=4, resize=16, crop=20)
