"""One record at a time: decode, cut, resize.

An image is decoded once for all of its views, and only the part that some view
shows. A JPEG is decoded at a half, quarter or eighth of its size when every
view shrinks it at least that much. A view that is still too large by a factor
of 2 or more is averaged over blocks of pixels. The last resampling, by less
than 2, is not antialiased, because TensorFlow's antialiased resize costs four
times as much. Evaluation uses the antialiased resize: there accuracy matters
more than speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import tensorflow as tf

from imsvd_jax.data import crops
from imsvd_jax.data.source import Source

_MAX_HALVINGS = 3  # libjpeg scales by 1, 1/2, 1/4 and 1/8.

# PIL's method. TensorFlow's default is off by up to 9 levels and no faster.
_DCT_METHOD = "INTEGER_ACCURATE"

_KERNEL_TYPES = {"bicubic": "keyscubic", "bilinear": "triangle"}

# --- Training views -----------------------------------------------------------


def train_views(
  source: Source,
  record: tf.Tensor,
  uniforms: tf.Tensor,
  view_list: list[crops.Crop],
) -> list[tf.Tensor]:
  """Returns the views of one image: two global ones, then the local ones.

  Args:
    source: Where the record is from.
    record: An encoded image (string scalar) or uint8 [height, width, C].
    uniforms: float32 [V, NUM_UNIFORMS].
    view_list: V crops; local ones are of one size.

  Returns:
    uint8 [2, size, size, C] and, if V > 2, uint8 [V - 2, size, size, C].
  """
  image, boxes = decode_for_views(source, record, uniforms, view_list)
  views = _cut(image, boxes, source.channels)
  halvings = _halvings(boxes, view_list)
  # One branch for all views: each costs as much as twenty small operations.
  views = tf.cond(
    tf.reduce_any(halvings > 0),
    lambda: [_halve(*v) for v in zip(views, tf.unstack(halvings), strict=True)],
    lambda: views,
  )
  views = [
    # Rounded while the view is in the cache, which saves 9% of the time.
    crops.to_uint8(_resize(source, view, crop.size))
    for view, crop in zip(views, view_list, strict=True)
  ]
  return [tf.concat(group, axis=0) for group in crops.by_size(views)]


def decode_for_views(
  source: Source,
  record: tf.Tensor,
  uniforms: tf.Tensor,
  view_list: list[crops.Crop],
) -> tuple[tf.Tensor, crops.Box]:
  """Returns the part of an image that its views need, and their boxes in it.

  Takes the arguments of `train_views`; boxes are [V].
  """

  def whole(image: tf.Tensor) -> tuple[tf.Tensor, crops.Box]:
    sides = _float_sides(tf.shape(image))
    return image, crops.random_boxes(uniforms, *sides, view_list)

  if record.dtype == tf.uint8:
    return whole(record)
  return tf.cond(
    tf.io.is_jpeg(record),
    lambda: _from_jpeg(record, source.channels, uniforms, view_list),
    lambda: whole(decode_pixels(record, source.channels)),
  )


def _from_jpeg(
  record: tf.Tensor,
  channels: int,
  uniforms: tf.Tensor,
  view_list: list[crops.Crop],
) -> tuple[tf.Tensor, crops.Box]:
  """Returns the part of a JPEG that its views need, and their boxes in it."""
  height, width = _float_sides(tf.image.extract_jpeg_shape(record))
  boxes = crops.random_boxes(uniforms, height, width, view_list)
  halvings = tf.reduce_min(_halvings(boxes, view_list))
  boxes = _shrink(boxes, halvings, height, width)
  top, left = tf.reduce_min(boxes.top), tf.reduce_min(boxes.left)
  bottom = tf.reduce_max(boxes.top + boxes.height)
  right = tf.reduce_max(boxes.left + boxes.width)
  window = tf.stack([top, left, bottom - top, right - left])
  image = _decode_jpeg_window(record, window, halvings, channels)
  return image, boxes._replace(top=boxes.top - top, left=boxes.left - left)


def _float_sides(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  sides = tf.cast(shape[:2], tf.float32)
  return sides[0], sides[1]


def _halvings(boxes: crops.Box, view_list: list[crops.Crop]) -> tf.Tensor:
  """Returns how often each box can be halved and still fill its view, [V]."""
  sizes = np.array([crop.size for crop in view_list], np.float32)
  shrink = tf.minimum(boxes.height, boxes.width) / sizes
  # Comparisons rather than a logarithm, whose rounding could land below 2**k.
  limits = 2.0 ** np.arange(1, _MAX_HALVINGS + 1, dtype=np.float32)
  reached = tf.cast(shrink[:, tf.newaxis] >= limits, tf.int32)
  return tf.reduce_sum(reached, axis=1)


def _shrink(
  boxes: crops.Box, halvings: tf.Tensor, height: tf.Tensor, width: tf.Tensor
) -> crops.Box:
  """Returns the boxes in an image decoded at 1 / 2**halvings of its size."""
  factor = 2.0 ** tf.cast(halvings, tf.float32)
  # libjpeg rounds the sides up.
  height, width = tf.math.ceil(height / factor), tf.math.ceil(width / factor)
  box_height = tf.minimum(tf.round(boxes.height / factor), height)
  box_width = tf.minimum(tf.round(boxes.width / factor), width)
  return crops.Box(
    tf.minimum(tf.round(boxes.top / factor), height - box_height),
    tf.minimum(tf.round(boxes.left / factor), width - box_width),
    box_height,
    box_width,
    boxes.flip,
  )


def _decode_jpeg_window(
  record: tf.Tensor, window: tf.Tensor, halvings: tf.Tensor, channels: int
) -> tf.Tensor:
  """Decodes [top, left, height, width] of the image at 1 / 2**halvings."""
  window = tf.cast(window, tf.int32)

  def decode(components: int) -> tf.Tensor:
    at_ratio = lambda ratio: tf.image.decode_and_crop_jpeg(
      record, window, components, ratio=ratio, dct_method=_DCT_METHOD
    )
    ratios = [2**k for k in range(_MAX_HALVINGS + 1)]
    return tf.switch_case(halvings, [partial(at_ratio, r) for r in ratios])

  return _jpeg_channels(record, decode, channels)


def _cut(image: tf.Tensor, boxes: crops.Box, channels: int) -> list[tf.Tensor]:
  """Cuts and flips V views, float32 [1, h, w, C], each of its own size."""
  corners = tf.pad(tf.stack(boxes[:2], axis=1), [[0, 0], [0, 1]])
  sizes = tf.pad(
    tf.stack(boxes[2:4], axis=1), [[0, 0], [0, 1]], constant_values=channels
  )
  parts = zip(
    tf.unstack(tf.cast(corners, tf.int32)),
    tf.unstack(tf.cast(sizes, tf.int32)),
    tf.unstack(boxes.flip),
    strict=True,
  )
  views = []
  for corner, size, flip in parts:
    view = tf.slice(image, corner, size)
    # A branch, because tf.reverse of no axis is slower than of one.
    view = tf.cond(flip, lambda v=view: tf.reverse(v, [1]), lambda v=view: v)
    # TensorFlow's resize of integers is 1.6 times slower than of float32.
    view = tf.cast(view, tf.float32)[tf.newaxis]
    views.append(tf.ensure_shape(view, (1, None, None, channels)))
  return views


def _resize(source: Source, view: tf.Tensor, size: int) -> tf.Tensor:
  """Resizes float32 [1, h, w, C] to [1, size, size, C]."""
  resize = _RESIZE[source.interpolation]
  view = resize(images=view, size=[size, size], half_pixel_centers=True)
  return tf.ensure_shape(view, (1, size, size, source.channels))


# The operations under tf.image.resize, which wraps them in a dozen others.
_RESIZE = {
  "bicubic": tf.raw_ops.ResizeBicubic,
  "bilinear": tf.raw_ops.ResizeBilinear,
}


def _halve(images: tf.Tensor, times: tf.Tensor) -> tf.Tensor:
  """Shrinks float32 [1, h, w, C] by 2**times, averaging blocks of pixels."""
  shape = tf.TensorShape([1, None, None, images.shape[-1]])
  _, images = tf.while_loop(
    lambda done, _: done < times,
    lambda done, images: (done + 1, tf.nn.avg_pool2d(images, 2, 2, "VALID")),
    (0, images),
    shape_invariants=(tf.TensorShape([]), shape),
  )
  return images


# --- Evaluation ---------------------------------------------------------------


def eval_view(
  source: Source, record: tf.Tensor, resize: int, crop: int
) -> tf.Tensor:
  """Returns the resized center of one image, uint8 [crop, crop, C].

  Args:
    source: Where the record is from.
    record: An encoded image (string scalar) or uint8 [height, width, C].
    resize: Size of the shorter side before the crop.
    crop: Height and width of the result.
  """
  image = record
  if record.dtype == tf.string:
    image = decode_pixels(record, source.channels)
  height, width = _float_sides(tf.shape(image))
  box = crops.center_box(height, width, resize, crop)
  scale = crop / tf.stack([box.height, box.width])

  def resample() -> tf.Tensor:
    return tf.raw_ops.ScaleAndTranslate(
      images=image[tf.newaxis],
      size=[crop, crop],
      scale=scale,
      translation=-tf.stack([box.top, box.left]) * scale,
      kernel_type=_KERNEL_TYPES[source.interpolation],
      antialias=True,
    )[0]

  has_size = tf.reduce_all(tf.shape(image)[:2] == crop) & (resize == crop)
  out = tf.cond(has_size, lambda: tf.cast(image, tf.float32), resample)
  out = tf.ensure_shape(out, (crop, crop, source.channels))
  return crops.to_uint8(out)


# --- Decoding -----------------------------------------------------------------


def decode_pixels(record: tf.Tensor, channels: int) -> tf.Tensor:
  """Decodes any image that TensorFlow reads, to uint8 [height, width, C].

  Args:
    record: The contents of the file, a string scalar.
    channels: 1, 3 or 4. Gray is repeated; alpha is dropped, or added where the
      file has none.
  """
  # Only TensorFlow's decoders of PNG and, mostly, JPEG convert channels.
  return tf.case(
    [
      (tf.io.is_jpeg(record), lambda: _decode_jpeg(record, channels)),
      (_begins(record, b"\x89PNG"), lambda: _decode_png(record, channels)),
      (
        _begins(record, b"BM"),
        lambda: _convert(tf.io.decode_bmp(record), channels),
      ),
    ],
    default=lambda: _decode_other(record, channels),
  )


def _begins(record: tf.Tensor, with_: bytes) -> tf.Tensor:
  return tf.strings.substr(record, 0, len(with_)) == with_


def _decode_jpeg(record: tf.Tensor, channels: int) -> tf.Tensor:
  decode = lambda components: tf.io.decode_jpeg(
    record, components, dct_method=_DCT_METHOD
  )
  return _jpeg_channels(record, decode, channels)


def _jpeg_channels(
  record: tf.Tensor, decode: Callable[[int], tf.Tensor], channels: int
) -> tf.Tensor:
  """Returns `decode(components)` with any number of channels."""
  if channels != 1:
    return _add_alpha(decode(3), channels)
  # libjpeg converts all but CMYK to gray, faster than we convert from color.
  is_cmyk = tf.io.extract_jpeg_shape(record)[-1] == 4
  return tf.cond(is_cmyk, lambda: _convert(decode(3), 1), lambda: decode(1))


def _decode_png(record: tf.Tensor, channels: int) -> tf.Tensor:
  if channels != 4:
    return tf.io.decode_png(record, channels)
  # With less than 8 bits per level, TensorFlow's opaque alpha is 1, not 255.
  bits = tf.io.decode_raw(tf.strings.substr(record, 24, 1), tf.uint8)[0]
  return tf.cond(
    bits < 8,
    lambda: _add_alpha(tf.io.decode_png(record, 3), 4),
    lambda: tf.io.decode_png(record, 4),
  )


def _decode_other(record: tf.Tensor, channels: int) -> tf.Tensor:
  """Decodes GIF, and WebP with or without alpha."""
  image = tf.io.decode_image(record, expand_animations=False)
  if channels != 4:
    return _convert(image, channels)
  has_alpha = tf.shape(image)[-1] == 4
  return tf.cond(has_alpha, lambda: image, lambda: _convert(image, 4))


def _add_alpha(image: tf.Tensor, channels: int) -> tf.Tensor:
  """Appends an opaque fourth channel if four are wanted."""
  if channels != 4:
    return image
  return tf.pad(image, [[0, 0], [0, 0], [0, 1]], constant_values=255)


def _convert(image: tf.Tensor, channels: int) -> tf.Tensor:
  """Converts [h, w, 1, 3 or 4] to [h, w, channels]."""
  color = tf.cond(
    tf.shape(image)[-1] == 1,
    lambda: tf.repeat(image, 3, axis=-1),
    lambda: image[..., :3],
  )
  if channels == 1:
    return tf.image.rgb_to_grayscale(color)
  return _add_alpha(color, channels)
