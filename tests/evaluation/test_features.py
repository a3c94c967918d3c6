"""Every image is counted once, whatever the batches and devices are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import features

NUM_IMAGES = 37


@pytest.fixture(scope="module")
def images():
  """Images that differ, so that a swap or a double is seen."""
  values = np.arange(NUM_IMAGES)[:, None, None, None]
  return np.broadcast_to(values, (NUM_IMAGES, 2, 2, 3)).astype(np.uint8)


def padded_batches(images, batch_size, *, labels=True):
  """Batches as the pipeline gives them: padded, in the source's own order."""
  order = np.random.default_rng(0).permutation(len(images))
  for start in range(0, len(order), batch_size):
    index = order[start : start + batch_size]
    padding = batch_size - len(index)
    batch = {
      # Padding repeats a real image: the mask alone may tell.
      "image": np.concatenate(
        [images[index], np.repeat(images[:1], padding, 0)]
      ),
      "index": np.pad(index, (0, padding)).astype(np.int32),
      "mask": np.arange(batch_size) < len(index),
    }
    if labels:
      batch["label"] = np.pad(index % 5, (0, padding)).astype(np.int32)
    yield batch


def embedder(num_devices):
  mesh = devices.make_mesh(jax.devices()[:num_devices])

  @jax.jit
  def embed(images):
    mean = images.astype(jnp.float32).mean(axis=(1, 2))
    return mean * jnp.array([1.0, 2.0, 3.0])

  return lambda images: embed(devices.shard_batch(images, mesh))


@pytest.mark.parametrize(
  ("batch_size", "num_devices"), [(1, 1), (5, 1), (64, 1), (8, 8), (40, 8)]
)
def test_each_image_once(images, batch_size, num_devices):
  found = features.extract(
    embedder(num_devices),
    padded_batches(images, batch_size),
  )
  expected = np.arange(NUM_IMAGES)[:, None] * np.array([1, 2, 3])
  np.testing.assert_array_equal(found.features, expected)
  np.testing.assert_array_equal(found.labels, np.arange(NUM_IMAGES) % 5)
  assert found.features.dtype == np.float32
  assert found.labels.dtype == np.int32


def test_no_labels_is_none(images, capsys):
  batches = padded_batches(images, 8, labels=False)
  assert features.extract(lambda x: x[:, 0, 0], batches).labels is None
  assert capsys.readouterr().err == ""  # Short work tells no progress.


def test_several_labels_per_image(images):
  batches = [
    {**b, "label": np.stack([b["label"], 1 - b["label"]], axis=1)}
    for b in padded_batches(images, 8)
  ]
  labels = features.extract(lambda x: x[:, 0, 0], batches).labels
  np.testing.assert_array_equal(labels[:, 0], np.arange(NUM_IMAGES) % 5)
  assert labels.shape == (NUM_IMAGES, 2)


def test_an_image_that_comes_twice_is_refused(images):
  batches = [*padded_batches(images, 8), *padded_batches(images, 8)]
  with pytest.raises(UserError, match=r"image 0 more than once \(37 repeats\)"):
    features.extract(lambda x: x[:, 0, 0], batches, name="train")


def test_no_images_are_refused():
  with pytest.raises(UserError, match="No images in test"):
    features.extract(lambda x: x, [], name="test")
