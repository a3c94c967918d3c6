"""The files of a pack: what `imsvd pack` writes and the source `pack` reads.

    pack.json          how it was packed, the classes, the shards of each split
    train-00000.data   squares, one after the other: JPEG files or pixels
    train-00000.json   names, sides, labels, ends and checksums of the squares

Nothing of it is code, and no file is named by another one. Each JSON file holds
the SHA-256 of its content, and `pack.json` those of the shards' lists: nothing
is exchanged unnoticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import printable

FORMAT = "imsvd pack 1"
MANIFEST = "pack.json"
ENCODINGS = ("jpeg", "raw")
MAX_SIZE, MAX_CHANNELS = 4096, 256
PARTS = ("train", "eval")  # How the names of shards begin.
_MAX_SIDE = 2**31 - 1


def shard_name(part: str, number: int) -> str:
  """Returns the name of a shard, without its ending."""
  return f"{part}-{number:05}"


def damaged(path: str, found: str) -> UserError:
  """Returns what to raise about a damaged file of a pack."""
  remedy = "the same `imsvd pack` command as before repairs it"
  if os.path.basename(path) == MANIFEST:  # It says what that command was.
    remedy = "remove the pack and make it again"
  return UserError(f"The pack is damaged: {printable(path)} {found}; {remedy}.")


# --- JSON with a checksum -----------------------------------------------------


def write_checked(path: str, content: Mapping[str, Any]) -> str:
  """Writes JSON with its SHA-256, which it returns."""
  digest = _digest(content)
  text = json.dumps({"sha256": digest, "content": content}, indent=0)
  files.write_whole(path, f"{text}\n".encode())
  return digest


def read_checked(path: str) -> tuple[str, dict[str, Any]]:
  """Returns the SHA-256 and the content of a file of `write_checked`.

  Raises:
    UserError: It is not there, or damaged.
  """
  text = files.read_if_there(path)
  if text is None:
    raise damaged(path, "is not there")
  try:
    found = json.loads(text)
    digest, content = found["sha256"], found["content"]
    if digest == _digest(content):
      return digest, dict(content)
  except (ValueError, TypeError, LookupError, RecursionError):
    pass
  raise damaged(path, "has another checksum than it says")


def _digest(content: Any) -> str:
  text = json.dumps(content, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str) -> str:
  """Returns the SHA-256 of a file."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


# --- Shards -------------------------------------------------------------------


class Shards:
  """The squares of a split: their places, and what is known of them."""

  def __init__(
    self, folder: str, part: str, digests: Sequence[str], how: Mapping[str, Any]
  ) -> None:
    """Reads and checks the lists of the shards, and the sizes of their data.

    Args:
      folder: The pack.
      part: How the names of the shards begin.
      digests: The checksum of each list.
      how: "encoding", "size", "channels", and "num_classes" with "multi_label".

    Raises:
      UserError: A shard is damaged.
    """
    self.how = how
    self._paths = [
      os.path.join(folder, shard_name(part, number))
      for number in range(len(digests))
    ]
    lists = list(map(self._list, self._paths, digests))
    joined = lambda key: itertools.chain.from_iterable(f[key] for f in lists)
    self.names: list[str] = list(joined("names"))
    self.sides = np.array([*joined("sides")], np.int32).reshape(-1, 2)
    self.labels = np.array([*joined("labels")], np.int32)
    self._crcs = np.array([*joined("crc32")], np.int64)
    counts = [len(found["names"]) for found in lists]
    self._shards = np.repeat(np.arange(len(lists)), counts)
    ends = [np.array(found["ends"], np.int64) for found in lists]
    self._ends = np.concatenate([np.zeros(0, np.int64), *ends])
    starts = [np.concatenate([[0], e[:-1]])[: len(e)] for e in ends]
    self._starts = np.concatenate([np.zeros(0, np.int64), *starts])

  def _list(self, path: str, digest: str) -> dict[str, Any]:
    """Returns a list of a shard after a check of all that is used of it."""
    found_digest, found = read_checked(f"{path}.json")
    if found_digest != digest:
      raise damaged(f"{path}.json", "is not the one that pack.json names")
    try:
      self._check_list(found)
    except (ValueError, TypeError, LookupError, OverflowError) as error:
      raise damaged(f"{path}.json", "does not fit the pack") from error
    check_size(path, found["ends"][-1] if found["ends"] else 0)
    return found

  def _check_list(self, found: Mapping[str, Any]) -> None:
    """Raises ValueError, or another error of its kind, at what does not fit."""
    count = len(found["names"])
    columns = [found[key] for key in ("ends", "crc32", "sides")]
    lengths = np.diff(np.array([0, *found["ends"]], np.int64))
    sides = np.array(found["sides"], np.int64).reshape(-1, 2)
    labels = np.array(found["labels"], np.int64)
    classes = self.how["num_classes"]
    several = self.how["multi_label"]
    shape = ((count, classes) if several else (count,)) if classes else (0,)
    fits = (
      all(isinstance(name, str) for name in found["names"]),
      all(len(column) == count for column in columns),
      (lengths > 0).all(),
      self.how["encoding"] != "raw" or (lengths == self._raw_bytes()).all(),
      ((sides > 0) & (sides <= _MAX_SIDE)).all(),
      labels.shape == shape or not count,
      ((labels >= -1) & (labels < (2 if several else classes))).all(),
    )
    if not all(fits):
      raise ValueError

  def _raw_bytes(self) -> int:
    return self.how["size"] ** 2 * self.how["channels"]

  def name(self, index: int) -> str:
    """Returns the name of an image, behind that of its shard."""
    shard = os.path.basename(self._paths[self._shards[index]])
    return printable(f"{shard}:{self.names[index]}")

  def content(self, index: int) -> bytes:
    """Returns a square as it is stored.

    Raises:
      UserError: It has another checksum than when it was packed.
    """
    path = f"{self._paths[self._shards[index]]}.data"
    start = int(self._starts[index])
    try:
      with open(path, "rb", buffering=0) as file:
        file.seek(start)
        found = file.read(int(self._ends[index]) - start)
    except OSError as error:
      raise damaged(path, f"cannot be read ({error.strerror})") from error
    if zlib.crc32(found) != self._crcs[index]:
      raise damaged(path, f"has another checksum at {self.name(index)!r}")
    return found


def check_size(path: str, expected: int) -> None:
  """Raises UserError if the data of a shard are not of the expected size."""
  data = f"{path}.data"
  try:
    found = os.stat(data)
  except OSError as error:
    raise damaged(data, f"cannot be read ({error.strerror})") from error
  if not stat.S_ISREG(found.st_mode):
    raise damaged(data, "is not a regular file")
  if found.st_size != expected:
    raise damaged(data, f"has {found.st_size} bytes instead of {expected}")


# --- Reading squares ----------------------------------------------------------


def reader(shards: Shards) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function from numbers of images to uint8 [b, S, S, C]."""
  size, channels = shards.how["size"], shards.how["channels"]
  if shards.how["encoding"] == "jpeg":
    return _jpeg_reader(shards, size, channels)

  def read(index: np.ndarray) -> np.ndarray:
    pixels = np.empty((len(index), size, size, channels), np.uint8)
    for row, number in zip(pixels, index, strict=True):
      content = np.frombuffer(shards.content(number), np.uint8)
      row[:] = content.reshape(row.shape)
    return pixels

  return read


def _jpeg_reader(
  shards: Shards, size: int, channels: int
) -> Callable[[np.ndarray], np.ndarray]:
  from imsvd_jax.data import decode  # It needs TensorFlow.

  decode_all = decode.squares_decoder(size, channels)

  def read(index: np.ndarray) -> np.ndarray:
    if not len(index):
      return np.zeros((0, size, size, channels), np.uint8)
    contents = [shards.content(number) for number in index]
    try:
      return decode_all(contents)
    except ValueError as error:
      names = f"{shards.name(index[0])} and {len(index) - 1} others"
      raise damaged(
        names, f"are not all JPEGs of {size} x {size} pixels"
      ) from error

  return read
