"""Where crops fall, and how they are resampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from imsvd_jax.data import boxes, crops

CROP = crops.Crop(224, (0.08, 1.0), (3 / 4, 4 / 3), 0.5)


def sample_boxes(count, height, width, crop=CROP, seed=0):
  rng = np.random.default_rng(seed)
  uniforms = rng.random((count, crops.NUM_UNIFORMS), np.float32)
  box = crops.random_boxes(
    tf.constant(uniforms)[:, None],
    tf.fill([count], float(height)),
    tf.fill([count], float(width)),
    [crop],
  )
  return np.stack([side.numpy()[:, 0] for side in box]).astype(np.float64)


def reference_box(rng, height, width, crop=CROP):
  """Random-resized-crop from its definition: draw until a box fits."""
  for _ in range(10):
    area = height * width * rng.uniform(*crop.scale)
    ratio = math.exp(rng.uniform(*np.log(crop.ratio)))
    w = round(math.sqrt(area * ratio))
    h = round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      top = rng.integers(0, height - h + 1)
      return top, rng.integers(0, width - w + 1), h, w
  low, high = crop.ratio
  w = min(width, round(height * high))
  h = min(height, round(width / low))
  return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 40)])
def test_distribution_of_boxes(height, width):
  """Area, aspect and position against the definition (Kolmogorov-Smirnov)."""
  count = 6000
  rng = np.random.default_rng(1)
  expected = np.array([reference_box(rng, height, width) for _ in range(count)])
  found = sample_boxes(count, height, width)
  assert (found[:2] >= 0).all()
  assert (found[0] + found[2] <= height).all()
  assert (found[1] + found[3] <= width).all()

  def statistics(top, left, h, w):
    return h * w, w / h, top, left, top + h / 2, left + w / 2

  expected = statistics(*expected.T.astype(np.float64))
  for one, other in zip(statistics(*found[:4]), expected, strict=True):
    assert stats.ks_2samp(one, other).pvalue > 0.001
  assert abs(found[4].mean() - 0.5) < 0.03


@pytest.mark.parametrize(
  ("height", "width", "box"),
  [
    (10, 1000, (0, 493, 10, 13)),  # Too wide: 13 = round(10 * 4 / 3).
    (1000, 10, (493, 0, 13, 10)),
  ],
)
def test_no_box_fits(height, width, box):
  """The largest allowed box in the centre."""
  found = sample_boxes(50, height, width)
  np.testing.assert_array_equal(found[:4].T, np.tile(box, (50, 1)))


def test_views_have_their_own_limits():
  """Boxes of several views at once are those of each alone."""
  local = crops.Crop(96, (0.05, 0.2), (1.0, 1.0), 1.0)
  uniforms = np.random.default_rng(0).random(
    (50, 2, crops.NUM_UNIFORMS), np.float32
  )
  sides = tf.fill([50], 375.0), tf.fill([50], 500.0)
  both = crops.random_boxes(tf.constant(uniforms), *sides, [CROP, local])
  for number, crop in enumerate((CROP, local)):
    alone = crops.random_boxes(
      tf.constant(uniforms[:, number : number + 1]), *sides, [crop]
    )
    for a, b in zip(both, alone, strict=True):
      np.testing.assert_array_equal(a[:, number], b[:, 0])
  np.testing.assert_array_equal(both.height[:, 1], both.width[:, 1])
  area = both.height[:, 1] * both.width[:, 1] / (375 * 500)
  assert area.numpy().min() > 0.045
  assert area.numpy().max() < 0.21
  assert both.flip.numpy()[:, 1].all()


@pytest.mark.parametrize(("height", "width"), [(28, 28), (60, 40), (9, 300)])
def test_boxes_of_arrays_are_those_of_records(height, width):
  """The same numbers in NumPy, to the last bit."""
  uniforms = np.random.default_rng(0).random(
    (3000, 2, crops.NUM_UNIFORMS), np.float32
  )
  view_list = [CROP, crops.Crop(96, (0.05, 0.2), (1.0, 1.0), 1.0)]
  sides = tf.fill([3000], float(height)), tf.fill([3000], float(width))
  expected = crops.random_boxes(tf.constant(uniforms), *sides, view_list)
  found = boxes.random_boxes(uniforms, height, width, view_list)
  for number, side in enumerate(expected):
    np.testing.assert_array_equal(found[..., number], side)


def test_whole_image():
  crop = crops.Crop(16, (1.0, 1.0), (1.0, 1.0), 0.0)
  found = sample_boxes(50, 20, 20, crop)
  np.testing.assert_array_equal(found.T, np.tile((0, 0, 20, 20, 0), (50, 1)))


def test_to_uint8_rounds_and_clips():
  levels = np.linspace(-40.3, 300.7, 4001, dtype=np.float32)
  expected = np.clip(np.floor(levels + 0.5), 0, 255)
  np.testing.assert_array_equal(crops.to_uint8(levels), expected)
  exact = np.arange(256, dtype=np.float32)
  np.testing.assert_array_equal(crops.to_uint8(exact), exact)
  halves = np.array([0.5, 1.5, 254.5, 255.5], np.float32)  # Up, as PIL.
  np.testing.assert_array_equal(crops.to_uint8(halves), [1, 2, 255, 255])
