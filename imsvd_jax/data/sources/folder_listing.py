"""The images below a directory, and what else is there."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import os
from collections.abc import Collection
from typing import NamedTuple

import tensorflow as tf

from imsvd_jax.base.errors import UserError, counted
from imsvd_jax.base.files import printable
from imsvd_jax.data.image_files import EXTENSIONS

logger = logging.getLogger(__name__)

# Folders that systems create beside images, with thumbnails or forks of them;
# in lower case.
NOT_THE_USERS = {
  *("@eadir", "__macosx", "#recycle", "#snapshot", "@recycle", "lost+found"),
  *("$recycle.bin", "system volume information"),
}
_EXTENSIONS_SHOWN = 5


@dataclasses.dataclass
class Found:
  """What a directory tree has.

  Attributes:
    files: Paths of images, relative to the top, with "/", in a fixed order.
    ignored: Count of other files by their extension.
    num_special: Pipes, devices, sockets and looping links.
    skipped: Names of folders that systems create.
    folders_without_images: Folders of the first level.
  """

  files: list[str] = dataclasses.field(default_factory=list)
  ignored: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  num_special: int = 0
  skipped: set[str] = dataclasses.field(default_factory=set)
  folders_without_images: set[str] = dataclasses.field(default_factory=set)

  def remarks(self) -> list[str]:
    """Returns what is left out, for the log."""
    remarks = []
    if self.ignored:
      count = sum(self.ignored.values())
      others = counted(count, "other file")
      remarks.append(f"{others} ignored{self.ignored_text(' ({})')}")
    if self.num_special:
      remarks.append(
        f"{self.num_special} pipes, devices or looping links skipped"
      )
    if self.skipped:
      remarks.append(f"folders {', '.join(sorted(self.skipped))} skipped")
    return remarks

  def ignored_text(self, form: str) -> str:
    """Returns the most frequent ignored extensions, put into a text."""
    counts = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
    counts = counts[:_EXTENSIONS_SHOWN]
    shown = ", ".join(f"{printable(name)} {count}" for name, count in counts)
    more = ", ..." * (len(self.ignored) > len(counts))
    return form.format(shown + more) if shown else ""


def walk(
  top: str, excluded: Collection[str] = (), *, first_only: bool = False
) -> Found:
  """Returns what is below `top`, except for the directories `excluded`.

  Links are followed, but not into these; a directory that contains itself is
  entered once. Names that begin with a dot are skipped (macOS creates such
  files beside images), as are unreadable directories. `first_only` stops at the
  first folder with images.
  """
  remote = "://" in top
  entered = {os.path.realpath(top)}
  closed = tuple(
    real
    for real in (os.path.join(os.path.realpath(path), "") for path in excluded)
    if not os.path.join(os.path.realpath(top), "").startswith(real)
  )
  pending = [""]
  found = Found()
  while pending and not (first_only and found.files):
    folder = pending.pop()
    path = os.path.join(top, folder)
    if path in excluded:
      continue
    try:
      files, folders, special = list_directory(path)
    except (OSError, tf.errors.OpError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      if not folder:
        message = f"Cannot read the directory {printable(top)!r}: {reason}."
        raise UserError(message) from error
      _warn_once(path, reason)
      continue
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    for name in set(files) - set(images):
      found.ignored[os.path.splitext(name)[1].lower() or "no extension"] += 1
    found.num_special += special
    found.files += [f"{folder}/{name}".lstrip("/") for name in sorted(images)]
    for name in sorted(folders, reverse=True):
      if name.lower() in NOT_THE_USERS:
        found.skipped.add(name)
        continue
      child = os.path.realpath(os.path.join(path, name))
      is_closed = os.path.join(child, "").startswith(closed)
      if remote or not (is_closed or child in entered):
        entered.add(child)
        pending.append(f"{folder}/{name}".lstrip("/"))
        if not folder and os.path.join(top, name) not in excluded:
          found.folders_without_images.add(name)
  found.folders_without_images -= {f.partition("/")[0] for f in found.files}
  return found


@functools.cache  # Every split walks the tree.
def _warn_once(path: str, reason: str) -> None:
  logger.warning("Cannot read %s: %s; it is skipped.", printable(path), reason)


class Listing(NamedTuple):
  """The names of what is visible in a directory."""

  files: list[str]
  folders: list[str]
  num_special: int = 0  # Neither regular files nor folders, links followed.


def list_directory(path: str) -> Listing:
  """Returns what is in a directory of this machine or of a bucket."""
  if "://" in path:
    return _list_remote(path)
  files: list[str] = []
  folders: list[str] = []
  num_special = 0
  with os.scandir(path) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      try:
        if entry.is_dir():
          folders.append(entry.name)
        elif entry.is_file() or not os.path.exists(entry.path):
          # A broken link too, which is a bad image.
          files.append(entry.name)
        else:
          num_special += 1
      except OSError as error:  # A link to itself.
        _warn_once(entry.path, error.strerror or str(error))
        num_special += 1
  return Listing(files, folders, num_special)


def _list_remote(path: str) -> Listing:
  names = [name.rstrip("/") for name in tf.io.gfile.listdir(path)]
  names = [name for name in names if name and not name.startswith(".")]
  # Each isdir is a request, so files with an extension of images are not asked.
  images = [n for n in names if n.lower().endswith(EXTENSIONS)]
  others = [n for n in names if not n.lower().endswith(EXTENSIONS)]
  folders = [n for n in others if tf.io.gfile.isdir(os.path.join(path, n))]
  return Listing([*images, *sorted(set(others) - set(folders))], folders)
