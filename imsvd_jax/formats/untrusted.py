"""Limits for files from strangers, whose sizes and structure may be lies.

Memory and time are bounded by the size of the file, and whatever is wrong with
it is one line.
"""

import contextlib
import json
import math
import os
import zipfile
from collections.abc import Iterator
from typing import Any

from imsvd_jax.base.errors import UserError

# Trained weights hardly compress; a file may unpack to this many times its
# size, and in any case to this many bytes.
_GROWTH = 16
_ALWAYS_ALLOWED = 2**24
# Networks have some hundred arrays, optimizers some thousand.
_MAX_ARRAYS = 20_000
# The metadata of our own files has 4 levels and some thousand characters.
_MAX_DEPTH = 32
_MAX_CHARACTERS = 10**7
_LONGEST = 120  # Characters of a library's message.


@contextlib.contextmanager
def reading(path: str, expected: str) -> Iterator[None]:
  """Turns all that can go wrong in reading a file into one line.

  Args:
    path: The file.
    expected: What it should be, such as "torch file".

  Raises:
    UserError: Reading failed; the message names the file.
  """
  try:
    yield
  except UserError as error:
    text = str(error)
    message = text if path in text else f"{path}: {text}"
    raise UserError(one_line(message)) from error
  except OSError as error:
    if error.errno is None:  # A library's, about the content.
      raise UserError(_damaged(path, expected, error)) from error
    message = f"Cannot read {path}: {error.strerror}."
    raise UserError(one_line(message)) from error
  # A damaged file fails in dozens of ways.
  except Exception as error:
    raise UserError(_damaged(path, expected, error)) from error


def _damaged(path: str, expected: str, error: Exception) -> str:
  reason = (str(error).splitlines() or [""])[0] or type(error).__name__
  if len(reason) > _LONGEST:
    reason = f"{reason[:_LONGEST].rpartition(' ')[0]} ..."
  return one_line(
    f"{path} is not a complete {expected} ({reason}); download or export it"
    " again."
  )


def one_line(text: str, limit: int = 1000) -> str:
  """Returns text without line breaks and the codes that steer a terminal."""
  text = text if len(text) <= limit else f"{text[:limit]}..."
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_size(path: str, unpacked: int) -> None:
  """Checks how much memory the content of a file takes.

  Args:
    path: The file.
    unpacked: Bytes of the content.

  Raises:
    UserError: It is far more than the size of the file.
  """
  size = os.path.getsize(path)
  if unpacked > _GROWTH * size + _ALWAYS_ALLOWED:
    raise UserError(
      f"{path} has {size:,} bytes and would unpack to {unpacked:,}; expected"
      f" at most {_GROWTH} times its size. Save the weights uncompressed."
    )


def check_count(arrays: int) -> None:
  """Raises UserError for more arrays than any network has."""
  if arrays > _MAX_ARRAYS:
    raise UserError(
      f"The file has {arrays:,} arrays; expected at most {_MAX_ARRAYS:,}."
    )


def check_archive(path: str) -> None:
  """Checks a zip archive before anything in it is unpacked.

  Raises:
    UserError: It is encrypted or unpacks to far more than its size, or two of
      its members have one name.
  """
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
  check_count(len(members))
  check_size(path, sum(member.file_size for member in members))
  names = set()
  for member in members:
    # Other methods unpack to any size before the limit is seen.
    known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if not known or member.flag_bits & 1:
      raise UserError(
        f"{member.filename} is encrypted or compressed by an unusual method;"
        " expected the archive as NumPy or torch writes it."
      )
    if member.filename in names:
      raise UserError(f"{member.filename} is twice in the archive.")
    names.add(member.filename)


def parse_json(text: str) -> Any:
  """Returns what a text in JSON says; see `plain`.

  Raises:
    ValueError: It is not JSON, or too deep or too large.
  """
  try:
    return plain(json.loads(text))
  except RecursionError as error:
    raise ValueError("nested too deeply") from error


def plain(value: Any) -> Any:
  """Returns a value as JSON can hold it; NaN and infinity become None.

  Pickles can hold one list a million times, and in itself: the size of the
  result is limited.

  Raises:
    ValueError: It holds something that JSON lacks, or is too deep or too large.
  """
  left = _MAX_CHARACTERS

  def copied(value: Any, depth: int) -> Any:
    nonlocal left
    left -= 1 + (len(value) if isinstance(value, str) else 0)
    if depth > _MAX_DEPTH or left < 0:
      raise ValueError("nested too deeply, or too large")
    if isinstance(value, dict):
      # A pickle may hide the method `items` of the instance.
      return {
        copied(_key(key), depth): copied(inner, depth + 1)
        for key, inner in dict.items(value)
      }
    if isinstance(value, list | tuple):
      return [copied(inner, depth + 1) for inner in value]
    return _scalar(value)

  return copied(value, 0)


def _key(key: Any) -> str:
  if not isinstance(key, str):
    raise ValueError(f"a name is a {type(key).__name__}")
  return key


def _scalar(value: Any) -> Any:
  if isinstance(value, float) and not math.isfinite(value):
    return None
  # Python refuses to write longer whole numbers than some thousand digits.
  if isinstance(value, int) and abs(value) >= 2**63:
    raise ValueError("a whole number is too large")
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise ValueError(f"a {type(value).__name__} is not JSON")
