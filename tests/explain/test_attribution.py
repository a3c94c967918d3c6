import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices as devices_lib
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import attribution
from imsvd_jax.explain.subject import Encoding, Subject
from tests.explain import shapes_subject

# A linear network small enough for a sheet of paper: a 1x1 convolution from
# one color to K = 2 maps, the mean over positions, and a dense layer to one
# variable of b = 2 bins.
CONVOLUTION = np.array([2.0, -1.0], np.float32)
ROWS = np.arange(3)
DENSE = np.array([[0.5, -0.5], [3.0, 1.5]], np.float32)  # [K, b]


def linear_subject(scale=1.0):
  def maps(variables, images):
    return images.astype(jnp.float32) / 255 * variables["convolution"]

  def log_q(variables, maps):
    logits = maps.mean((1, 2)) @ variables["dense"] * scale
    return jax.nn.log_softmax(logits)[:, None]

  return Subject(
    encode=lambda v, x: Encoding(
      maps(v, x).mean((1, 2)), jnp.exp(log_q(v, maps(v, x)))
    ),
    feature_maps=maps,
    bin_log_probabilities=log_q,
    variables={"convolution": CONVOLUTION, "dense": DENSE},
  )


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (3, 4, 5, 1)).astype(np.uint8)


def by_hand(images, bins, scale=1.0):
  """With two bins the log-odds are the difference of the logits, so
  ds/dA_k = (W[k, d] - W[k, 1 - d]) / (h w) at every position, and the map is
  relu(sum_k ds/dA_k A_k), as the mean over positions changes nothing."""
  maps = images.astype(np.float64) / 255 * CONVOLUTION
  slope = (DENSE[:, bins] - DENSE[:, 1 - bins]).T / 20 * scale  # [n, K]
  return np.maximum((maps * slope[:, None, None]).sum(-1), 0)


@pytest.mark.parametrize("devices", [1, 8])
def test_grad_cam_by_hand(images, devices):
  subject = linear_subject()
  rows, bins = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 0, 0, 1])
  found = attribution.attribute(
    attribution.make_grad_cam(subject),
    subject,
    images,
    np.stack([rows, np.zeros(5, int), bins], axis=1),
    room=(8, 16),  # Padded.
    mesh=devices_lib.make_mesh(jax.devices()[:devices]),
  )
  expected = by_hand(images[rows], bins)
  assert expected.max() > 0
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


def test_grad_cam_does_not_vanish_where_the_bin_is_certain(images):
  # Logits a thousand times larger: q is one-hot in float32, and the gradient
  # of log q is zero for the winning bin.
  subject = linear_subject(1000.0)
  q = np.asarray(subject.encode(subject.variables, images).probabilities)
  assert q.max() == 1.0
  bins = q[:, 0].argmax(-1)
  found = attribution.make_grad_cam(subject)(
    subject.variables, images, ROWS, np.zeros(3, int), bins
  )
  np.testing.assert_allclose(
    found, by_hand(images, bins, 1000.0), rtol=1e-4, atol=1e-4
  )


def test_integrated_gradients_by_hand(images):
  # Linear in the pixels, so a = (x - mean x) * slope exactly.
  subject = linear_subject()
  bins = np.array([0, 1, 1])
  found = attribution.make_integrated_gradients(subject, steps=3)(
    subject.variables, images, ROWS, np.zeros(3, int), bins
  )
  slope = CONVOLUTION @ (DENSE[:, bins] - DENSE[:, 1 - bins]) / 20 / 255
  x = images[..., 0].astype(np.float64)
  centered = x - x.mean((1, 2), keepdims=True)
  expected = centered * slope[:, None, None]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_integrated_gradients_are_complete(images):
  linear = linear_subject(20.0)
  subject = dataclasses.replace(
    linear, feature_maps=lambda v, x: jnp.tanh(3 * linear.feature_maps(v, x))
  )
  variables, bins = np.zeros(3, int), np.array([0, 1, 0])
  maps = attribution.make_integrated_gradients(subject, steps=64)(
    subject.variables, images, ROWS, variables, bins
  )

  def score(x):
    maps = subject.feature_maps(subject.variables, x)
    log_q = subject.bin_log_probabilities(subject.variables, maps)
    return np.asarray(attribution.log_odds(log_q, variables, bins))

  x = images.astype(np.float32)
  flat = np.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)
  difference = score(x) - score(flat)
  assert np.abs(difference).max() > 0.5
  np.testing.assert_allclose(
    np.asarray(maps).sum((1, 2)), difference, rtol=1e-3, atol=1e-3
  )


def test_log_odds():
  q = np.array([[[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]], np.float32)
  found = attribution.log_odds(np.log(q), np.array([1]), np.array([2]))
  np.testing.assert_allclose(found, [np.log(0.8 / 0.2)], rtol=1e-5)


def test_overlay_leaves_unattributed_pixels_alone():
  images = np.full((1, 8, 8, 3), 90, np.uint8)
  maps = np.zeros((1, 8, 8), np.float32)
  maps[0, 2, 3] = 5
  colormap = np.full((256, 3), 255, np.uint8)
  found = attribution.overlay(images, maps, colormap=colormap, strength=0.5)
  changed = (found != 90).any(-1)
  assert changed[0, 2, 3]
  assert changed.sum() == 1
  assert found[0, 2, 3, 0] == 172  # Halfway from 90 to 255, rounded to even.
  empty = attribution.overlay(images, maps * 0, colormap=colormap)
  np.testing.assert_array_equal(empty, images)


@pytest.mark.parametrize(
  "make", [attribution.make_grad_cam, attribution.make_integrated_gradients]
)
def test_needs_feature_maps(make):
  with pytest.raises(UserError, match="feature maps"):
    make(shapes_subject.make_continuous_subject())
