"""Image files of every kind, and views of single images against PIL."""

from __future__ import annotations

import io
import resource

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from imsvd_jax.data import crops, decode
from imsvd_jax.data.source import Source
from tests.data import sharpness
from tests.data.made_sources import encode, pale, photograph

WIDTH, HEIGHT = 30, 20
SOURCE = Source("test", 1)
RATIO = (0.75, 1.33)


def half_transparent(photo: Image.Image) -> Image.Image:
  image = photo.convert("RGBA")
  image.putalpha(128)
  return image


# Name -> (mode or maker of the image, format, options, tolerance in levels).
# JPEG decoders differ by a level or two in the colour conversion.
FORMATS = {
  "jpeg": ("RGB", "JPEG", {"quality": 95}, 3),
  "progressive_jpeg": ("RGB", "JPEG", {"progressive": True}, 3),
  "gray_jpeg": ("L", "JPEG", {}, 1),
  "cmyk_jpeg": ("CMYK", "JPEG", {"quality": 95}, 6),
  "png": ("RGB", "PNG", {}, 0),
  "gray_png": ("L", "PNG", {}, 0),
  "gray_alpha_png": ("LA", "PNG", {}, 0),
  "alpha_png": ("RGBA", "PNG", {}, 0),
  "palette_png": ("P", "PNG", {}, 0),
  "one_bit_png": ("1", "PNG", {}, 0),
  "bmp": ("RGB", "BMP", {}, 0),
  "gray_bmp": ("L", "BMP", {}, 0),
  "palette_bmp": ("P", "BMP", {}, 0),
  "alpha_bmp": ("RGBA", "BMP", {}, 0),
  "tiff": ("RGB", "TIFF", {}, 0),
  "lzw_tiff": ("RGB", "TIFF", {"compression": "tiff_lzw"}, 0),
  "palette_tiff": ("P", "TIFF", {}, 0),
  "cmyk_tiff": ("CMYK", "TIFF", {}, 0),
  "one_bit_tiff": ("1", "TIFF", {}, 0),
  "ppm": ("RGB", "PPM", {}, 0),
  "pgm": ("L", "PPM", {}, 0),
  "avif": ("RGB", "AVIF", {"quality": 90}, 0),
  "webp": ("RGB", "WEBP", {"lossless": True}, 0),
  "alpha_webp": (half_transparent, "WEBP", {"lossless": True}, 0),
  "gif": ("P", "GIF", {}, 0),
}


def encoded(name):
  mode, file_format, options, _ = FORMATS[name]
  photo = photograph(0, WIDTH, HEIGHT)
  image = mode(photo) if callable(mode) else photo.convert(mode)
  return encode(image, file_format, **options)


def as_rgb(contents):
  """What PIL makes of a file: alpha dropped."""
  image = Image.open(io.BytesIO(contents))
  return np.asarray(image.convert("RGB"), np.int32)


@pytest.mark.parametrize("name", FORMATS)
def test_format_becomes_rgb(name):
  contents = encoded(name)
  pixels = decode.decode_pixels(tf.constant(contents), 3)
  assert pixels.dtype == tf.uint8
  expected = as_rgb(contents)
  assert pixels.shape == expected.shape
  assert np.abs(pixels.numpy() - expected).max() <= FORMATS[name][3]


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_other_numbers_of_channels(name, channels):
  contents = encoded(name)
  pixels = decode.decode_pixels(tf.constant(contents), channels).numpy()
  assert pixels.shape == (HEIGHT, WIDTH, channels)
  expected = as_rgb(contents)
  if channels == 4:
    assert np.abs(pixels[..., :3] - expected).max() <= FORMATS[name][3]
    assert set(pixels[..., 3].ravel()) == {128 if name == "alpha_webp" else 255}
  else:
    luminance = expected @ [0.299, 0.587, 0.114]
    # libpng's weights for red, green and blue are another standard's.
    assert np.abs(pixels[..., 0] - luminance).mean() < 8


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", ["jpeg", "cmyk_jpeg"])
def test_other_numbers_of_channels_in_a_part_of_a_jpeg(name, channels):
  contents = encoded(name)
  pixels = decode.decode_pixels(tf.constant(contents), channels).numpy()
  source = Source("test", 1, channels=channels)
  crop = crops.Crop(HEIGHT, (1.0, 1.0), (1.5, 1.5), 0.0)
  uniforms = tf.zeros([1, crops.NUM_UNIFORMS])
  (view,) = views_in_graph(source, contents, uniforms, [crop])
  assert view.shape == (HEIGHT, HEIGHT, channels)
  assert abs(view.mean() - pixels.mean()) < 3


def views_in_graph(source, contents, uniforms, view_list):
  """Through tf.data, as in use."""
  views = lambda record: decode.train_views(source, record, uniforms, view_list)
  dataset = tf.data.Dataset.from_tensors(contents)
  groups = dataset.map(lambda record: tuple(views(record)))
  return [view for group in next(groups.as_numpy_iterator()) for view in group]


def pil_views(contents, uniforms, view_list, method):
  """Decode everything, cut, resize with antialiasing."""
  image = Image.open(io.BytesIO(contents)).convert("RGB")
  views = []
  sides = map(tf.constant, map(float, image.size[::-1]))
  boxes = crops.random_boxes(tf.constant(uniforms), *sides, view_list)
  boxes = zip(*(side.numpy() for side in boxes), strict=True)
  for box, crop in zip(boxes, view_list, strict=True):
    top, left, height, width, flip = map(int, box)
    part = image.crop((left, top, left + width, top + height))
    view = np.asarray(part.resize((crop.size, crop.size), method), np.int32)
    views.append(view[:, ::-1] if flip else view)
  return views


def compare(image, file_format, view_list, source=SOURCE):
  """Mean and largest difference of each view from PIL's, over three draws."""
  contents = encode(image, file_format)
  method = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}
  differences = []
  for seed in range(3):
    rng = np.random.default_rng(seed)
    uniforms = rng.random((len(view_list), crops.NUM_UNIFORMS), np.float32)
    ours = views_in_graph(source, contents, uniforms, view_list)
    theirs = pil_views(
      contents, uniforms, view_list, method[source.interpolation]
    )
    for a, b in zip(ours, theirs, strict=True):
      assert a.dtype == np.uint8
      assert a.shape == b.shape
      differences.append(np.abs(a - b))
  mean = np.mean([d.mean() for d in differences])
  return mean, max(d.max() for d in differences)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_enlarged_views_equal_pil(interpolation):
  source = Source("test", 1, interpolation=interpolation)
  view_list = [crops.Crop(64, (0.2, 1.0), RATIO, 0.5)] * 2
  image = pale(photograph(0, 60, 45))
  _, worst = compare(image, "PNG", view_list, source)
  assert worst <= 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_views_of_a_photograph_are_close_to_pil(file_format):
  """Shrinking by less than 2 is not antialiased, hence the tolerance."""
  view_list = [crops.Crop(96, (0.2, 1.0), RATIO, 0.5)] * 2
  view_list += [crops.Crop(48, (0.05, 0.4), RATIO, 0.5)]
  image = photograph(1, 200, 150)
  mean, _ = compare(image, file_format, view_list)
  assert mean < 3


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 96, 32])
def test_antialiased_views_are_as_sharp_as_pil(interpolation, size):
  views_of = sharpness.ours(interpolation, size, True)
  ratio = sharpness.energy(views_of, size, 2)
  ratio /= sharpness.energy(sharpness.pil(interpolation), size, 2)
  assert 0.98 < ratio < 1.02


def test_without_antialiasing_views_are_sharper():
  plain = sharpness.energy(sharpness.ours("bilinear", 224, False), 224, 2)
  assert plain > 1.3 * sharpness.energy(sharpness.pil("bilinear"), 224, 2)


@pytest.mark.parametrize(
  ("size", "interpolation"),
  [(24, "bicubic"), (60, "bilinear"), (60, "bicubic"), (128, "bilinear")],
)
def test_antialiased_views_equal_pil(interpolation, size):
  """Shrunk by up to 5, enlarged, and one after the other along the axes."""
  source = Source("test", 1, interpolation=interpolation, antialias=True)
  view_list = [crops.Crop(size, (0.1, 1.0), (0.3, 3.0), 0.5)] * 3
  _, worst = compare(pale(photograph(0, 120, 90)), "PNG", view_list, source)
  assert worst <= 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("side", [1600, 401])
def test_large_images_are_decoded_or_averaged_down(file_format, side):
  """Views of 48 pixels out of crops of up to 1600: halved once or more."""
  view_list = [crops.Crop(48, (0.1, 1.0), RATIO, 0.5)] * 2
  image = photograph(1, side, side * 3 // 4)
  mean, _ = compare(image, file_format, view_list)
  assert mean < 5


@pytest.mark.parametrize(
  ("antialias", "sides"), [(False, (375, 188, 47)), (True, (375, 375, 188))]
)
def test_partial_decoding_is_used(monkeypatch, antialias, sides):
  """A quarter of the pixels when every view shrinks by more than 2, or 6."""
  sizes = []
  cut = decode._parts

  def spy(image, *arguments):
    sizes.append(tuple(tf.shape(image).numpy()))
    return cut(image, *arguments)

  monkeypatch.setattr(decode, "_parts", spy)
  source = Source("test", 1, antialias=antialias)
  contents = encode(photograph(0, 500, 375))
  uniforms = tf.fill([1, crops.NUM_UNIFORMS], 0.5)
  for size, side in zip((375, 150, 40), sides, strict=True):
    crop = crops.Crop(size, (0.75, 0.75), (1.0, 1.0), 0.0)
    decode.train_views(source, tf.constant(contents), uniforms, [crop])
    assert sizes.pop()[:2] == (side, side)


def test_arrays_are_records_too():
  """uint8 pixels with any number of channels."""
  image = np.random.default_rng(0).integers(0, 256, (30, 40, 7), np.uint8)
  source = Source("test", 1, channels=7)
  crop = crops.Crop(16, (0.2, 1.0), RATIO, 0.0)
  uniforms = tf.fill([1, crops.NUM_UNIFORMS], 0.3)
  (views,) = decode.train_views(source, tf.constant(image), uniforms, [crop])
  assert views.shape == (1, 16, 16, 7)
  out = decode.eval_view(source, tf.constant(image), 30, 30)
  np.testing.assert_array_equal(out, image[:, 5:35])


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_evaluation_equals_pil(file_format):
  """Antialiased: resize the shorter side to 36, crop 32."""
  image = photograph(0, 120, 90)
  contents = encode(image, file_format)
  dataset = tf.data.Dataset.from_tensors(contents).map(
    lambda record: decode.eval_view(SOURCE, record, 36, 32)
  )
  out = next(dataset.as_numpy_iterator())
  expected = Image.open(io.BytesIO(contents))
  expected = expected.resize((48, 36), Image.BICUBIC).crop((8, 2, 40, 34))
  difference = np.abs(out - np.asarray(expected, np.int32))
  assert difference.max() <= (1 if file_format == "PNG" else 4)


def test_evaluation_leaves_the_right_size_alone():
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  contents = encode(Image.fromarray(image), "PNG")
  out = decode.eval_view(SOURCE, tf.constant(contents), 32, 32)
  np.testing.assert_array_equal(out, image)


# --- Images that are too large ------------------------------------------------

# A canvas and three frames within it.
ANIMATION = {
  "save_all": True,
  "append_images": [photograph(n, WIDTH, HEIGHT).convert("P") for n in (1, 2)],
}


@pytest.mark.parametrize("name", [*FORMATS, "animation"])
def test_the_limit_is_of_the_pixels_that_the_header_has(name):
  pixels = WIDTH * HEIGHT
  if name == "animation":
    photo = photograph(0, WIDTH, HEIGHT).convert("P")
    contents = encode(photo, "GIF", **ANIMATION)
  else:
    contents = encoded(name)
  record = tf.constant(contents)
  at_limit = decode.decode_pixels(record, 3, pixels)
  np.testing.assert_array_equal(at_limit, decode.decode_pixels(record, 3))
  with pytest.raises(tf.errors.OpError, match=r"data\.max_pixels"):
    decode.decode_pixels(record, 3, pixels - 1)
  crop = crops.Crop(8, (1.0, 1.0), (1.0, 1.0), 0.0)
  small = Source("test", 1, max_pixels=pixels - 1)
  dataset = tf.data.Dataset.from_tensors(record).map(
    lambda record: decode.train_views(
      small, record, tf.fill([1, crops.NUM_UNIFORMS], 0.5), [crop]
    )
  )
  with pytest.raises(tf.errors.OpError, match=r"data\.max_pixels"):
    next(dataset.as_numpy_iterator())


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_header_is_an_error_and_nothing_worse(name):
  contents = encoded(name)
  parts = tf.data.Dataset.from_tensor_slices(
    [contents[:end] for end in range(40)]
  )
  images = parts.map(lambda record: decode.decode_pixels(record, 3))
  assert not list(images.ignore_errors(log_warning=False))


def png_bomb(side: int) -> bytes:
  """A small file that announces many pixels."""
  return encode(Image.new("1", (side, side)), "PNG")


def test_a_bomb_costs_no_memory():
  contents = tf.constant(png_bomb(15_000))
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(tf.errors.OpError, match=r"data\.max_pixels"):
    decode.decode_pixels(contents, 3)
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 50_000  # Kilobytes; decoded it has 675 MB.


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("channels", [1, 3])
def test_shrinking_is_the_mean_of_whole_blocks(flip, channels):
  """Bit for bit what halving float32 images step by step gives."""
  image = np.random.default_rng(0).integers(
    0, 256, (101, 87, channels), np.uint8
  )
  ones = np.ones(4, np.float32)
  boxes = crops.Box(
    3 * ones, 5 * ones, 91 * ones, 77 * ones, tf.fill([4], flip > 0)
  )
  views = decode._cut(image, boxes, tf.range(4), channels)
  cut = image[3:94, 5:82].astype(np.float32)
  expected = cut[:, ::-1] if flip else cut
  for view in views:
    np.testing.assert_array_equal(view[0], expected)
    height, width = (side // 2 * 2 for side in expected.shape[:2])
    blocks = expected[:height, :width].reshape(
      height // 2, 2, width // 2, 2, channels
    )
    expected = blocks.mean((1, 3), dtype=np.float32)
