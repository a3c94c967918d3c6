"""Properties that the batches of every source must have."""

from __future__ import annotations

import logging
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf

from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches, faults, host_pipeline
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import tfds
from tests.data import made_sources

# Name of a case -> what makes it.
CASES = (
  "digits",
  "shapes",
  "synthetic",
  "large_synthetic",
  "folder",
  "bad_folder",
  "tfds_memory",
  "tfds_stream",
  "bad_tfds_memory",
  "bad_tfds_stream",
)
NUM_BAD = len(made_sources.BAD_KEYS)
BATCH = 8  # Divides no epoch of 36 or 40 into whole batches of every process.


class Case(NamedTuple):
  settings: object
  stream: bool = False
  num_bad: int = 0


@pytest.fixture(params=CASES)
def case(request, monkeypatch) -> Case:
  """Settings of one source, about forty images."""
  name = request.param
  path = lambda fixture: str(request.getfixturevalue(fixture))
  if name == "digits":
    return Case(made_sources.data_settings("digits"))
  if name == "large_synthetic":
    return Case(
      made_sources.data_settings("synthetic", num_examples=36, image_size=70)
    )
  if name in ("shapes", "synthetic"):
    return Case(made_sources.data_settings(name, num_examples=36))
  if name == "folder":
    return Case(made_sources.data_settings("folder", path=path("photo_folder")))
  if name == "bad_folder":
    settings = made_sources.data_settings("folder", path=path("bad_folder"))
    return Case(settings, num_bad=NUM_BAD)
  if name.endswith("tfds_stream"):
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr(tfds, "FILES_PER_GROUP", 2)
    monkeypatch.setattr(tfds, "SHUFFLE_BUFFER", 5)
  bad = name.startswith("bad")
  data_set = "tfds:tiny_spoiled_photos" if bad else "tfds:tiny_photos"
  return Case(
    made_sources.data_settings(data_set, path=path("tfds_dir")),
    stream=name.endswith("tfds_stream"),
    num_bad=NUM_BAD if bad else 0,
  )


def test_every_source_is_covered():
  parts = {part for case in CASES for part in case.split("_")}
  assert parts >= set(data.SOURCES)


def take(source, steps, **arguments):
  """Batches of the steps in `steps`, a range."""
  settings = {"views": made_sources.views(), "batch_size": BATCH}
  settings |= {"seed": 3, "start_step": steps.start}
  batches = host_pipeline.train_batches(source, **(settings | arguments))
  return [next(batches) for _ in steps]


def assert_same(a, b):
  assert len(a) == len(b)
  for one, other in zip(a, b, strict=True):
    np.testing.assert_array_equal(one["index"], other["index"])
    np.testing.assert_array_equal(one["epoch"], other["epoch"])
    np.testing.assert_array_equal(one.get("bad"), other.get("bad"))
    for x, y in zip(one["views"], other["views"], strict=True):
      np.testing.assert_array_equal(x, y)


def concatenate(batches):
  """One global batch from the processes' parts."""
  return {
    key: np.concatenate([b[key] for b in batches])
    for key in batches[0]
    if key != "views"
  } | {
    "views": tuple(
      np.concatenate(parts)
      for parts in zip(*[b["views"] for b in batches], strict=True)
    ),
  }


def test_epochs_resume_and_processes(case):
  source = data.make_source(case.settings, "train")
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
  if not case.stream:
    if batch == BATCH:
      assert_same(together, whole)
    else:
      assert_same(together, take(source, steps, batch_size=batch))
  else:
    everything = concatenate(together)
    for epoch in (0, 1):
      order = everything["index"][everything["epoch"] == epoch]
      np.testing.assert_array_equal(np.sort(order), range(40))


def check_bad(case, source, everything):
  """The same images are bad in every epoch, and no others."""
  assert ("bad" in everything) == (not source.small_images)
  if "bad" not in everything:
    return
  bad = everything["index"][everything["bad"] & (everything["epoch"] == 0)]
  again = everything["index"][everything["bad"] & (everything["epoch"] == 1)]
  assert len(bad) == case.num_bad
  assert set(bad.tolist()) == set(again.tolist())
  if source.name.startswith("folder"):
    assert set(bad.tolist()) in (set(), set(made_sources.BAD_KEYS))


@pytest.mark.parametrize("processes", [1, 4])
def test_evaluation_sees_each_image_once(case, processes):
  source = data.make_source(case.settings, "train")
  parts = [
    list(
      evaluation_batches.eval_batches(
        source,
        batch_size=12,
        resize=20,
        crop=16,
        process_index=k,
        process_count=processes,
      )
    )
    for k in range(processes)
  ]
  assert len({len(part) for part in parts}) == 1  # All take as many steps.
  batches = [batch for part in parts for batch in part]
  merged = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
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
  if "bad" in case.settings.path:
    assert set(masked_out.tolist()) == set(made_sources.BAD_KEYS)


def test_index_decides_the_views_not_the_batch():
  source = data.make_source(
    made_sources.data_settings("shapes", num_examples=36), "train"
  )
  by_key = {}
  for batch_size in (8, 12):
    everything = concatenate(take(source, range(3), batch_size=batch_size))
    for i, key in enumerate(
      zip(everything["epoch"], everything["index"], strict=True)
    ):
      view = everything["views"][0][i]
      np.testing.assert_array_equal(by_key.setdefault(key, view), view)
  assert len(by_key) == 36

  other_seed = take(source, range(5), seed=4)
  assert (other_seed[0]["index"] != everything["index"][:8]).any()
  everything = concatenate(other_seed)
  for i in range(36):
    key = (everything["epoch"][i], everything["index"][i])
    if key in by_key:
      assert (everything["views"][0][i] != by_key[key]).any()


@pytest.mark.parametrize("size", [16, 70])
def test_local_views(size):
  """Six smaller views beside the global ones, which stay what they were."""
  source = data.make_source(
    made_sources.data_settings("synthetic", num_examples=36, image_size=size),
    "train",
  )
  (batch,) = take(source, range(1), views=made_sources.views(num_local=6))
  assert [v.shape for v in batch["views"]] == [
    (8, 2, 16, 16, 3),
    (8, 6, 8, 8, 3),
  ]
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
  return made_sources.data_settings("folder", path=str(tmp_path))


def test_bad_images_are_replaced_counted_and_named(gray_folder, caplog):
  source = data.make_source(gray_folder, "train")
  batches = host_pipeline.train_batches(
    source, views=made_sources.views(), batch_size=10, seed=0
  )
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


def test_good_images_do_not_change_beside_bad_ones(photo_folder, bad_folder):
  good, bad = (
    concatenate(
      take(
        data.make_source(
          made_sources.data_settings("folder", path=str(path)), "train"
        ),
        range(5),
      )
    )
    for path in (photo_folder, bad_folder)
  )
  np.testing.assert_array_equal(good["index"], bad["index"])
  same = [
    (x == y).all()
    for x, y in zip(
      *[everything["views"][0] for everything in (good, bad)], strict=True
    )
  ]
  changed = set(good["index"][~np.array(same)].tolist())
  assert changed == set(made_sources.BAD_KEYS)


def test_on_bad_image_error_names_the_file(gray_folder):
  gray_folder.on_bad_image = "error"
  source = data.make_source(gray_folder, "train")
  batches = host_pipeline.train_batches(
    source, views=made_sources.views(), batch_size=10, seed=0
  )
  with pytest.raises(UserError, match=r"[348]\.png; repair or remove"):
    next(batches)


def test_nothing_readable_stops_the_run(tmp_path):
  for number in range(3):
    (tmp_path / f"{number}.jpg").write_bytes(b"nothing")
  source = data.make_source(
    made_sources.data_settings("folder", path=str(tmp_path)), "train"
  )
  batches = host_pipeline.train_batches(
    source, views=made_sources.views(), batch_size=4, seed=0
  )
  message = r"Cannot read image .*[012]\.jpg or any of the 3 images from it on"
  with pytest.raises(UserError, match=message):
    next(batches)


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
    make = lambda step: dict(
      zip(
        ("index", "bad", "black"),
        tf.numpy_function(lambda s: batch(s, careful), [step], types),
        strict=True,
      )
    )
    return tf.data.Dataset.range(first, 1000).map(make)

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


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch_size": 6, "process_count": 4}, "batch_size is 6"),
    ({"batch_size": 0}, "batch_size is 0"),
  ],
)
def test_mistakes_in_training(change, message):
  source = data.make_source(
    made_sources.data_settings("synthetic", num_examples=8), "train"
  )
  arguments = {
    "views": made_sources.views(),
    "batch_size": 8,
    "seed": 0,
  } | change
  with pytest.raises(UserError, match=message):
    host_pipeline.train_batches(source, **arguments)


def test_crop_larger_than_resize():
  source = data.make_source(
    made_sources.data_settings("synthetic", num_examples=8), "train"
  )
  with pytest.raises(UserError, match=r"larger than data\.resize"):
    evaluation_batches.eval_batches(source, batch_size=4, resize=16, crop=20)
