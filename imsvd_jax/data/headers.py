"""The size of GIF and WebP images by their headers, before they are decoded."""

import struct

import numpy as np


def sides(record: bytes | np.ndarray) -> np.ndarray:
  """Returns height and width, int64 [2].

  TensorFlow's decoder reads all frames of a GIF, so its frames count as if they
  lay below one another.

  Raises:
    ValueError: It is neither a GIF nor a WebP, or it ends too early.
  """
  if isinstance(record, np.ndarray):  # Of TensorFlow, outside of a graph.
    record = record.item()
  try:
    if record[:4] == b"GIF8":
      return np.array(_gif(record), np.int64)
    if record[:4] == b"RIFF" and record[8:12] == b"WEBP":
      return np.array(_webp(record), np.int64)
  except (struct.error, IndexError) as error:
    raise ValueError("an image that ends in its header") from error
  raise ValueError("not an image")


def _gif(record: bytes) -> tuple[int, int]:
  width, height, flags = struct.unpack_from("<HHB", record, 6)
  position = 13 + _palette(flags)
  rows = 0
  while position < len(record) and record[position] != 0x3B:  # Trailer.
    if record[position] == 0x2C:  # A frame.
      w, h, flags = struct.unpack_from("<4xHHB", record, position + 1)
      width, rows = max(width, w), rows + h
      position += 11 + _palette(flags)
    elif record[position] == 0x21:  # An extension.
      position += 2
    else:
      break  # The decoder stops here too.
    while position < len(record) and record[position]:  # Blocks of data.
      position += 1 + record[position]
    position += 1
  return max(rows, height), width


def _palette(flags: int) -> int:
  """Returns the bytes of the palette that the flags announce."""
  return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


def _webp(record: bytes) -> tuple[int, int]:
  kind = record[12:16]
  if kind == b"VP8X":
    width, height = (
      int.from_bytes(record[k : k + 3], "little") for k in (24, 27)
    )
    return height + 1, width + 1
  if kind == b"VP8L":
    (bits,) = struct.unpack_from("<I", record, 21)
    return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
  if kind == b"VP8 ":
    width, height = struct.unpack_from("<HH", record, 26)
    return height & 0x3FFF, width & 0x3FFF
  raise ValueError("a WebP of an unknown kind")
