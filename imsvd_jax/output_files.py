"""Files that commands write: checked before the work, put in place whole."""

import contextlib
import os
from collections.abc import Iterator

from imsvd_jax.errors import UserError


def check_output(path: str) -> str:
  """Returns the path, with ~ expanded, if a file can be written there.

  Raises:
    UserError: It cannot; better known before the work than after.
  """
  path = os.path.expanduser(path)
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    raise UserError(f"The folder {folder} does not exist; create it.")
  if os.path.isdir(path):
    raise UserError(f"{path} is a folder; give the name of a file.")
  if os.path.exists(path) and not os.path.isfile(path):
    raise UserError(
      f"{path} is no regular file and would be replaced by one; choose another"
      " --output."
    )
  if not os.access(folder, os.W_OK):
    raise UserError(f"May not write into {folder}; choose another --output.")
  return path


def check_directory(path: str | os.PathLike[str]) -> None:
  """Checks that a directory is there, or can be made, to write files into.

  Raises:
    UserError: It cannot; better known before the work than after.
  """
  existing = os.fspath(path)
  if "://" in existing:
    return
  existing = os.path.abspath(existing)
  while not os.path.exists(existing):
    existing = os.path.dirname(existing)
  if not os.path.isdir(existing):
    raise UserError(f"{existing} is a file; --output names a directory.")
  if not os.access(existing, os.W_OK):
    raise UserError(f"May not write into {existing}; choose another --output.")


@contextlib.contextmanager
def in_place_when_done(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives another name to write to; renames it when the block succeeds."""
  unfinished = f"{os.fspath(path)}.unfinished"
  try:
    yield unfinished
    os.replace(unfinished, path)
  except OSError as error:
    if str(error.filename) not in ("None", unfinished):
      raise  # Of another file.
    raise UserError(f"Cannot write {path}: {error.strerror}.") from error
  finally:
    if os.path.exists(unfinished):
      os.remove(unfinished)
