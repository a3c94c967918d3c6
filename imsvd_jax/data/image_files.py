"""Image files that TensorFlow cannot decode, or decodes to other pixels.

Pillow reads pictures of 8 bits per level and gray ones of more; tifffile reads
TIFF of any depth and number of channels, of which Pillow keeps 8 bits and four
channels; NumPy reads arrays. JPEG and PNG are TensorFlow's (`decode`).

Pixels that are not of 8 bits need a range of values, low to high, which becomes
0 to 255 without rounding.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import io
import logging
import math
import os
import struct
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from imsvd_jax.data.source import ALPHA_DROPPED, Decoding

EXTENSIONS = (
  *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif"),
  *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".npy"),
  *(".avif", ".heic", ".heif", ".jxl"),
)
# Files that can have any number of channels.
ARRAY_EXTENSIONS = (".tif", ".tiff", ".npy")

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601, as PIL's.
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION_TAG = 0x0112
_PLUGINS = ("pillow_heif", "pillow_jxl")  # The extra `formats`.
# Formats that not every Pillow reads: what they need, the names of their files.
_EXTRA = 'pip install "imsvd_jax[formats]"'
_NEEDS = {
  "AVIF": ("pip install --upgrade pillow", (".avif",)),
  "HEIC": (_EXTRA, (".heic", ".heif")),
  "JPEG XL": (_EXTRA, (".jxl",)),
}
_HEIC_BRANDS = {
  *(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"),
  *(b"mif1", b"mif2", b"msf1"),  # Of any codec; AVIF has a brand of its own.
}


def read(contents: bytes, how: Decoding) -> np.ndarray:
  """Returns the pixels of a file.

  Returns:
    uint8 [height, width, C]; with a range of values float32, 0 to 255.

  Raises:
    ValueError: It cannot be read, or not rightly; one line says why.
  """
  try:
    if contents.startswith(_NPY):
      return _array(contents, how)
    return _picture(contents, how)
  except ValueError as error:
    raise ValueError(" ".join(str(error).split())) from error
  except Exception as error:  # Damaged files fail in many ways.
    reason = " ".join(str(error).split()) or type(error).__name__
    if kind := _kind(contents):
      reason = f"the {kind} file is damaged: {reason}"
    raise ValueError(reason) from error


def why_unreadable(contents: bytes, how: Decoding) -> str:
  """Returns why a file counts as a bad image, in a few words."""
  if not contents:
    return "the file is empty"
  try:
    read(contents, how)
  except ValueError as error:
    return str(error)
  return "the file is damaged"  # Pillow is more lenient.


def orientation(contents: bytes) -> int:
  """Returns the EXIF orientation of a JPEG or PNG file: 1 to 8; 1 if absent."""
  for mark in (b"Exif\0\0", b"eXIf"):
    start = contents.find(mark, 0, 1 << 16)
    if start >= 0:
      with contextlib.suppress(struct.error):
        return _orientation(contents[start + len(mark) :])
  return 1


def _orientation(exif: bytes) -> int:
  order = {b"II": "<", b"MM": ">"}.get(exif[:2])
  if order is None:
    return 1
  (start,) = struct.unpack_from(f"{order}I", exif, 4)
  (count,) = struct.unpack_from(f"{order}H", exif, start)
  for entry in range(start + 2, start + 2 + 12 * count, 12):
    tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
    if tag == _ORIENTATION_TAG:
      return value if kind == 3 and 1 <= value <= 8 else 1
  return 1


# --- Numbers and channels -----------------------------------------------------


def limits(dtype: np.dtype, value_range: Any) -> tuple[float, float]:
  """Returns the values that are black and white.

  Raises:
    ValueError: No range was given, or the type has none of its own.
  """
  has_range = np.issubdtype(dtype, np.integer)
  if value_range is None:
    hint = '"auto" or ' if has_range else ""
    raise ValueError(
      f"its numbers are {dtype}, not 8 bits; set data.value_range to"
      f" {hint}LOW,HIGH"
    )
  if value_range != "auto":
    return value_range
  if not has_range:
    raise ValueError(
      f"its numbers are {dtype}, which has no range of its own; set"
      " data.value_range to LOW,HIGH instead of 'auto'"
    )
  info = np.iinfo(dtype)
  return float(info.min), float(info.max)


def _levels(pixels: np.ndarray, how: Decoding) -> np.ndarray:
  """Returns numbers of any type as levels of 0 to 255."""
  if pixels.dtype == bool:
    pixels = pixels * np.uint8(255)
  if pixels.dtype.kind not in "uif":
    raise ValueError(f"its numbers are {pixels.dtype}")
  if pixels.dtype == np.uint8:
    return pixels if how.value_range is None else pixels.astype(np.float32)
  try:
    low, high = limits(pixels.dtype, how.value_range)
  except ValueError as error:
    least, most = pixels.min(), pixels.max()
    raise ValueError(
      f"{error} (here they are {least:g} to {most:g})"
    ) from error
  if not np.isfinite(pixels).all():
    raise ValueError("some of its numbers are infinite or not a number")
  # In place: a large image has many numbers. 32 bits hold 16 exactly.
  levels = pixels.astype(np.float32 if pixels.itemsize <= 2 else np.float64)
  levels -= low
  levels *= 255 / (high - low)
  return np.clip(levels, 0, 255, out=levels).astype(np.float32, copy=False)


def _with_channels(
  pixels: np.ndarray, channels: int, *, alpha: bool = False
) -> np.ndarray:
  """Returns levels [h, w, found] as [h, w, channels].

  Only what gray, color and `alpha`, the last channel, mean is converted.
  """
  found = pixels.shape[-1]
  if found == channels:
    return pixels
  color = pixels[..., : found - alpha]
  if color.shape[-1] not in (1, 3) or channels not in _MODES:
    plural = "" if found == 1 else "s"
    raise ValueError(
      f"it has {found} channel{plural}; data.channels is {channels}"
    )
  if channels == 1:
    gray = color if color.shape[-1] == 1 else color @ _LUMINANCE[:, np.newaxis]
    return _rounded(gray, pixels.dtype)
  if color.shape[-1] == 1:
    color = np.repeat(color, 3, axis=-1)
  if channels == 3:
    return color
  opaque = np.full_like(color[..., :1], 255)
  return np.concatenate([color, pixels[..., -1:] if alpha else opaque], -1)


def _rounded(levels: np.ndarray, dtype: np.dtype) -> np.ndarray:
  return np.round(levels).astype(dtype) if dtype == np.uint8 else levels


def _check_size(height: int, width: int, how: Decoding) -> None:
  """Raises ValueError before an image that is too large is decoded."""
  if not height * width:
    raise ValueError(f"it has {width} x {height} pixels")
  if height * width > how.max_pixels:
    raise ValueError(
      f"it has {width} x {height} pixels, more than data.max_pixels ="
      f" {how.max_pixels}"
    )


# --- NumPy --------------------------------------------------------------------


def _array(contents: bytes, how: Decoding) -> np.ndarray:
  file = io.BytesIO(contents)
  version = np.lib.format.read_magic(file)
  read_header = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }[version]
  shape, fortran_order, dtype = read_header(file)
  if len(shape) not in (2, 3) or dtype.hasobject:
    raise ValueError(
      f"it is an array of shape {shape} and type {dtype}; expected [height,"
      " width] or [height, width, channels] of numbers"
    )
  _check_size(shape[0], shape[1], how)
  if len(contents) - file.tell() != math.prod(shape) * dtype.itemsize:
    raise ValueError("the array is not of the size that its header says")
  order = "F" if fortran_order else "C"
  pixels = np.frombuffer(contents, dtype, offset=file.tell())
  pixels = pixels.reshape(shape, order=order)
  if pixels.ndim == 2:
    pixels = pixels[..., np.newaxis]
  return _with_channels(_levels(pixels, how), how.channels)


# --- Pillow -------------------------------------------------------------------


@functools.cache
def pillow() -> Any:
  """Returns PIL.Image, with the formats of the installed plug-ins."""
  from PIL import Image

  Image.MAX_IMAGE_PIXELS = None  # data.max_pixels is the limit.
  # Of damaged headers; an image that cannot be read is an exception.
  warnings.filterwarnings("ignore", module="PIL")
  logging.getLogger("PIL").setLevel(logging.CRITICAL)
  for name in _PLUGINS:
    with contextlib.suppress(ImportError):
      plugin = importlib.import_module(name)
      getattr(plugin, "register_heif_opener", lambda: None)()
  return Image


def _picture(contents: bytes, how: Decoding) -> np.ndarray:
  from PIL import ImageOps, UnidentifiedImageError

  is_tiff = contents.startswith(_TIFF)
  try:
    image = pillow().open(io.BytesIO(contents))
  except UnidentifiedImageError as error:
    if is_tiff:
      return _tiff(contents, how)
    raise ValueError(_why_unidentified(contents)) from error
  _check_size(image.height, image.width, how)
  if is_tiff and not _has_8_bits(image):
    return _tiff(contents, how)
  if image.format == "PNG" and contents[24] == 16:
    limits(np.dtype(np.uint16), how.value_range)  # TensorFlow reads it.
  is_widened = image.mode == "I" and image.format in ("PPM", "PNG")
  if how.exif:
    image = ImageOps.exif_transpose(image)  # Forgets the format.
  return _of_pillow(image, how, is_widened=is_widened)


def _of_pillow(image: Any, how: Decoding, *, is_widened: bool) -> np.ndarray:
  """Returns the pixels of a Pillow image, which may have widened 16 bits."""
  if image.mode == "F" or image.mode.startswith("I"):
    pixels = np.asarray(image)
    if is_widened:
      pixels = pixels.astype(np.uint16)
    elif image.mode != "F":
      pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    return _with_channels(_levels(pixels[..., np.newaxis], how), how.channels)
  if how.channels in _MODES:
    if how.background != ALPHA_DROPPED and how.channels != 4:
      image = _on_background(image, how.background)
    image = image.convert(_MODES[how.channels])
  pixels = np.asarray(image)
  if pixels.ndim == 2:
    pixels = pixels[..., np.newaxis]
  return _with_channels(_levels(pixels, how), how.channels)


def _on_background(image: Any, level: int) -> Any:
  """Returns a Pillow image as it is seen on a level of gray."""
  if not image.has_transparency_data:
    return image
  color = image.convert("RGBA")
  behind = pillow().new("RGBA", image.size, (level, level, level, 255))
  return pillow().alpha_composite(behind, color)


def _why_unidentified(contents: bytes) -> str:
  kind = _kind(contents)
  if not kind:
    return "it is not an image"
  if _reads(kind):
    return f"the {kind} file is damaged"
  return (
    f"it is not an image that Pillow reads; {kind} needs: {_NEEDS[kind][0]}"
  )


def _kind(contents: bytes) -> str:
  """Returns the key of _NEEDS whose files begin like this one, or ""."""
  if contents.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
    return "JPEG XL"
  if contents[4:8] != b"ftyp":
    return ""
  end = min(int.from_bytes(contents[:4], "big"), 1 << 10)
  brands = {contents[i : i + 4] for i in (8, *range(16, end, 4))}
  if brands & {b"avif", b"avis"}:
    return "AVIF"
  return "HEIC" if brands & _HEIC_BRANDS else ""


def _reads(kind: str) -> bool:
  """Returns whether Pillow, as installed here, reads a key of _NEEDS."""
  from PIL import features

  if kind == "AVIF":
    return bool(features.check("avif"))
  return _NEEDS[kind][1][0] in pillow().registered_extensions()


def missing_readers(files: Iterable[str]) -> list[str]:
  """Returns what to install for those files that cannot be read here."""
  extensions = collections.Counter(
    os.path.splitext(name)[1].lower() for name in files
  )
  remarks = []
  for kind, (needs, names) in _NEEDS.items():
    count = sum(extensions[name] for name in names)
    if count and not _reads(kind):
      files = f"{count} {kind} file{'s' * (count > 1)}"
      remarks.append(f"{files} cannot be read without: {needs}")
  return remarks


# --- TIFF ---------------------------------------------------------------------


def _has_8_bits(image: Any) -> bool:
  """Returns whether Pillow reads all bits of a TIFF: unsigned, at most 8."""
  bits, kinds = (image.tag_v2.get(tag, (1,)) for tag in (258, 339))
  return max(np.atleast_1d(bits)) <= 8 and set(np.atleast_1d(kinds)) <= {1}


def _tiff(contents: bytes, how: Decoding) -> np.ndarray:
  """Reads the first page of a TIFF of any depth and number of channels."""
  try:
    import tifffile
  except ImportError as error:
    raise ValueError("it needs the package tifffile") from error

  logging.getLogger("tifffile").setLevel(logging.CRITICAL)
  with tifffile.TiffFile(io.BytesIO(contents)) as file:
    page = file.pages.first
    _check_size(page.imagelength, page.imagewidth, how)
    alpha = _alpha(page)
    if page.samplesperpixel not in (how.channels, 1, 3, 3 + alpha, 1 + alpha):
      raise ValueError(
        f"it has {page.samplesperpixel} channels; data.channels is"
        f" {how.channels}"
      )
    if page.axes not in ("YX", "YXS", "SYX") or page.photometric not in (1, 2):
      kind = getattr(page.photometric, "name", page.photometric)
      raise ValueError(f"it is a TIFF of axes {page.axes} and colors {kind}")
    try:
      pixels = page.asarray()
    except (ImportError, ValueError) as error:
      raise ValueError(
        f"its compression needs more: {error} (pip install imagecodecs)"
      ) from error
    turn = page.tags.get("Orientation")
  pixels = {"YX": lambda p: p[..., np.newaxis], "SYX": _channels_last}.get(
    page.axes, lambda p: p
  )(pixels)
  levels = _levels(pixels, how)
  if alpha and how.background != ALPHA_DROPPED and how.channels in (1, 3):
    levels = _mixed(levels, how.background, _is_premultiplied(page))
    alpha = False
  pixels = _with_channels(levels, how.channels, alpha=alpha)
  # Pillow always turns TIFF, too.
  return _turned(pixels, int(turn.value)) if turn else pixels


def _channels_last(pixels: np.ndarray) -> np.ndarray:
  return np.moveaxis(pixels, 0, -1)


def _alpha(page: Any) -> bool:
  """Returns whether the last channel of gray or color is opacity."""
  has_room = page.samplesperpixel in (2, 4)
  return has_room and tuple(page.extrasamples)[:1] in ((1,), (2,))


def _is_premultiplied(page: Any) -> bool:
  """Returns whether colors are multiplied by their opacity already."""
  return tuple(page.extrasamples)[:1] == (1,)


def _mixed(
  levels: np.ndarray, background: int, premultiplied: bool
) -> np.ndarray:
  """Returns color [h, w, 1 or 3] of color and opacity, seen on a level."""
  color, opacity = levels[..., :-1], levels[..., -1:].astype(np.float32) / 255
  seen = color if premultiplied else color * opacity
  seen = np.clip(seen + background * (1 - opacity), 0, 255)
  return _rounded(seen, levels.dtype).astype(levels.dtype)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Returns stored pixels [h, w, C] as EXIF says that they are seen."""
  if orientation >= 5:
    pixels = pixels.swapaxes(0, 1)
  if orientation in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if orientation in (3, 4, 7, 8):
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels)
