"""Parts, labels and labelled crops, however a source keeps its records."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import crops, evaluation_batches, host_pipeline, part
from imsvd_jax.data.sources import tfds as tfds_source
from tests.data import made_sources

CROP = crops.Crop(size=8, scale=(0.5, 1.0), ratio=(1.0, 1.0), flip_prob=0.0)
CHOSEN = np.array([1, 2, 3, 5, 8, 13, 21, 34])


class TinySeveral(made_sources.TinyPhotos):
  """Images with several classes each, some of which do not count."""

  CLASSES = tfds.features.Sequence(
    tfds.features.ClassLabel(names=["a", "b", "c"])
  )
  FEATURES = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "labels": CLASSES,
      "labels_no_difficult": CLASSES,
    }
  )
  LABELS = ([0, 2, 2], [], [1], [2, 1, 0])
  COUNTED = ([0], [], [1], [2, 0])

  def _examples(self, count):
    for i, (labels, counted) in enumerate(
      zip(self.LABELS, self.COUNTED, strict=True)
    ):
      image = np.full((12, 10, 3), 50 * i, np.uint8)
      example = {"labels": labels, "labels_no_difficult": counted}
      yield i, {"image": image, **example}


@pytest.fixture(params=["arrays", "files", "records", "stream"])
def source(request, photo_folder, tfds_dir, monkeypatch):
  """The ways in which a source keeps its records."""
  if request.param == "arrays":
    return made_sources.make("digits")
  if request.param == "files":
    return made_sources.make("folder", path=photo_folder)
  if request.param == "stream":
    monkeypatch.setattr(tfds_source, "MAX_BYTES_IN_MEMORY", 0)
  made = made_sources.make("tfds:tiny_photos", path=tfds_dir)
  assert (made.stream is not None) == (request.param == "stream")
  return made


def everything(source):
  return made_sources.evaluated(source, batch_size=16, resize=8, crop=8)


def test_a_part_holds_the_chosen_images_and_labels(source):
  whole, some = everything(source), everything(part.take(source, CHOSEN))
  np.testing.assert_array_equal(some["index"], np.arange(len(CHOSEN)))
  for name in ("image", "label"):
    np.testing.assert_array_equal(some[name], whole[name][CHOSEN])
  np.testing.assert_array_equal(part.labels_of(source), whole["label"])


def test_a_part_has_a_fingerprint_of_its_own(source):
  marks = {
    source.fingerprint(),
    part.take(source, CHOSEN).fingerprint(),
    part.take(source, CHOSEN[:-1]).fingerprint(),
  }
  assert len(marks) == 3
  again = part.take(source, CHOSEN).fingerprint()
  assert again == part.take(source, CHOSEN).fingerprint()


def test_a_replaced_file_changes_the_fingerprint(tmp_path):
  pngs = [
    made_sources.encode(made_sources.photograph(i), "PNG") for i in range(2)
  ]
  for name in ("a", "b"):
    (tmp_path / f"{name}.png").write_bytes(pngs[0])
  fingerprint = lambda: made_sources.make("folder", path=tmp_path).fingerprint()
  before = fingerprint()
  assert fingerprint() == before
  (tmp_path / "a.png").write_bytes(pngs[1])
  assert fingerprint() != before


def test_epochs_show_every_image_once_with_its_label(source):
  labels = part.labels_of(source)
  size = len(labels)
  settings = dict(crop=CROP, batch_size=16, seed=3, process_count=2)
  epochs = [
    host_pipeline.labeled_epochs(source, process_index=index, **settings)
    for index in range(2)
  ]
  rows = []
  for epoch in range(2):
    halves = [list(epoch_of(epoch)) for epoch_of in epochs]
    ends = [round(e * size / 16) for e in (epoch, epoch + 1)]
    assert [len(half) for half in halves] == [ends[1] - ends[0]] * 2
    rows += [batch for half in halves for batch in half]
  shown = made_sources.concatenate(rows)
  np.testing.assert_array_equal(shown["label"], labels[shown["index"]])
  assert all(batch["image"].shape == (8, 8, 8, 3) for batch in rows)
  assert shown["mask"].all()
  # Two epochs, but for the rounding of the last batch.
  counts = np.bincount(shown["index"], minlength=size)
  assert counts.sum() == 16 * round(2 * size / 16)
  assert counts.min() >= 1
  assert counts.max() <= 3


def test_an_epoch_of_less_than_half_a_batch_has_a_batch(source):
  few = part.take(source, np.arange(5))
  epoch_of = host_pipeline.labeled_epochs(few, crop=CROP, batch_size=16, seed=3)
  for epoch in range(3):
    (batch,) = epoch_of(epoch)
    assert set(batch["index"]) == set(range(5))


def test_an_unreadable_image_teaches_nothing(bad_folder):
  source = made_sources.make("folder", path=bad_folder)
  epoch_of = host_pipeline.labeled_epochs(
    source, crop=CROP, batch_size=20, seed=0
  )
  assert sum(int((~batch["mask"]).sum()) for batch in epoch_of(0)) == 6


@pytest.mark.parametrize("limit", [1 << 30, 0], ids=["memory", "stream"])
def test_several_labels_per_image(tmp_path, monkeypatch, limit):
  TinySeveral(data_dir=tmp_path).download_and_prepare()
  monkeypatch.setattr(tfds_source, "MAX_BYTES_IN_MEMORY", limit)
  source = made_sources.make("tfds:tiny_several", path=tmp_path)
  assert source.multi_label
  assert source.num_classes == 3
  assert source.label_names == ("a", "b", "c")
  rows = everything(source)
  number = rows["image"][:, 4, 4, 0].astype(int) // 49  # Which example it is.
  expected = np.array([[1, 0, -1], [0, 0, 0], [0, 1, 0], [1, -1, 1]])
  np.testing.assert_array_equal(rows["label"], expected[number])
  np.testing.assert_array_equal(part.labels_of(source), rows["label"])
  (padded,) = evaluation_batches.eval_batches(
    source, batch_size=6, resize=8, crop=8
  )
  np.testing.assert_array_equal(padded["label"][4:], np.full((2, 3), -1))


def test_labels_of_unlabelled_images_are_asked_for(photo_folder):
  source = made_sources.make("folder", path=photo_folder / "even")
  with pytest.raises(UserError, match="has no labels"):
    part.labels_of(source)
