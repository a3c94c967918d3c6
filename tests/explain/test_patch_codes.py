"""Codes of patches, and their overlap with masks of objects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
from imsvd_jax.data.sources import shapes
from imsvd_jax.explain import patch_codes
from imsvd_jax.explain.subject import Encoding, Subject


def make_subject():
  """Two variables of three bins; the first is the darkness of a patch."""

  def codes(variables, images):
    n, height, width, _ = images.shape
    cells = images.reshape(n, 2, height // 2, 2, width // 2).mean((2, 4))
    level = jnp.clip(cells * 3 / 256, 0, 2).astype(int) + variables
    return jnp.stack([level, jnp.zeros_like(level)], -1)

  return Subject(
    encode=lambda v, x: Encoding(x[:, 0, 0]),
    patch_codes=codes,
    variables=np.int32(0),
  )


def test_members_are_the_patches_of_a_bin():
  images = np.zeros((2, 4, 4, 1), np.uint8)
  images[0, :2, 2:] = 255
  found = patch_codes.make_members(make_subject())(
    np.int32(0),
    images,
    np.array([0, 1, 0]),
    np.array([0, 1, 1]),
    np.array([2, 0, 0]),
  )
  bright, dark = [[0, 1], [0, 0]], np.ones((2, 2))
  np.testing.assert_array_equal(found[:2], [bright, dark])
  codes = make_subject().patch_codes(np.int32(0), images)
  np.testing.assert_array_equal(found[2], codes[0, ..., 1] == 0)


def test_overlap_is_that_of_upsampled_codes():
  """Pixel by pixel, where patches do not divide the image."""
  rng = np.random.default_rng(0)
  bins = rng.integers(0, 3, (4, 3, 2, 5))
  objects = rng.integers(0, 2, (4, 10, 7))
  inside, areas = patch_codes.pixels_in_patches(objects, (3, 2))
  found = patch_codes.overlaps(
    jnp.array(bins), jnp.array(inside), jnp.array(areas), 3
  )
  rows = np.floor((np.arange(10) + 0.5) * 3 / 10).astype(int)
  columns = np.floor((np.arange(7) + 0.5) * 2 / 7).astype(int)
  large = bins[:, rows][:, :, columns]  # [4, 10, 7, 5]
  for m, d in ((0, 0), (3, 2), (4, 1)):
    covered = large[..., m] == d
    both = (covered & (objects == 1)).sum((1, 2))
    either = (covered | (objects == 1)).sum((1, 2))
    np.testing.assert_allclose(found[:, m, d], both / either, rtol=1e-6)
  ends = patch_codes.limits(inside, areas)
  np.testing.assert_allclose(ends[:, 0], objects.mean((1, 2)), rtol=1e-6)
  every = [
    inside[0][c].sum() / (areas[c].sum() + inside[0].sum() - inside[0][c].sum())
    for c in (
      np.array([k >> i & 1 for i in range(6)], bool) for k in range(1, 64)
    )
  ]
  assert ends[0, 1] == pytest.approx(max(every), rel=1e-6)


@pytest.mark.parametrize("count", [1, 8])
def test_the_best_bin_is_chosen_on_one_half_and_measured_on_the_other(count):
  images = np.zeros((6, 4, 4, 1), np.uint8)
  images[:, :2, :2] = 255
  objects = images.copy()
  objects[1::2, :2] = 255  # The second half: twice as large.
  batches = [
    {"image": x, "object": o, "index": i}
    for x, o, i in zip(
      np.split(images, 2),
      np.split(objects, 2),
      np.split(np.arange(6), 2),
      strict=True,
    )
  ]
  found = patch_codes.measure(
    make_subject(),
    batches,
    (2, 3),
    count=6,
    mesh=devices.make_mesh(jax.devices()[:count]),
    what="patches",
  )
  assert patch_codes.best(found.patch_iou) == (0, 2, pytest.approx(0.5))
  np.testing.assert_allclose(found.patch_limits, [[0.25, 1], [0.5, 1]])
  (_, line) = patch_codes.lines(found)
  assert line == (
    "  v0, bin 2  0.50  (all patches 0.50, the best choice of them 1.00)"
  )


def test_masks_are_where_the_shapes_are():
  factors = shapes.draw_factors(48, 3)
  factors[:, 1] = shapes.TEXTURES.index("solid")
  masks = shapes.masks_of(factors, 24, 3) / 255
  front, back = factors[:, None, None, 2:5], factors[:, None, None, 5:8]
  drawn = shapes.render(factors, 24, 3)
  np.testing.assert_allclose(
    drawn, (masks * front + (1 - masks) * back) * 255, atol=1.1
  )
  factors[:, 1] = shapes.TEXTURES.index("dots")  # Holes are of the object.
  np.testing.assert_array_equal(shapes.masks_of(factors, 24, 3) / 255, masks)
