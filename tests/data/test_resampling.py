"""Pixels of crops of images in memory, against PIL's."""

import jax
import numpy as np
import pytest
from PIL import Image

from imsvd_jax.data import boxes, resampling
from tests.data import made_sources


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [12, 24, 40])
def test_resample_equals_pil(kernel, size):
  """Cut, then resize with PIL: larger, smaller, and with flips."""
  places = [(0, 0, 24, 32), (3, 5, 20, 9), (10, 30, 1, 2), (4, 0, 17, 31)]
  flip = [False, True, False, True]
  photographs = [made_sources.photograph(i, 32, 24) for i in range(4)]
  images = np.stack([made_sources.pale(photo) for photo in photographs])
  drawn = np.array([(*p, f) for p, f in zip(places, flip, strict=True)])
  out = resampling.resample(
    images, drawn.astype(np.float32), size, kernel, clip_to_box=True
  )
  assert out.dtype == np.uint8
  method = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[kernel]
  for i, (top, left, height, width) in enumerate(places):
    part = Image.fromarray(images[i]).crop(
      (left, top, left + width, top + height)
    )
    expected = np.asarray(part.resize((size, size), method), np.int32)
    if flip[i]:
      expected = expected[:, ::-1]
    # PIL rounds to whole levels between its two passes.
    assert np.abs(np.int32(out[i]) - expected).max() <= 1


@pytest.mark.parametrize(
  ("height", "width", "resize", "crop"),
  [(24, 32, 20, 16), (32, 24, 20, 20), (24, 24, 28, 24), (33, 47, 16, 16)],
)
def test_centre_equals_resize_then_crop(height, width, resize, crop):
  image = made_sources.pale(made_sources.photograph(0, width, height))
  box = boxes.center_box(height, width, resize, crop)[None]
  out = resampling.resample(
    np.asarray(image)[None], box, crop, "bicubic", clip_to_box=False
  )[0]
  # The shorter side exactly, the longer rounded down; centre rounded to even.
  shorter = min(height, width)
  h, w = resize * height // shorter, resize * width // shorter
  top, left = round((h - crop) / 2), round((w - crop) / 2)
  expected = image.resize((w, h), Image.BICUBIC)
  expected = expected.crop((left, top, left + crop, top + crop))
  difference = np.int32(out) - np.asarray(expected, np.int32)
  assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("side", [16, 28, 70])
def test_a_view_does_not_depend_on_the_batch(side):
  """To the last bit: devices and processes share batches out."""
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (24, side, side, 3), np.uint8)
  view_list = [boxes.Crop(20, (0.1, 1.0), (3 / 4, 4 / 3), 0.5)] * 2
  uniforms = rng.random((24, 2, boxes.NUM_UNIFORMS), np.float32)
  drawn = boxes.random_boxes(uniforms, side, side, view_list)
  cut = jax.jit(lambda *x: resampling.cut_views(*x, (20, 20), "bicubic")[0])
  whole = np.asarray(cut(images, drawn))
  for size in (1, 2, 8):
    parts = [
      cut(images[i : i + size], drawn[i : i + size])
      for i in range(0, len(images), size)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
