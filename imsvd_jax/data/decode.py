"""One record at a time: decode, cut, resize.

An image is decoded once for all of its views, and only the part that some view
shows. A JPEG is decoded at a half, quarter or eighth of its size when every
view shrinks it at least that much. A view that is still too large by a factor
of 2 or more is averaged over blocks of pixels. The last resampling, by less
than 2, is not antialiased.

With data.antialias a view is resized at once with PIL's weights, from a JPEG
that is decoded at no less than three times its size: the decoder's own
averaging then takes less than 2% of the gradient energy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import numpy as np
import tensorflow as tf

from imsvd_jax.data import crops, headers
from imsvd_jax.data.source import MAX_PIXELS, Source

_MAX_HALVINGS = 3  # libjpeg scales by 1, 1/2, 1/4 and 1/8.

# PIL's method. TensorFlow's default is off by up to 9 levels and no faster.
_DCT_METHOD = "INTEGER_ACCURATE"

_PNG, _BMP = b"\x89PNG", b"BM"

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
  halvings = _halvings(boxes, view_list)
  if source.antialias:
    parts = _parts(image, boxes, tf.zeros_like(halvings), source.channels)
  else:
    parts = _cut(image, boxes, halvings, source.channels)
  views = [
    # Rounded while the view is in the cache, which saves 9% of the time.
    crops.to_uint8(_resize(source, part, crop.size))
    for part, crop in zip(parts, view_list, strict=True)
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
    lambda: _from_jpeg(record, source, uniforms, view_list),
    lambda: whole(decode_pixels(record, source.channels, source.max_pixels)),
  )


def _from_jpeg(
  record: tf.Tensor,
  source: Source,
  uniforms: tf.Tensor,
  view_list: list[crops.Crop],
) -> tuple[tf.Tensor, crops.Box]:
  """Returns the part of a JPEG that its views need, and their boxes in it."""
  shape = tf.image.extract_jpeg_shape(record)
  with _refused_above(source.max_pixels, shape):
    height, width = _float_sides(tf.identity(shape))
  boxes = crops.random_boxes(uniforms, height, width, view_list)
  halvings = _halvings(boxes, view_list, 3 if source.antialias else 1)
  halvings = tf.reduce_min(halvings)
  boxes = _shrink(boxes, halvings, height, width)
  top, left = tf.reduce_min(boxes.top), tf.reduce_min(boxes.left)
  bottom = tf.reduce_max(boxes.top + boxes.height)
  right = tf.reduce_max(boxes.left + boxes.width)
  window = tf.stack([top, left, bottom - top, right - left])
  image = _decode_jpeg_window(record, window, halvings, source.channels)
  return image, boxes._replace(top=boxes.top - top, left=boxes.left - left)


def _float_sides(shape: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  sides = tf.cast(shape[:2], tf.float32)
  return sides[0], sides[1]


def _halvings(
  boxes: crops.Box, view_list: list[crops.Crop], times: int = 1
) -> tf.Tensor:
  """Returns how often each box can be halved and be `times` its view, [V]."""
  sizes = np.array([crop.size for crop in view_list], np.float32)
  shrink = tf.minimum(boxes.height, boxes.width) / sizes
  # Comparisons rather than a logarithm, whose rounding could land below 2**k.
  limits = times * 2.0 ** np.arange(1, _MAX_HALVINGS + 1, dtype=np.float32)
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


def _parts(
  image: tf.Tensor, boxes: crops.Box, halvings: tf.Tensor, channels: int
) -> list[tf.Tensor]:
  """Cuts and flips V views of whole blocks of 2**halvings pixels.

  Returns:
    uint8 [1, h, w, C], each of its own size.
  """
  factors = tf.bitwise.left_shift(1, halvings)  # [V]
  corners, sizes = (
    tf.cast(tf.stack(sides, axis=1), tf.int32)  # [V, 2]
    for sides in (boxes[:2], boxes[2:4])
  )
  whole = sizes - sizes % factors[:, tf.newaxis]  # In whole blocks.
  # What is left over is at the end of a row after the flip.
  over = tf.where(boxes.flip, sizes[:, 1] - whole[:, 1], 0)
  corners += tf.stack([tf.zeros_like(over), over], axis=1)
  parts = zip(
    tf.unstack(tf.pad(corners, [[0, 0], [0, 1]])),
    tf.unstack(tf.pad(whole, [[0, 0], [0, 1]], constant_values=channels)),
    tf.unstack(boxes.flip),
    strict=True,
  )
  views = []
  for corner, size, flip in parts:
    view = tf.slice(image, corner, size)
    # A branch, because tf.reverse of no axis is slower than of one.
    view = tf.cond(flip, lambda v=view: tf.reverse(v, [1]), lambda v=view: v)
    view = tf.ensure_shape(view, (None, None, channels))
    views.append(view[tf.newaxis])
  return views


def _cut(
  image: tf.Tensor, boxes: crops.Box, halvings: tf.Tensor, channels: int
) -> list[tf.Tensor]:
  """Cuts, flips and shrinks V views by 2**halvings, averaging blocks of pixels.

  A box is never copied as float32 before it is shrunk: of a large image that
  would take gigabytes.

  Returns:
    float32 [1, h, w, C], each of its own size.
  """
  views = _parts(image, boxes, halvings, channels)
  factors = tf.bitwise.left_shift(1, halvings)  # [V]
  # One branch for all views: each costs as much as twenty small operations.
  views = tf.cond(
    tf.reduce_any(factors > 1),
    lambda: list(map(_averaged, views, tf.unstack(factors))),
    # TensorFlow's resize of integers is 1.6 times slower than of float32.
    lambda: [tf.cast(view, tf.float32) for view in views],
  )
  return [tf.ensure_shape(v, (1, None, None, channels)) for v in views]


def _averaged(view: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
  """Shrinks uint8 [1, h, w, C] by a factor that divides h and w.

  The means of whole blocks of integers are exact in float32.
  """
  return tf.cond(
    factor > 1,
    lambda: tf.raw_ops.ResizeArea(
      images=view, size=tf.shape(view)[1:3] // factor
    ),
    lambda: tf.cast(view, tf.float32),
  )


def _resize(source: Source, view: tf.Tensor, size: int) -> tf.Tensor:
  """Resizes [1, h, w, C] to float32 [1, size, size, C]."""
  if source.antialias:
    return crops.antialiased(view, size, source.train_kernel)
  resize = _RESIZE[source.train_kernel]
  view = resize(images=view, size=[size, size], half_pixel_centers=True)
  return tf.ensure_shape(view, (1, size, size, source.channels))


# The operations under tf.image.resize, which wraps them in a dozen others.
_RESIZE = {
  "bicubic": tf.raw_ops.ResizeBicubic,
  "bilinear": tf.raw_ops.ResizeBilinear,
}


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
    image = decode_pixels(record, source.channels, source.max_pixels)
  height, width = _float_sides(tf.shape(image))
  box = crops.center_box(height, width, resize, crop)
  scale = crop / tf.stack([box.height, box.width])

  def resample() -> tf.Tensor:
    return tf.raw_ops.ScaleAndTranslate(
      images=image[tf.newaxis],
      size=[crop, crop],
      scale=scale,
      translation=-tf.stack([box.top, box.left]) * scale,
      kernel_type=crops.KERNEL_TYPES[source.interpolation],
      antialias=True,
    )[0]

  has_size = tf.reduce_all(tf.shape(image)[:2] == crop) & (resize == crop)
  out = tf.cond(has_size, lambda: tf.cast(image, tf.float32), resample)
  out = tf.ensure_shape(out, (crop, crop, source.channels))
  return crops.to_uint8(out)


# --- Decoding -----------------------------------------------------------------


def decode_pixels(
  record: tf.Tensor, channels: int, max_pixels: int = MAX_PIXELS
) -> tf.Tensor:
  """Decodes any image that TensorFlow reads, to uint8 [height, width, C].

  Args:
    record: The contents of the file, a string scalar.
    channels: 1, 3 or 4. Gray is repeated; alpha is dropped, or added where the
      file has none.
    max_pixels: An image of more pixels, by its header, is an error.
  """
  with _refused_above(max_pixels, _sides(record)):
    record = tf.identity(record)
  # Only TensorFlow's decoders of PNG and, mostly, JPEG convert channels.
  return tf.case(
    [
      (tf.io.is_jpeg(record), lambda: _decode_jpeg(record, channels)),
      (_begins(record, _PNG), lambda: _decode_png(record, channels)),
      (
        _begins(record, _BMP),
        lambda: _convert(tf.io.decode_bmp(record), channels),
      ),
    ],
    default=lambda: _decode_other(record, channels),
  )


def _refused_above(
  max_pixels: int, sides: tf.Tensor
) -> contextlib.AbstractContextManager:
  """Returns a context whose operations run if an image is not too large.

  Args:
    max_pixels: The limit.
    sides: Height and width, perhaps negative (BMP), and other entries.
  """
  pixels = tf.reduce_prod(tf.abs(tf.cast(sides[:2], tf.int64)))
  check = tf.debugging.assert_less_equal(
    pixels, tf.constant(max_pixels, tf.int64), "more than data.max_pixels"
  )
  return tf.control_dependencies([] if check is None else [check])


def _sides(record: tf.Tensor) -> tf.Tensor:
  """Returns height and width by the header of an image file, int64 [2]."""
  return tf.case(
    [
      (
        tf.io.is_jpeg(record),
        lambda: tf.cast(tf.image.extract_jpeg_shape(record)[:2], tf.int64),
      ),
      (_begins(record, _PNG), lambda: _integers(record, 16, False)[::-1]),
      (_begins(record, _BMP), lambda: _integers(record, 18, True)[::-1]),
    ],
    # Rare, and too intricate for a graph.
    default=lambda: tf.ensure_shape(
      tf.numpy_function(headers.sides, [record], tf.int64, stateful=False), [2]
    ),
  )


def _integers(record: tf.Tensor, start: int, little_endian: bool) -> tf.Tensor:
  """Returns the two int32 from byte `start` on, int64 [2]."""
  part = tf.strings.substr(record, start, 8)
  return tf.cast(
    tf.io.decode_raw(part, tf.int32, little_endian=little_endian), tf.int64
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
