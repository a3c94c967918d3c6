"""The boxes of `boxes` inside of TensorFlow's graphs.

They follow torchvision's definitions. They are computed from uniform numbers
that the caller supplies, so that they are functions of their keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from imsvd_jax.data.boxes import NUM_UNIFORMS as NUM_UNIFORMS
from imsvd_jax.data.boxes import TRIES, Box, Crop, limits
from imsvd_jax.data.boxes import by_size as by_size


def random_boxes(
  uniforms: tf.Tensor,
  height: tf.Tensor,
  width: tf.Tensor,
  view_list: Sequence[Crop],
) -> Box:
  """Returns torchvision's random-resized-crop boxes, in whole pixels.

  Handles all views at once, because starting an operation costs more than the
  operation itself.

  Args:
    uniforms: float32 [..., V, NUM_UNIFORMS] in [0, 1).
    height: Height of each image, float32 [...].
    width: Width of each image, likewise.
    view_list: The crops of V views.

  Returns:
    Boxes [..., V].
  """
  scale = limits(crop.scale for crop in view_list)  # two of [V, 1]
  ratio = limits(crop.ratio for crop in view_list)
  height = height[..., tf.newaxis, tf.newaxis]
  width = width[..., tf.newaxis, tf.newaxis]
  area = uniforms[..., :TRIES] * (scale[1] - scale[0]) + scale[0]
  area = area * height * width
  low, high = np.log(ratio)
  ratios = tf.exp(uniforms[..., TRIES : 2 * TRIES] * (high - low) + low)
  box_width = tf.round(tf.sqrt(area * ratios))  # [..., V, TRIES]
  box_height = tf.round(tf.sqrt(area / ratios))
  fits = (box_width > 0) & (box_width <= width)
  fits = fits & (box_height > 0) & (box_height <= height)

  # The first try that fits; argmax returns the first of equal values.
  first = tf.argmax(tf.cast(fits, tf.int8), axis=-1, output_type=tf.int32)
  at_first = tf.one_hot(first, TRIES)
  box_width = tf.reduce_sum(box_width * at_first, axis=-1)
  box_height = tf.reduce_sum(box_height * at_first, axis=-1)
  height, width = height[..., 0], width[..., 0]  # [..., 1]
  place = tf.unstack(uniforms[..., 2 * TRIES :], axis=-1)  # 3 of [..., V]
  top = _random_offset(place[0], height - box_height)
  left = _random_offset(place[1], width - box_width)

  found = tf.reduce_any(fits, axis=-1)
  center = _fallback_boxes(height, width, ratio[..., 0])
  flip_prob = np.array([crop.flip_prob for crop in view_list], np.float32)
  sides = zip((top, left, box_height, box_width), center, strict=True)
  chosen = [tf.where(found, drawn, fallback) for drawn, fallback in sides]
  return Box._make([*chosen, place[2] < flip_prob])


def _random_offset(uniform: tf.Tensor, room: tf.Tensor) -> tf.Tensor:
  """Returns a whole number in [0, room], even where a product rounds up."""
  return tf.minimum(tf.floor(uniform * (room + 1)), room)


def _fallback_boxes(
  height: tf.Tensor, width: tf.Tensor, ratio: np.ndarray
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
  """Returns the largest centered boxes of allowed aspect: top, left, h, w."""
  box_width = tf.minimum(width, tf.round(height * ratio[1]))
  box_height = tf.minimum(height, tf.round(width / ratio[0]))
  top = tf.floor((height - box_height) / 2)
  left = tf.floor((width - box_width) / 2)
  return top, left, box_height, box_width


def center_box(
  height: tf.Tensor, width: tf.Tensor, resize: int, crop: int
) -> Box:
  """Returns the part of an image that "resize, then crop the center" shows.

  The box is in pixels of the image before the resize, so that one resampling
  does both; its edges are fractions of a pixel.

  Args:
    height: Height of each image, float32 [...].
    width: Width of each image, likewise.
    resize: Size of the shorter side before the crop.
    crop: Height and width of the crop.
  """
  shorter = tf.minimum(height, width)
  resized_height = tf.floor(resize * height / shorter)
  resized_width = tf.floor(resize * width / shorter)
  top = tf.round((resized_height - crop) / 2)
  left = tf.round((resized_width - crop) / 2)
  scale_y, scale_x = height / resized_height, width / resized_width
  sides = top * scale_y, left * scale_x, crop * scale_y, crop * scale_x
  return Box(*sides, flip=tf.zeros_like(top, tf.bool))


# Kernels by TensorFlow's names.
KERNEL_TYPES = {"bicubic": "keyscubic", "bilinear": "triangle"}


def antialiased(image: tf.Tensor, size: int, kernel: str) -> tf.Tensor:
  """Resizes one image with PIL's weights, rows and columns in turn.

  ScaleAndTranslate is fast along long rows and slow along columns of three
  channels. So each pass sees an image of one column, whose pixels are whole
  rows of the image or, after a transposition, whole columns. This takes half
  the time of one call for both.

  Args:
    image: uint8 or float32 [1, height, width, C].
    size: Height and width of the result.
    kernel: "bicubic" or "bilinear".

  Returns:
    float32 [1, size, size, C].
  """
  channels = image.shape[3]

  def resize_rows(image: tf.Tensor) -> tf.Tensor:
    """Resizes [height, width, C]; returns the transposed [width, size, C]."""
    height, width = tf.unstack(tf.shape(image)[:2])
    scale = size / tf.cast(height, tf.float32)
    rows = tf.raw_ops.ScaleAndTranslate(
      images=tf.reshape(image, [1, height, 1, width * channels]),
      size=[size, 1],
      scale=tf.stack([scale, 1.0]),
      translation=[0.0, 0.0],
      kernel_type=KERNEL_TYPES[kernel],
      antialias=True,
    )
    return tf.transpose(tf.reshape(rows, [size, width, channels]), [1, 0, 2])

  return resize_rows(resize_rows(image[0]))[tf.newaxis]


def to_uint8(images: tf.Tensor) -> tf.Tensor:
  """Rounds float32 and clips it to the range of a pixel.

  One operation does all of it, in half the time of the usual four.
  """
  pixels = tf.raw_ops.QuantizeV2(
    input=images, min_range=0.0, max_range=255.0, T=tf.quint8
  )
  return tf.bitcast(pixels.output, tf.uint8)
