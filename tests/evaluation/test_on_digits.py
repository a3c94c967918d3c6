"""The evaluators on real images through the real pipeline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from imsvd_jax import data
from imsvd_jax.base import hashing
from imsvd_jax.data import crops, evaluation_batches, host_pipeline
from imsvd_jax.evaluation import features, knn, linear, protocols


@pytest.fixture(scope="module")
def config():
  return digits.get_config()


@pytest.fixture(scope="module")
def sources(config):
  return [data.make_source(config.data, split) for split in ("train", "eval")]


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
      num_images=source.num_examples,
    )
    for source in sources
  ]


def test_every_image_once_with_its_label(sources, parts):
  for source, part in zip(sources, parts, strict=True):
    np.testing.assert_array_equal(part.labels, source.labels)
    np.testing.assert_array_equal(part.indices, np.arange(len(source.labels)))
  assert [len(part.labels) for part in parts] == [1437, 360]


def test_raw_pixels_have_the_known_accuracy(parts):
  train, test = parts
  found = knn.knn_accuracy(
    train.features,
    train.labels,
    test.features,
    test.labels,
    num_neighbors=(20,),
    temperatures=(0.07,),
  )
  assert found[20, 0.07].top1 == pytest.approx(0.967, abs=0.02)


def test_linear_protocol_on_crops_of_a_frozen_backbone(config, sources, parts):
  _, test = parts
  weights = np.random.default_rng(0).normal(size=(768, 64)) / 8
  backbone = {"kernel": jnp.asarray(weights, jnp.float32)}
  before = hashing.checksum(backbone)
  embed = jax.jit(
    lambda images: jnp.maximum(pixels(images) @ backbone["kernel"], 0)
  )
  view = config.views.view1
  train_epoch = host_pipeline.labeled_epochs(
    sources[0],
    crop=crops.Crop(view.size, view.crop_scale, view.crop_ratio, 0.0),
    batch_size=128,
    seed=0,
  )
  protocol = dataclasses.replace(
    protocols.PROTOCOLS["linear/imsvd"], learning_rate=0.3, epochs=3
  )
  test_features = np.asarray(jnp.maximum(test.features @ weights, 0))
  result = linear.train_linear(
    embed,
    train_epoch,
    test._replace(features=test_features),
    protocol,
    num_classes=10,
  )
  assert result.accuracy.top1 > 0.6  # chance is 0.1
  assert result.train_loss[-1] < result.train_loss[0] < np.log(10) + 0.5
  assert hashing.checksum(backbone) == before
