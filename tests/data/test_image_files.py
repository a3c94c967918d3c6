"""Files that TensorFlow alone would read wrongly, and what they become."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import boxes, decode, image_files, survey
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.source import Decoding, Source
from tests.data import made_sources
from tests.data.made_sources import encode, make, photograph

tifffile = pytest.importorskip("tifffile")

WIDTH, HEIGHT = 30, 20


def npy(array) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def tiff(array, **options) -> bytes:
  file = io.BytesIO()
  tifffile.imwrite(file, array, **options)
  return file.getvalue()


def numbers(dtype, *shape):
  rng = np.random.default_rng(0)
  if np.issubdtype(dtype, np.floating):
    return rng.uniform(-1, 1, shape).astype(dtype)
  return rng.integers(0, 4096, shape).astype(dtype)


GRAY = numbers(np.uint16, HEIGHT, WIDTH)
COLOR = numbers(np.uint16, HEIGHT, WIDTH, 3)
BANDS = numbers(np.uint16, HEIGHT, WIDTH, 13)
FLOATS = numbers(np.float32, HEIGHT, WIDTH, 3)
PLANAR = {"planarconfig": "separate", "photometric": "minisblack"}
BAND_OPTIONS = {"planarconfig": "contig", "photometric": "minisblack"}


def rgb_png(array) -> bytes:
  return tf.io.encode_png(array).numpy()


# Name -> (contents, value range, the numbers it holds as [h, w, C]).
DEEP = {
  "gray_png": (rgb_png(GRAY[..., None]), "0,4095", GRAY[..., None]),
  "rgb_png": (rgb_png(COLOR), (0, 4095), COLOR),
  "pgm": (encode(Image.fromarray(GRAY), "PPM"), "0,4095", GRAY[..., None]),
  "gray_tiff": (tiff(GRAY), "0,4095", GRAY[..., None]),
  "rgb_tiff": (tiff(COLOR, photometric="rgb"), "0,4095", COLOR),
  "deflated_tiff": (
    tiff(COLOR, photometric="rgb", compression="zlib"), "auto", COLOR,
  ),
  "big_endian_tiff": (tiff(COLOR, byteorder=">"), "0,4095", COLOR),
  "bands_tiff": (tiff(BANDS, **BAND_OPTIONS), "0,4095", BANDS),
  "planar_tiff": (
    tiff(np.moveaxis(BANDS, -1, 0), **PLANAR), "0,4095", BANDS,
  ),
  "pages_tiff": (
    tiff(np.stack([GRAY, GRAY // 2]), photometric="minisblack"),
    "0,4095",
    GRAY[..., None],
  ),
  "float_tiff": (tiff(FLOATS, photometric="rgb"), "-1,1", FLOATS),
  "npy": (npy(COLOR), "0,4095", COLOR),
  "fortran_npy": (npy(np.asfortranarray(COLOR)), "0,4095", COLOR),
  "gray_npy": (npy(GRAY), "0,4095", GRAY[..., None]),
  "float_npy": (npy(FLOATS), "-1,1", FLOATS),
  "bands_npy": (npy(BANDS), "auto", BANDS),
}  # fmt: skip


def limits_of(value_range):
  text = {"auto": "0,65535"}.get(value_range, value_range)
  return map(float, text.split(",") if isinstance(text, str) else text)


def levels_of(name):
  _, value_range, numbers = DEEP[name]
  low, high = limits_of(value_range)
  return (numbers.astype(np.float64) - low) / (high - low) * 255


@pytest.mark.parametrize("name", DEEP)
def test_numbers_that_are_not_8_bits_keep_their_value(name):
  contents, value_range, expected = DEEP[name]
  settings = SimpleNamespace(value_range=value_range)
  how = Decoding(
    expected.shape[-1], value_range=source_lib.value_range_of(settings)
  )
  pixels = decode.decode_pixels(tf.constant(contents), *how)
  assert pixels.dtype == tf.float32
  np.testing.assert_allclose(pixels, levels_of(name), atol=1e-3)
  with pytest.raises(tf.errors.OpError, match="not 8 bits; set data"):
    decode.decode_pixels(tf.constant(contents), expected.shape[-1])


@pytest.mark.parametrize(
  ("name", "suffix"), [("rgb_png", "png"), ("bands_tiff", "tif")]
)
def test_pipelines_do_not_round_them(name, suffix, tmp_path):
  contents, value_range, expected = DEEP[name]
  (tmp_path / f"x.{suffix}").write_bytes(contents)
  settings = {"path": tmp_path, "channels": expected.shape[-1]}
  source = make("folder", value_range=value_range, **settings)
  assert "scaled by the range given (data.value_range=" in source.summary()
  batches = made_sources.evaluated(source, batch_size=1, resize=20, crop=20)
  left = (WIDTH - HEIGHT) // 2
  assert batches["image"].dtype == np.float32
  np.testing.assert_allclose(
    batches["image"][0], levels_of(name)[:, left : left + HEIGHT], atol=1e-3
  )
  batch = next(made_sources.train_batches(source, 2))
  assert batch["views"][0].dtype == np.float32
  assert batch["views"][0].min() >= 0
  assert len(np.unique(batch["views"][0])) > 300  # More than 8 bits.
  refused = make("folder", **settings)
  with pytest.raises(UserError, match=r"not 8 bits; set data\.value_range"):
    next(made_sources.train_batches(refused, 2))


def test_8_bits_keep_their_own_range_beside_others(tmp_path):
  (tmp_path / "a.npy").write_bytes(npy(COLOR))
  (tmp_path / "b.png").write_bytes(encode(photograph(0, 30, 20), "PNG"))
  (tmp_path / "c.jpg").write_bytes(encode(photograph(0, 30, 20), "JPEG"))
  source = make("folder", path=tmp_path, value_range="0,4095")
  found = made_sources.evaluated(source, batch_size=3, resize=20, crop=20)
  png = np.asarray(photograph(0, 30, 20))[:, 5:25]
  np.testing.assert_array_equal(found["image"][1], png)
  assert np.abs(found["image"][2] - png).mean() < 10


@pytest.mark.parametrize(
  ("contents", "channels", "value_range", "reason"),
  [
    (npy(BANDS), 3, "auto", "it has 13 channels; data.channels is 3"),
    (encode(photograph(0, 9, 9)), 13, None, "3 channels; data.channels is 13"),
    (tiff(BANDS, **BAND_OPTIONS), 3, "auto", "13 channels; data.channels is 3"),
    (npy(FLOATS), 3, "auto", "float32, which has no range of its own"),
    (npy(FLOATS * np.nan), 3, (0, 1), "infinite or not a number"),
    (npy(COLOR)[:-5], 3, "auto", "not of the size that its header says"),
    (npy(np.zeros((2, 2), object)), 3, "auto", "expected .height, width"),
    (npy(np.zeros((2, 2, 2, 2))), 3, (0, 1), r"array of shape \(2, 2, 2, 2\)"),
    (npy(np.zeros((2, 2), "S3")), 3, (0, 1), r"its numbers are \|S3"),
    (b"", 3, None, "the file is empty"),
    (b"\0\0\0\x18ftypheic0000", 3, None, r"HEIC needs: pip install .*formats"),
    (b"\0\0\0\x18ftyphevc0000", 3, None, r"HEIC needs: pip install .*formats"),
    (b"\0\0\0\x18ftypmif10000heicmiaf", 3, None, "HEIC needs: pip install"),
    (b"\0\0\0\x18ftypmif10000avifmiaf", 3, None, "AVIF file is damaged"),
    (b"\xff\x0a0000", 3, None, r"JPEG XL needs: pip install .*formats"),
    (b"\0\0\0\x18ftypisom0000", 3, None, "^it is not an image$"),
    (npy(np.zeros((0, 5, 3), np.uint8)), 3, None, "it has 5 x 0 pixels"),
    (npy(np.zeros((5, 0), np.uint8)), 3, None, "it has 0 x 5 pixels"),
    (b"not an image", 3, None, "it is not an image"),
    (encode(photograph(0))[:900], 3, None, "truncated"),
  ],
)  # fmt: skip
def test_what_cannot_be_read_rightly_is_refused_and_says_why(
  contents, channels, value_range, reason
):
  how = Decoding(channels, value_range=value_range)
  with pytest.raises(tf.errors.OpError):
    decode.decode_pixels(tf.constant(contents), *how)
  said = image_files.why_unreadable(contents, how)
  assert "\n" not in said
  assert re.search(reason, said), said


def test_what_a_plug_in_would_read_is_counted(tmp_path, monkeypatch):
  """In one line of the log; what is kept of the others is not mixed up."""
  photograph(0, WIDTH, HEIGHT).save(tmp_path / "1.avif", quality=100)
  for name in ("2.HEIC", "3.heif", "4.jxl"):
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic0000")
  monkeypatch.setattr(image_files, "_reads", lambda kind: kind == "AVIF")
  source = make("folder", path=tmp_path)
  install = 'cannot be read without: pip install "imsvd_jax[formats]"'
  summary = f"; 2 HEIC files {install}; 1 JPEG XL file {install}"
  assert source.summary().endswith(summary)
  found = made_sources.evaluated(source, batch_size=4, resize=20, crop=20)
  np.testing.assert_array_equal(found["index"], [0])  # Of the readable ones.
  avif = np.asarray(photograph(0, WIDTH, HEIGHT), int)[:, 5:25]
  assert np.abs(found["image"][0] - avif).mean() < 5
  monkeypatch.setattr(image_files, "_reads", lambda kind: True)
  with_plug_ins = make("folder", path=tmp_path)
  assert "cannot be read" not in with_plug_ins.summary()
  assert with_plug_ins.fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
  ("plug_in", "file_format"), [("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")]
)
def test_plug_ins_read_their_files(plug_in, file_format):
  pytest.importorskip(plug_in)
  image_files.pillow()
  image = photograph(0, WIDTH, HEIGHT)
  pixels = image_files.read(encode(image, file_format), Decoding())
  assert np.abs(pixels - np.asarray(image, int)).mean() < 12


def test_the_kind_of_a_huge_image_is_told_without_a_warning(monkeypatch):
  """Its size is no attack: `data.max_pixels` is the limit, not Pillow's."""
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 3)
  image_files.pillow.cache_clear()
  contents = encode(photograph(0, WIDTH, HEIGHT), "PNG")
  assert survey._kind(contents) == "PNG RGB"


def test_a_palette_bmp_is_read_by_its_palette():
  """TensorFlow gives the numbers of the colors."""
  image = photograph(0, WIDTH, HEIGHT).convert("P", palette=Image.ADAPTIVE)
  pixels = decode.decode_pixels(tf.constant(encode(image, "BMP")), 3)
  np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))


# --- EXIF ---------------------------------------------------------------------


def oriented(image, orientation, file_format="JPEG") -> bytes:
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
  return encode(image, file_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_exif_says(orientation, file_format):
  contents = oriented(photograph(0, WIDTH, HEIGHT), orientation, file_format)
  expected = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
  turned = decode.decode_pixels(tf.constant(contents), 3, exif=True)
  difference = np.abs(turned.numpy() - np.asarray(expected, np.int32))
  assert difference.max() <= (4 if file_format == "JPEG" else 0)
  plain = decode.decode_pixels(tf.constant(contents), 3)
  if file_format != "TIFF":  # Whose orientation is part of the format.
    assert plain.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize(("orientation", "size"), [*enumerate([16, 90] * 4, 1)])
def test_views_of_a_turned_jpeg_are_those_of_the_turned_image(
  orientation, size
):
  """Small views are decoded at a fraction of the size; of part of the file."""
  contents = oriented(photograph(1, 208, 152), orientation)
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(contents)))
  again = encode(upright, "JPEG", quality=95, subsampling=0)
  view_list = [boxes.Crop(size, (0.1, 0.6), (0.75, 1.33), 0.5)] * 2
  uniforms = np.random.default_rng(7).random(
    (2, boxes.NUM_UNIFORMS), np.float32
  )
  views = [
    decode.train_views(
      Source("test", 1, exif=exif), tf.constant(file), uniforms, view_list
    )[0].numpy()
    for exif, file in ((True, contents), (False, again))
  ]
  difference = np.abs(views[0].astype(int) - views[1])
  assert difference.mean() < 3


def test_a_deep_tiff_is_turned_as_pillow_turns_it():
  contents = tiff(COLOR, photometric="rgb", extratags=[(274, 3, 1, 6, True)])
  pixels = decode.decode_pixels(tf.constant(contents), 3, value_range=(0, 4095))
  expected = np.rot90(COLOR, -1) * (255 / 4095)
  np.testing.assert_allclose(pixels, expected, atol=1e-3)


def test_orientation_of_damaged_exif_is_none():
  contents = oriented(photograph(0), 6)
  assert image_files.orientation(contents) == 6
  start = contents.index(b"Exif\0\0") + 6
  for end in range(start, start + 24):
    assert image_files.orientation(contents[:end]) in (1, 6)
  assert image_files.orientation(b"") == 1


def test_exif_is_the_same_in_training_and_evaluation(tmp_path):
  (tmp_path / "1.jpg").write_bytes(oriented(photograph(0, 40, 20), 6))
  source = make("folder", path=tmp_path, exif=True)
  found = made_sources.evaluated(source, batch_size=1, resize=20, crop=20)
  views = made_sources.views(
    size=20, crop_scale=(1.0, 1.0), crop_ratio=(0.5, 0.5), flip_prob=0.0
  )
  batch = next(made_sources.train_batches(source, 1, views=views))
  assert batch["views"][0].shape == (1, 2, 20, 20, 3)
  upright = photograph(0, 40, 20).transpose(Image.Transpose.ROTATE_270)
  whole = np.asarray(upright.resize((20, 20), Image.BICUBIC), int)
  assert np.abs(batch["views"][0][0, 0] - whole).mean() < 12
  center = np.asarray(upright.crop((0, 10, 20, 30)), int)
  assert np.abs(found["image"][0] - center).mean() < 5
