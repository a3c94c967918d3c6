"""Where views are cut: torchvision's boxes, of images of one size, in NumPy.

`crops` has the same for TensorFlow's graphs, where every image has a size of
its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict

TRIES = 10  # torchvision's, before it falls back to a center crop.
NUM_UNIFORMS = 2 * TRIES + 3  # Area and aspect of each try; top, left, flip.

T = TypeVar("T")


class Crop(NamedTuple):
  """The crop and flip of one view.

  Attributes:
    size: Height and width of the result.
    scale: Smallest and largest area of the box, as fractions of the image's.
    ratio: Smallest and largest width / height of the box.
    flip_prob: Probability of a horizontal flip.
  """

  size: int
  scale: tuple[float, float]
  ratio: tuple[float, float]
  flip_prob: float


class Box(NamedTuple):
  """Boxes in pixels: float32 arrays or tensors of one shape; flip is bool."""

  top: Any
  left: Any
  height: Any
  width: Any
  flip: Any


def view_crops(views: ConfigDict) -> list[Crop]:
  """Returns the crop of each view: two global ones, then the local ones."""
  return [
    Crop(v.size, tuple(v.crop_scale), tuple(v.crop_ratio), v.flip_prob)
    for v in [views.view1, views.view2] + [views.local] * views.num_local
  ]


def by_size(views: Sequence[T]) -> list[Sequence[T]]:
  """Splits views by their size: the two global ones and, if any, local ones."""
  return [views[:2], views[2:]] if len(views) > 2 else [views]


def limits(pairs: Iterable[tuple[float, float]]) -> np.ndarray:
  """Returns the lower and upper limits of V views, float32 [2, V, 1]."""
  return np.array(list(pairs), np.float32).T[..., np.newaxis]


def random_boxes(
  uniforms: np.ndarray, height: Any, width: Any, view_list: Sequence[Crop]
) -> np.ndarray:
  """Returns torchvision's random-resized-crop boxes, in whole pixels.

  Args:
    uniforms: float32 [..., V, NUM_UNIFORMS] in [0, 1).
    height: Height of the images: one number, or of each image [...].
    width: Width of the images, likewise.
    view_list: The crops of V views.

  Returns:
    float32 [..., V, 5]: the parts of a `Box`; flip is 1 or 0.
  """
  scale = limits(crop.scale for crop in view_list)  # two of [V, 1]
  ratio = limits(crop.ratio for crop in view_list)
  height, width = (
    np.asarray(side, np.float32)[..., np.newaxis, np.newaxis]
    for side in (height, width)
  )
  area = uniforms[..., :TRIES] * (scale[1] - scale[0]) + scale[0]
  area = area * height * width
  low, high = np.log(ratio)
  ratios = np.exp(uniforms[..., TRIES : 2 * TRIES] * (high - low) + low)
  box_width = np.round(np.sqrt(area * ratios))  # [..., V, TRIES]
  box_height = np.round(np.sqrt(area / ratios))
  fits = (box_width > 0) & (box_width <= width)
  fits = fits & (box_height > 0) & (box_height <= height)

  first = fits.argmax(axis=-1)[..., np.newaxis]  # The first try that fits.
  at_first = lambda side: np.take_along_axis(side, first, axis=-1)[..., 0]
  box_width, box_height = at_first(box_width), at_first(box_height)
  height, width = height[..., 0], width[..., 0]  # [..., 1]
  place = np.moveaxis(uniforms[..., 2 * TRIES :], -1, 0)  # 3 of [..., V]
  top = _random_offset(place[0], height - box_height)
  left = _random_offset(place[1], width - box_width)

  center = _fallback_boxes(height, width, ratio[..., 0])
  drawn = np.stack([top, left, box_height, box_width], axis=-1)
  found = fits.any(axis=-1)[..., np.newaxis]
  flip_prob = np.array([crop.flip_prob for crop in view_list], np.float32)
  flip = (place[2] < flip_prob)[..., np.newaxis]
  sides = np.where(found, drawn, center)
  return np.concatenate([sides, flip], axis=-1, dtype=np.float32)


def _random_offset(uniform: np.ndarray, room: np.ndarray) -> np.ndarray:
  """Returns a whole number in [0, room], even where a product rounds up."""
  return np.minimum(np.floor(uniform * (room + np.float32(1))), room)


def _fallback_boxes(
  height: np.ndarray, width: np.ndarray, ratio: np.ndarray
) -> np.ndarray:
  """Returns the largest centered boxes of allowed aspect, [..., V, 4]."""
  box_width = np.minimum(width, np.round(height * ratio[1]))
  box_height = np.minimum(height, np.round(width / ratio[0]))
  top = np.floor((height - box_height) / 2)
  left = np.floor((width - box_width) / 2)
  return np.stack([top, left, box_height, box_width], axis=-1)


def center_box(height: int, width: int, resize: int, crop: int) -> np.ndarray:
  """Returns the part of an image that "resize, then crop the center" shows.

  The box is in pixels of the image before the resize, so that one resampling
  does both; its edges are fractions of a pixel.

  Args:
    height: Height of the images.
    width: Width of the images.
    resize: Size of the shorter side before the crop.
    crop: Height and width of the crop.

  Returns:
    float32 [5]: the parts of a `Box`.
  """
  shorter = min(height, width)
  resized_height, resized_width = (
    resize * side // shorter for side in (height, width)
  )
  top = round((resized_height - crop) / 2)
  left = round((resized_width - crop) / 2)
  scale_y, scale_x = height / resized_height, width / resized_width
  sides = top * scale_y, left * scale_x, crop * scale_y, crop * scale_x
  return np.array([*sides, 0], np.float32)
