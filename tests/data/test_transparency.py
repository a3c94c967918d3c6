"""Transparent pixels of image files, as they are seen on a background."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from configs import folder_r18, folder_r50
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import decode
from tests.data import made_sources
from tests.data.made_sources import encode, make, photograph

tifffile = pytest.importorskip("tifffile")

WIDTH, HEIGHT = 30, 20
RNG = np.random.default_rng(0)
OPACITY = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
COLOR = np.asarray(photograph(0, WIDTH, HEIGHT))


def mixed(color, opacity, level):
  """The definition, in float64."""
  share = np.float64(opacity)[..., None] / 255
  return color * share + level * (1 - share)


def with_opacity(mode="RGB", opacity=OPACITY) -> Image.Image:
  image = Image.fromarray(COLOR).convert(mode)
  image.putalpha(Image.fromarray(opacity))
  return image


def with_a_transparent_color(mode: str) -> tuple[Image.Image, np.ndarray]:
  """An image of a few colors, and where its color number 2 is."""
  image = Image.fromarray(COLOR).quantize(8)
  at = np.asarray(image) == 2
  return (image if mode == "P" else image.convert(mode)), at


def pixels_of(contents, channels=3, background=255, **options) -> np.ndarray:
  found = decode.decode_pixels(
    tf.constant(contents), channels, background=background, **options
  )
  return found.numpy()


FILES = {
  "png": ("RGB", "PNG", {}),
  "gray_png": ("L", "PNG", {}),
  "webp": ("RGB", "WEBP", {"lossless": True, "exact": True}),
  "tiff": ("RGB", "TIFF", {}),
}


@pytest.mark.parametrize("level", [255, 0, 127])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", FILES)
def test_files_with_opacity(name, channels, level):
  mode, file_format, options = FILES[name]
  contents = encode(with_opacity(mode), file_format, **options)
  color = np.asarray(Image.fromarray(COLOR).convert(mode).convert("RGB"))
  expected = mixed(color, OPACITY, level)
  if channels == 1:
    expected = expected @ [[0.299], [0.587], [0.114]]
  found = pixels_of(contents, channels, level)
  assert found.dtype == np.uint8
  assert np.abs(found - expected).max() <= 1.5


@pytest.mark.parametrize(
  ("mode", "file_format"), [("P", "PNG"), ("RGB", "PNG"), ("P", "GIF")]
)
def test_files_with_a_transparent_color(mode, file_format):
  image, at = with_a_transparent_color(mode)
  assert 0 < at.sum() < at.size
  color = np.asarray(image.convert("RGB"))
  key = 2 if mode == "P" else tuple(map(int, color[at][0]))
  contents = encode(image, file_format, transparency=key)
  found = pixels_of(contents)
  assert (found[at] == 255).all()
  np.testing.assert_array_equal(found[~at], color[~at])
  shown = pixels_of(contents, background=-1)  # As without the key.
  np.testing.assert_array_equal(shown[~at], color[~at])
  assert (shown[at] != 255).any()


def test_a_transparent_image_is_not_black():
  contents = encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")
  assert (pixels_of(contents) == 255).all()
  assert (pixels_of(contents, background=-1) == 0).all()


def test_opaque_images_are_what_they_were():
  opaque = np.full_like(OPACITY, 255)
  for contents in (
    encode(with_opacity(opacity=opaque), "PNG"),
    encode(Image.fromarray(COLOR), "PNG"),
    encode(Image.fromarray(COLOR), "JPEG"),
  ):
    np.testing.assert_array_equal(
      pixels_of(contents), pixels_of(contents, background=-1)
    )


def test_four_channels_keep_their_opacity():
  contents = encode(with_opacity(), "PNG")
  found = pixels_of(contents, channels=4)
  np.testing.assert_array_equal(found[..., 3], OPACITY)
  np.testing.assert_array_equal(found[..., :3], COLOR)


def deep(channels):
  """Numbers of 16 bits, of which the last channel is opacity."""
  numbers = RNG.integers(0, 4096, (HEIGHT, WIDTH, channels))
  numbers[..., -1] = RNG.integers(0, 65536, (HEIGHT, WIDTH))
  return numbers.astype(np.uint16)


def test_a_png_of_16_bits():
  numbers = deep(4)
  contents = tf.io.encode_png(numbers).numpy()
  levels = numbers[..., :3] * (255 / 4095)
  expected = mixed(levels, numbers[..., 3] / 257, 255)
  found = pixels_of(contents, value_range=(0, 4095))
  np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("premultiplied", [False, True])
@pytest.mark.parametrize("channels", [2, 4])
def test_a_tiff_of_16_bits(channels, premultiplied):
  numbers = deep(channels)
  share = numbers[..., -1:] / 65535
  levels = numbers[..., :-1] * (255 / 65535)
  if premultiplied:
    numbers[..., :-1] = numbers[..., :-1] * share
  file = io.BytesIO()
  tifffile.imwrite(
    file,
    numbers,
    photometric="rgb" if channels == 4 else "minisblack",
    planarconfig="contig",
    extrasamples=["assocalpha" if premultiplied else "unassalpha"],
  )
  found = pixels_of(file.getvalue(), value_range="auto")
  expected = np.broadcast_to(levels * share + 255 * (1 - share), found.shape)
  np.testing.assert_allclose(found, expected, atol=0.02)


def test_training_and_evaluation_see_the_background(tmp_path):
  (tmp_path / "1.png").write_bytes(
    encode(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG")
  )
  source = make("folder", path=tmp_path, background=200)
  found = made_sources.evaluated(source, batch_size=1, resize=20, crop=20)
  assert (found["image"] == 200).all()
  batch = next(made_sources.train_batches(source, 1))
  assert (batch["views"][0] == 200).all()


def test_folders_are_seen_on_white():
  for recipe in (folder_r18, folder_r50):
    assert recipe.get_config().data.background == 255


@pytest.mark.parametrize("level", [-2, 256])
def test_a_level_that_is_none(level, tmp_path):
  (tmp_path / "1.png").write_bytes(encode(photograph(0), "PNG"))
  with pytest.raises(
    UserError, match=rf"background is {level}; expected .*255"
  ):
    make("folder", path=tmp_path, background=level)
