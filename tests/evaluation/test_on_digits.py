"""The evaluators on real images through the real pipeline."""

import numpy as np
import pytest

from configs import digits
from imsvd_jax import data
from imsvd_jax.data import evaluation_batches
from imsvd_jax.evaluation import features, knn, protocols


@pytest.fixture(scope="module")
def sources():
  settings = digits.get_config().data
  return [data.make_source(settings, split) for split in ("train", "eval")]


def pixels(images):
  return images.reshape(len(images), -1) / np.float32(255)


@pytest.fixture(scope="module")
def parts(sources):
  """Raw pixels of both splits, in batches that do not divide them."""
  return [
    features.extract(
      pixels,
      evaluation_batches.eval_batches(
        source, batch_size=100, resize=16, crop=16
      ),
    )
    for source in sources
  ]


def test_every_image_once_with_its_label(sources, parts):
  for source, part in zip(sources, parts, strict=True):
    np.testing.assert_array_equal(part.labels, source.labels)
    np.testing.assert_array_equal(part.features, pixels(source.images))
  assert [len(part.labels) for part in parts] == [1437, 360]


def test_raw_pixels_have_the_known_accuracy(parts):
  (ranks,) = knn.knn_ranks(*parts, protocols.Knn((20,), (0.07,))).values()
  assert (ranks == 0).mean() == pytest.approx(0.967, abs=0.02)
