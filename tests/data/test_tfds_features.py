"""What a TFDS data set declares of images and labels, and what it becomes."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_datasets import features
from tensorflow_datasets.core import registered

from imsvd_jax.base.errors import UserError
from imsvd_jax.data.sources import tfds
from tests.data import made_sources
from tests.data.made_sources import make

COUNT = 6
RNG = np.random.default_rng(0)
FLOATS = RNG.uniform(-1, 1, (COUNT, 12, 10, 3)).astype(np.float32)
DEEP = RNG.integers(0, 4096, (COUNT, 12, 10, 1)).astype(np.uint16)
BYTES = RNG.integers(0, 256, (COUNT, 12, 10, 3), np.uint8)


def prepared(path, **columns):
  """A data set of these features and their values, in order of the key."""

  with registered.skip_registration():  # Each test has another.

    class TinyFeatures(made_sources.TinyPhotos):
      """Made for one test."""

      FEATURES = features.FeaturesDict(
        {name: feature for name, (feature, _) in columns.items()}
      )

      def _split_generators(self, dl_manager):
        return {"train": self._examples(COUNT), "test": self._examples(3)}

      def _examples(self, count):
        for i in range(count):
          yield i, {name: values[i] for name, (_, values) in columns.items()}

  TinyFeatures(data_dir=path).download_and_prepare()
  return lambda split="train", **settings: make(
    "tfds:tiny_features", split, path=path, **settings
  )


IMAGE = (features.Image(shape=(12, 10, 3)), BYTES)
FLOAT_IMAGE = (
  features.Image(shape=(12, 10, 1), dtype=np.float32), FLOATS[..., :1],
)  # fmt: skip
DEEP_IMAGE = (features.Image(shape=(12, 10, 1), dtype=np.uint16), DEEP)


def pixels_of(source):
  read = tf.autograph.experimental.do_not_convert(source.fetch)
  images = tf.data.Dataset.range(COUNT).map(read)
  return np.stack(list(images.as_numpy_iterator()))


def sorted_images(images):
  return np.stack(sorted(images, key=lambda image: image.tobytes()))


def check(source, numbers, low, high):
  levels = np.float32((numbers.astype(np.float64) - low) / (high - low) * 255)
  np.testing.assert_allclose(
    np.sort(pixels_of(source).ravel()), np.sort(levels.ravel()), atol=1e-3
  )
  batch = next(made_sources.train_batches(source, 3))
  assert batch["views"][0].dtype == np.float32
  found = made_sources.evaluated(source, batch_size=3, resize=10, crop=10)
  assert found["image"].dtype == np.float32


@pytest.mark.parametrize(
  ("column", "channels", "value_range", "limits"),
  [
    (FLOAT_IMAGE, 1, "-1,1", (-1, 1)),
    (DEEP_IMAGE, 1, "0,4095", (0, 4095)),
    (DEEP_IMAGE, 1, "auto", (0, 65535)),
    (
      (features.Tensor(shape=(12, 10, 3), dtype=np.float32), FLOATS),
      3, (-1, 1), (-1, 1),
    ),
    (
      (
        features.Tensor(
          shape=(12, 10, 3), dtype=np.float32, minimum=-1, maximum=1
        ),
        FLOATS,
      ),
      3, "auto", (-1, 1),
    ),
  ],
)  # fmt: skip
def test_numbers_that_are_not_8_bits(
  tmp_path, column, channels, value_range, limits
):
  """TensorFlow stores the bytes of a float image as a PNG of four channels."""
  of = prepared(tmp_path, image=column)
  source = of(channels=channels, value_range=value_range)
  check(source, column[1], *limits)
  assert (
    f"scaled from {limits[0]:g} (black) to {limits[1]:g}" in source.summary()
  )
  with pytest.raises(UserError, match=r"not plain 8-bit .*data\.value_range"):
    of(channels=channels)


def test_floats_have_no_range_of_their_own(tmp_path):
  of = prepared(tmp_path, image=FLOAT_IMAGE)
  with pytest.raises(UserError, match="float32, which has no range of its own"):
    of(value_range="auto", channels=1)


def test_two_images_need_a_key(tmp_path):
  of = prepared(tmp_path, left=IMAGE, right=IMAGE)
  with pytest.raises(
    UserError, match=r"2 features .*left, right; set data\.im"
  ):
    of()
  source = of(image_key="right")
  np.testing.assert_array_equal(
    sorted_images(source.images), sorted_images(BYTES)
  )
  with pytest.raises(UserError, match=r"'top'; .* expected one of left, right"):
    of(image_key="top")


@pytest.mark.parametrize(
  ("feature", "values", "names"),
  [
    (features.Scalar(np.int64), [3, 7, 3, 12, 7, 3], ("3", "7", "12")),
    (features.Text(), ["b", "é", "a", "b", "a", "b"], ("a", "b", "é")),
    (features.Tensor(shape=(1,), dtype=np.int32), [[0], [1]] * 3, ("0", "1")),
  ],
)
def test_values_of_integers_and_text_are_classes(
  tmp_path, feature, values, names, monkeypatch
):
  """MedMNIST has them; also where test lacks a class."""
  of = prepared(tmp_path, image=IMAGE, label=(feature, values))
  source = of()
  assert source.label_names == names
  as_text = [str(v[0] if isinstance(v, list) else v) for v in values]
  expected = sorted(names.index(text) for text in as_text)
  assert sorted(source.labels) == expected
  test = of("eval")
  assert test.label_names == names
  assert sorted(test.labels) == sorted(names.index(t) for t in as_text[:3])
  assert of(label_key="none").num_classes == 0
  monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
  with pytest.raises(UserError, match=r"'label' .* is not a ClassLabel"):
    of()


def test_labels_have_a_key(tmp_path):
  coarse = (features.ClassLabel(names=["x", "y"]), [0, 1] * 3)
  fine = (features.ClassLabel(names=["p", "q", "r"]), [0, 1, 2] * 2)
  of = prepared(tmp_path, image=IMAGE, coarse=coarse, fine=fine)
  assert of(label_key="fine").label_names == ("p", "q", "r")
  unlabeled = of()
  assert unlabeled.num_classes == 0
  said = "unlabeled: it has 2 labels (coarse, fine); set data.label_key"
  assert said in unlabeled.summary()
