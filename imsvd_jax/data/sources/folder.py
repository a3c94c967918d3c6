"""A directory tree of the user's images.

    path/                        path/                     path/
      train/cat/1.jpg              cat/1.jpg                 any/depth/1.jpg
      train/dog/2.jpg              dog/more/2.jpg            2.png
      val/cat/3.jpg

A subfolder named like the split holds that split. For evaluation the names
"val", "validation", "valid" and "test" also count; the first that exists is
used. Without a "train" subfolder, all images outside of the subfolders with
these names are for training. If all images lie in two or more subfolders, the
first level of subfolders names the classes; otherwise the images are unlabeled.

Pipes, devices, sockets and looping links are skipped and counted: reading one
could wait for ever. A broken link is a bad image.

Gray, RGBA and CMYK files become RGB (alpha is dropped); an animation gives its
first frame. Orientation tags (EXIF) are not applied, as in torchvision.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import execution  # noqa: F401  # Before TensorFlow starts.
from imsvd_jax.data import source as source_lib

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
_EVALUATION_NAMES = ("val", "validation", "valid", "test")


def make(settings: ConfigDict, split: str) -> source_lib.Source | None:
  """Returns one split of `data.path`; None if it has no evaluation part."""
  source_lib.reject_num_examples(settings)
  source_lib.check_encoded_channels(settings)
  root = _root(settings.path)
  train, evaluation = _parts(root, settings)
  training_files = lambda: (
    _walk(train) if train else _walk(root, excluded=evaluation)
  )
  if split == settings.train_split:
    files, remarks = training_files()
    others = _folders_beside(root, [train, *evaluation]) if train else []
    if train and others:
      remarks.append(
        f"training uses only {os.path.basename(train)!r} and ignores the"
        f" folders of images beside it: {', '.join(others)}"
      )
    return _source(settings, train or root, files, _classes(files), remarks)
  if not evaluation:
    return None
  files, remarks = _walk(evaluation[0])
  classes = _classes(files)
  if classes:
    known = _classes(training_files()[0])
    classes = _training_classes(settings, known, classes)
  return _source(settings, evaluation[0], files, classes, remarks)


def _remarks(num_others: int, num_special: int) -> list[str]:
  counts = {
    "other files ignored": num_others,
    "pipes, devices or looping links skipped": num_special,
  }
  return [f"{count} {what}" for what, count in counts.items() if count]


def _root(path: str) -> str:
  if not path:
    raise UserError(
      "data.path is empty; source 'folder' expects the directory of images,"
      " for example --config.data.path=~/images."
    )
  path = path if "://" in path else os.path.expanduser(path)
  if not tf.io.gfile.isdir(path):
    found = "a file" if tf.io.gfile.exists(path) else "nothing"
    raise UserError(
      f"data.path is {path!r}: found {found}, expected a directory of images."
    )
  return path


def _parts(root: str, settings: ConfigDict) -> tuple[str | None, list[str]]:
  """Returns the training part or None, and the parts not to train on.

  The first of the latter is the evaluation part.
  """
  for name in filter(None, (settings.train_split, settings.eval_split)):
    if os.path.isabs(name) or ".." in name.split("/"):
      raise UserError(
        f"data.path has no split {name!r}: a split of a folder is one of its"
        " subfolders, such as 'train'."
      )
  path_of = lambda name: os.path.join(root, name)
  is_there = lambda name: bool(name) and tf.io.gfile.isdir(path_of(name))
  names = dict.fromkeys((settings.eval_split, *_EVALUATION_NAMES))
  evaluation = [path_of(name) for name in names if is_there(name)]
  train = settings.train_split
  return path_of(train) if is_there(train) else None, evaluation


def _folders_beside(root: str, parts: list[str]) -> list[str]:
  """Returns the folders of `root` that have images and are not in `parts`."""
  folders = _list(root).folders
  paths = {name: os.path.join(root, name) for name in sorted(folders)}
  return [
    name
    for name, path in paths.items()
    if path not in parts and _walk(path, first_only=True)[0]
  ]


def _walk(
  top: str, excluded: Collection[str] = (), *, first_only: bool = False
) -> tuple[list[str], list[str]]:
  """Returns the images below `top`, and remarks about what is left out.

  Paths are relative to `top`, with "/", in a fixed order. Links are followed; a
  directory that contains itself is entered once. Names that begin with a dot
  are skipped (macOS creates such files beside images), as are unreadable
  directories. `first_only` stops at the first folder with images.
  """
  remote = "://" in top
  entered = {os.path.realpath(top)}
  pending = [""]
  found: list[str] = []
  num_others = num_special = 0
  while pending and not (first_only and found):
    folder = pending.pop()
    path = os.path.join(top, folder)
    if path in excluded:
      continue
    try:
      files, folders, special = _list(path)
    except (OSError, tf.errors.OpError) as error:
      reason = getattr(error, "strerror", None) or str(error)
      if not folder:
        message = f"Cannot read the directory {top!r}: {reason}."
        raise UserError(message) from error
      _warn_once(path, reason)
      continue
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    num_others += len(files) - len(images)
    num_special += special
    found += [f"{folder}/{name}".lstrip("/") for name in sorted(images)]
    for name in sorted(folders, reverse=True):
      child = os.path.realpath(os.path.join(path, name))
      if remote or child not in entered:
        entered.add(child)
        pending.append(f"{folder}/{name}".lstrip("/"))
  return found, _remarks(num_others, num_special)


@functools.cache  # Every split walks the tree.
def _warn_once(path: str, reason: str) -> None:
  logging.warning("Cannot read %s: %s; it is skipped.", path, reason)


class _Listing(NamedTuple):
  """The names of what is visible in a directory."""

  files: list[str]
  folders: list[str]
  num_special: int = 0  # Neither regular files nor folders, links followed.


def _list(path: str) -> _Listing:
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
  return _Listing(files, folders, num_special)


def _list_remote(path: str) -> _Listing:
  names = [name.rstrip("/") for name in tf.io.gfile.listdir(path)]
  names = [name for name in names if name and not name.startswith(".")]
  # Each isdir is a request, so files with an extension of images are not asked.
  images = [n for n in names if n.lower().endswith(EXTENSIONS)]
  others = [n for n in names if not n.lower().endswith(EXTENSIONS)]
  folders = [n for n in others if tf.io.gfile.isdir(os.path.join(path, n))]
  return _Listing([*images, *sorted(set(others) - set(folders))], folders)


def _classes(files: list[str]) -> list[str]:
  """Returns the first-level folders if they can be classes, else nothing."""
  folders = {name.partition("/")[0] for name in files}
  loose = any("/" not in name for name in files)
  return [] if loose or len(folders) < 2 else sorted(folders)


def _training_classes(
  settings: ConfigDict, train: list[str], classes: list[str]
) -> list[str]:
  """Returns the classes that number the evaluation labels: those of training.

  The evaluation part may lack some of them but not have others. If the training
  part has no classes, the evaluation's own number its labels.
  """
  unknown = sorted(set(classes) - set(train))
  if train and unknown:
    raise UserError(
      f"The evaluation part of {settings.path!r} has class folder"
      f" {unknown[0]!r}, which the training part does not have; expected the"
      " same folders in both."
    )
  return train or classes


def _source(
  settings: ConfigDict,
  top: str,
  files: list[str],
  classes: list[str],
  remarks: list[str],
) -> source_lib.Source:
  if not files:
    raise UserError(
      f"No images under {top!r}; expected files that end in"
      f" {', '.join(EXTENSIONS)}."
    )
  labels = None
  if classes:
    number = {name: i for i, name in enumerate(classes)}
    numbers = [number[name.partition("/")[0]] for name in files]
    labels = np.array(numbers, np.int32)
  paths = [os.path.join(top, name) for name in files]
  table = tf.constant([os.fsencode(path) for path in paths])
  root = _root(settings.path)
  return source_lib.Source(
    name=f"folder:{top}",
    root=root,
    num_examples=len(files),
    num_classes=len(classes),
    label_names=tuple(classes),
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    max_pixels=source_lib.max_pixels_of(settings),
    labels=labels,
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: paths[index],
    stamp=lambda: _stamp(files, paths),
    remarks=tuple(remarks),
  )


def _stamp(files: list[str], paths: list[str]) -> str:
  """Returns a digest of the names, sizes and times of all files."""
  digest = hashlib.sha256()
  for name, path in zip(files, paths, strict=True):
    try:
      found = tf.io.gfile.stat(path)
      facts = f"{found.length} {found.mtime_nsec}"
    except tf.errors.OpError:  # A broken link.
      facts = "unreadable"
    digest.update(f"{name} {facts}\n".encode())
  return digest.hexdigest()
