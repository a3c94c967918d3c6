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

from imsvd_jax.data import crops, image_files
from imsvd_jax.data.execution import num_threads
from imsvd_jax.data.source import (
  ALPHA_DROPPED,
  MAX_PIXELS,
  Decoding,
  Source,
  ValueRange,
)

_MAX_HALVINGS = 3  # libjpeg scales by 1, 1/2, 1/4 and 1/8.

# PIL's method. TensorFlow's default is off by up to 9 levels and no faster.
_DCT_METHOD = "INTEGER_ACCURATE"

_PNG = b"\x89PNG"
# Where a PNG says which of its colors are transparent, before its pixels; a
# color profile may come first.
_TRANSPARENCY_WITHIN = 1 << 16
_HAS_TRANSPARENCY = r"(?s)\C*tRNS\C*"
# Where EXIF data begin, if there are any; a text that RE2 can search bytes for.
_EXIF_WITHIN = 1 << 12
_HAS_EXIF = r"\C*(Exif\x00\x00|eXIf)\C*"

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
    record: An encoded image (string scalar) or pixels [height, width, C].
    uniforms: float32 [V, NUM_UNIFORMS].
    view_list: V crops; local ones are of one size.

  Returns:
    [2, size, size, C] and, if V > 2, [V - 2, size, size, C], both of
    `source.pixel_type`.
  """
  image, boxes = decode_for_views(source, record, uniforms, view_list)
  halvings = _halvings(boxes, view_list)
  if source.antialias:
    parts = _parts(image, boxes, tf.zeros_like(halvings), source.channels)
  else:
    parts = _cut(image, boxes, halvings, source.channels)
  views = [
    # Rounded while the view is in the cache, which saves 9% of the time.
    _as_pixels(source, _resize(source, part, crop.size))
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

  if record.dtype != tf.string:
    return whole(record)
  if not _is_fast(source.decoding):
    return whole(_decoded(record, source.decoding))
  return tf.cond(
    tf.io.is_jpeg(record),
    lambda: _from_jpeg(record, source, uniforms, view_list),
    lambda: whole(_decoded(record, source.decoding)),
  )


def _as_pixels(source: Source, levels: tf.Tensor) -> tf.Tensor:
  """Returns levels of 0 to 255 as the type of the source's pixels."""
  if source.value_range is None:
    return crops.to_uint8(levels)
  return tf.clip_by_value(levels, 0.0, 255.0)  # Bicubic filters overshoot.


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
  turn = _orientation(record) if source.exif else None
  if turn is not None:  # Boxes are drawn in the image as it is seen.
    height, width = tf.cond(
      turn >= 5, lambda: (width, height), lambda: (height, width)
    )
  boxes = crops.random_boxes(uniforms, height, width, view_list)
  halvings = _halvings(boxes, view_list, 3 if source.antialias else 1)
  halvings = tf.reduce_min(halvings)
  boxes = _shrink(boxes, halvings, height, width)
  top, left = tf.reduce_min(boxes.top), tf.reduce_min(boxes.left)
  bottom = tf.reduce_max(boxes.top + boxes.height)
  right = tf.reduce_max(boxes.left + boxes.width)
  window = tf.stack([top, left, bottom - top, right - left])
  if turn is not None:
    window = _stored_window(window, turn, halvings, height, width)
  image = _decode_jpeg_window(record, window, halvings, source.channels)
  if turn is not None:
    image = _turned(image, turn)
  image = tf.cast(image, source.pixel_type)
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
  height, width = (_shrunk_side(side, halvings) for side in (height, width))
  factor = 2.0 ** tf.cast(halvings, tf.float32)
  box_height = tf.minimum(tf.round(boxes.height / factor), height)
  box_width = tf.minimum(tf.round(boxes.width / factor), width)
  return crops.Box(
    tf.minimum(tf.round(boxes.top / factor), height - box_height),
    tf.minimum(tf.round(boxes.left / factor), width - box_width),
    box_height,
    box_width,
    boxes.flip,
  )


def _shrunk_side(side: tf.Tensor, halvings: tf.Tensor) -> tf.Tensor:
  """Returns a side after halvings, which libjpeg rounds up."""
  return tf.math.ceil(side / 2.0 ** tf.cast(halvings, tf.float32))


def squares_decoder(
  size: int, channels: int
) -> Callable[[list[bytes]], np.ndarray]:
  """Returns a function from JPEGs to uint8 [b, size, size, channels].

  It raises ValueError if one is not of this size, before it is decoded.
  """

  def decode(record: tf.Tensor) -> tf.Tensor:
    shape = tf.image.extract_jpeg_shape(record)
    with tf.control_dependencies(
      [tf.debugging.assert_equal(shape, [size, size, channels])]
    ):
      image = tf.io.decode_jpeg(record, channels, dct_method=_DCT_METHOD)
    return tf.ensure_shape(image, (size, size, channels))

  @tf.function(
    input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
  )
  def decode_all(records: tf.Tensor) -> tf.Tensor:
    return tf.map_fn(
      decode,
      records,
      fn_output_signature=tf.uint8,
      parallel_iterations=num_threads(),
    )

  def decoded(contents: list[bytes]) -> np.ndarray:
    try:
      return decode_all(tf.constant(contents, tf.string)).numpy()
    except tf.errors.InvalidArgumentError as error:
      raise ValueError("not a JPEG of the expected size") from error

  return decoded


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
  """Returns the resized center of one image, [crop, crop, C].

  It is of `source.pixel_type`.

  Args:
    source: Where the record is from.
    record: An encoded image (string scalar) or pixels [height, width, C].
    resize: Size of the shorter side before the crop.
    crop: Height and width of the result.
  """
  image = record
  if record.dtype == tf.string:
    image = _decoded(record, source.decoding)
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
  return _as_pixels(source, out)


# --- Decoding -----------------------------------------------------------------


def decode_pixels(
  record: tf.Tensor,
  channels: int,
  max_pixels: int = MAX_PIXELS,
  value_range: ValueRange = None,
  exif: bool = False,
  background: int = ALPHA_DROPPED,
) -> tf.Tensor:
  """Decodes an image file to uint8 [height, width, C].

  Args:
    record: The contents of the file, a string scalar.
    channels: C. Between 1, 3 and 4 gray is repeated; alpha is added where the
      file has none. Other numbers are the file's own.
    max_pixels: An image of more pixels, by its header, is an error.
    value_range: See `Source`; the result is float32 if there is one. Without
      one, an image that is not of 8 bits is an error.
    exif: Whether to turn the image as its EXIF orientation says.
    background: See `Source`.
  """
  how = Decoding(channels, max_pixels, value_range, exif, background)
  return _decoded(record, how)


def _decoded(record: tf.Tensor, how: Decoding) -> tf.Tensor:
  """Decodes JPEG and PNG by TensorFlow, other files by `image_files`."""
  if not _is_fast(how):
    return _decode_other(record, how)
  is_png = _is_png(record)
  if how.background != ALPHA_DROPPED and how.channels != 4:
    # Lazily: another file may be too short to ask.
    is_png = tf.cond(is_png, lambda: ~_is_for_pillow(record), lambda: is_png)
  return tf.case(
    [
      (tf.io.is_jpeg(record), lambda: _fast(record, how, _decode_jpeg)),
      (is_png, lambda: _fast(record, how, _decode_png)),
    ],
    default=lambda: _decode_other(record, how),
  )


def _is_fast(how: Decoding) -> bool:
  """Returns whether TensorFlow's decoders give this number of channels."""
  return how.channels in (1, 3, 4)


def _fast(
  record: tf.Tensor,
  how: Decoding,
  decode: Callable[[tf.Tensor, Decoding], tf.Tensor],
) -> tf.Tensor:
  """Decodes a file of 8 bits, and turns it."""
  with _refused_above(how.max_pixels, _sides(record)):
    record = tf.identity(record)
  image = decode(record, how)
  if how.value_range is not None:
    image = tf.cast(image, tf.float32)
  return _turned(image, _orientation(record)) if how.exif else image


def _refused_above(
  max_pixels: int, sides: tf.Tensor
) -> contextlib.AbstractContextManager:
  """Returns a context whose operations run if an image is not too large.

  Args:
    max_pixels: The limit.
    sides: Height and width, and other entries.
  """
  pixels = tf.reduce_prod(tf.cast(sides[:2], tf.int64))
  check = tf.debugging.assert_less_equal(
    pixels, tf.constant(max_pixels, tf.int64), "more than data.max_pixels"
  )
  return tf.control_dependencies([] if check is None else [check])


def _sides(record: tf.Tensor) -> tf.Tensor:
  """Returns height and width by the header of a JPEG or PNG, int64 [2]."""
  return tf.cond(
    tf.io.is_jpeg(record),
    lambda: tf.cast(tf.image.extract_jpeg_shape(record)[:2], tf.int64),
    lambda: _png_sides(record),
  )


def _png_sides(record: tf.Tensor) -> tf.Tensor:
  part = tf.strings.substr(record, 16, 8)
  width_height = tf.io.decode_raw(part, tf.int32, little_endian=False)
  return tf.cast(width_height[::-1], tf.int64)


def _is_png(record: tf.Tensor) -> tf.Tensor:
  return tf.strings.substr(record, 0, len(_PNG)) == _PNG


def _is_for_pillow(png: tf.Tensor) -> tf.Tensor:
  """Returns whether a PNG of up to 8 bits may have transparent pixels."""
  beginning = tf.strings.substr(png, 0, _TRANSPARENCY_WITHIN)
  names_colors = tf.strings.regex_full_match(beginning, _HAS_TRANSPARENCY)
  return (_png_bits(png) != 16) & (_has_alpha(png) | names_colors)


def _png_bits(png: tf.Tensor) -> tf.Tensor:
  return tf.io.decode_raw(tf.strings.substr(png, 24, 1), tf.uint8)[0]


def _has_alpha(png: tf.Tensor) -> tf.Tensor:
  kind = tf.io.decode_raw(tf.strings.substr(png, 25, 1), tf.uint8)[0]
  return (kind == 4) | (kind == 6)


def _decode_jpeg(record: tf.Tensor, how: Decoding) -> tf.Tensor:
  decode = lambda components: tf.io.decode_jpeg(
    record, components, dct_method=_DCT_METHOD
  )
  return _jpeg_channels(record, decode, how.channels)


def _jpeg_channels(
  record: tf.Tensor, decode: Callable[[int], tf.Tensor], channels: int
) -> tf.Tensor:
  """Returns `decode(components)` with any number of channels."""
  if channels != 1:
    return _add_alpha(decode(3), channels)
  # libjpeg converts all but CMYK to gray, faster than we convert from color.
  is_cmyk = tf.io.extract_jpeg_shape(record)[-1] == 4
  return tf.cond(is_cmyk, lambda: _convert(decode(3), 1), lambda: decode(1))


def _decode_png(record: tf.Tensor, how: Decoding) -> tf.Tensor:
  bits = _png_bits(record)
  return tf.cond(
    bits == 16,
    lambda: _decode_deep_png(record, how),
    lambda: _decode_shallow_png(record, bits, how),
  )


def _decode_deep_png(record: tf.Tensor, how: Decoding) -> tf.Tensor:
  """Decodes 16 bits per level, to levels of 0 to 255."""
  if how.value_range is None:
    return _decode_other(record, how)  # Says why it does not.
  low, high = image_files.limits(np.dtype(np.uint16), how.value_range)

  def levels(channels: int) -> tf.Tensor:
    image = tf.io.decode_png(record, channels, dtype=tf.uint16)
    scaled = (tf.cast(image, tf.float32) - low) * (255 / (high - low))
    return tf.clip_by_value(scaled, 0.0, 255.0)

  def on_background() -> tf.Tensor:
    opacity = tf.io.decode_png(record, 4, dtype=tf.uint16)[..., 3:]
    opacity = tf.cast(opacity, tf.float32) / 65535
    return levels(how.channels) * opacity + how.background * (1 - opacity)

  if how.background == ALPHA_DROPPED or how.channels == 4:
    return levels(how.channels)
  return tf.cond(
    _has_alpha(record), on_background, lambda: levels(how.channels)
  )


def _decode_shallow_png(
  record: tf.Tensor, bits: tf.Tensor, how: Decoding
) -> tf.Tensor:
  channels = how.channels
  image = tf.io.decode_png(record, channels)
  if channels == 4:
    # With less than 8 bits per level, TensorFlow's opaque alpha is 1, not 255.
    image = tf.cond(
      bits < 8,
      lambda: _add_alpha(tf.io.decode_png(record, 3), 4),
      lambda: image,
    )
  return image if how.value_range is None else tf.cast(image, tf.float32)


def _decode_other(record: tf.Tensor, how: Decoding) -> tf.Tensor:
  """Decodes what Pillow, tifffile or NumPy read; they check the size."""
  dtype = tf.uint8 if how.value_range is None else tf.float32

  def read(contents: np.ndarray | bytes) -> np.ndarray:
    # Outside of a graph, TensorFlow gives an array.
    as_bytes = contents.item() if isinstance(contents, np.ndarray) else contents
    try:
      return np.ascontiguousarray(image_files.read(as_bytes, how))
    except ValueError as error:  # As TensorFlow's own decoders.
      raise tf.errors.InvalidArgumentError(None, None, str(error)) from error

  image = tf.numpy_function(read, [record], dtype, stateful=False)
  return tf.ensure_shape(image, (None, None, how.channels))


# --- EXIF ---------------------------------------------------------------------


def _orientation(record: tf.Tensor) -> tf.Tensor:
  """Returns the EXIF orientation of a JPEG or PNG: 1 to 8, int32."""

  def read(contents: np.ndarray | bytes) -> np.ndarray:
    as_bytes = contents.item() if isinstance(contents, np.ndarray) else contents
    return np.int32(image_files.orientation(as_bytes))

  beginning = tf.strings.substr(record, 0, _EXIF_WITHIN)
  turn = tf.cond(
    tf.strings.regex_full_match(beginning, _HAS_EXIF),
    lambda: tf.numpy_function(read, [beginning], tf.int32, stateful=False),
    lambda: tf.constant(1),
  )
  return tf.ensure_shape(turn, [])


def _turned(image: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
  """Returns a stored image as it is seen (EXIF's eight ways)."""

  def turned() -> tf.Tensor:
    out = tf.cond(
      turn >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image
    )
    mirrored, flipped = _flips(turn)
    out = tf.cond(mirrored, lambda: tf.reverse(out, [1]), lambda: out)
    return tf.cond(flipped, lambda: tf.reverse(out, [0]), lambda: out)

  out = tf.cond(turn == 1, lambda: image, turned)
  return tf.ensure_shape(out, (None, None, image.shape[-1]))


def _flips(turn: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Returns whether left and right, top and bottom change places."""
  is_one_of = lambda *turns: tf.reduce_any(tf.equal(turn, turns))
  return is_one_of(2, 3, 6, 7), is_one_of(3, 4, 7, 8)


def _stored_window(
  window: tf.Tensor,
  turn: tf.Tensor,
  halvings: tf.Tensor,
  height: tf.Tensor,
  width: tf.Tensor,
) -> tf.Tensor:
  """Returns where a window of the image as it is seen lies in the stored one.

  Args:
    window: [top, left, height, width], after halvings.
    turn: The EXIF orientation.
    halvings: How often the image is halved.
    height: Of the image as it is seen, before halvings.
    width: The same.
  """
  top, left, window_height, window_width = tf.unstack(window)
  mirrored, flipped = _flips(turn)
  right = _shrunk_side(width, halvings) - left - window_width
  bottom = _shrunk_side(height, halvings) - top - window_height
  top = tf.where(flipped, bottom, top)
  left = tf.where(mirrored, right, left)
  window = tf.stack([top, left, window_height, window_width])
  return tf.where(turn >= 5, tf.gather(window, [1, 0, 3, 2]), window)


# --- Channels -----------------------------------------------------------------


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
