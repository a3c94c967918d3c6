"""A directory tree of images: the user's own.

    path/                        path/                     path/
      train/cat/1.jpg              cat/1.jpg                 any/depth/1.jpg
      train/dog/2.jpg              dog/more/2.jpg            2.png
      val/cat/3.jpg

A part of the tree named like the split (for evaluation also "val",
"validation", "valid" or "test", the first that is there) holds that split;
without a "train" part, everything outside of all parts with these names is for
training. When all images lie
in two or more sub-folders, the first level of sub-folders names the classes;
otherwise the images are unlabelled.

Gray, RGBA and CMYK files become RGB (alpha is dropped); an animation gives its
first frame. Orientation tags (EXIF) are not applied, as in torchvision.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import source as source_lib

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
_EVALUATION_NAMES = ("val", "validation", "valid", "test")


class _Tree(NamedTuple):
  """Images below a directory: paths relative to it with "/", in order.

  And the number of visible files that are none.
  """

  files: list[str]
  num_others: int


def make(settings: Any, split: str) -> source_lib.Source | None:
  """Returns one split of `data.path`; None if it has no evaluation part."""
  source_lib.reject_num_examples(settings)
  source_lib.check_encoded_channels(settings)
  root = _root(settings.path)
  train, evaluation = _parts(root, settings)
  if split == settings.train_split:
    return _training(settings, root, train, evaluation)
  if not evaluation:
    return None
  tree = _walk(evaluation[0])
  classes = _classes(tree.files)
  if classes:
    known = _classes(_training_tree(root, train, evaluation).files)
    classes = _training_classes(settings, known, classes)
  return _source(settings, evaluation[0], tree, classes)


def _training(
  settings: Any, root: str, train: str | None, evaluation: list[str]
) -> source_lib.Source:
  tree = _training_tree(root, train, evaluation)
  remarks = []
  if train:
    others = _folders_beside(root, [train, *evaluation])
    if others:
      remarks.append(
        f"only {os.path.basename(train)!r} is trained on, not the folders of"
        f" images beside it: {', '.join(others)}"
      )
  return _source(settings, train or root, tree, _classes(tree.files), remarks)


def _training_tree(
  root: str, train: str | None, evaluation: list[str]
) -> _Tree:
  return _walk(train) if train else _walk(root, excluded=evaluation)


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


def _parts(root: str, settings: Any) -> tuple[str | None, list[str]]:
  """The directory of the training part, if there, and those not to train on.

  The first of the latter is the evaluation part.
  """
  path_of = lambda name: os.path.join(root, name)
  is_there = lambda name: bool(name) and tf.io.gfile.isdir(path_of(name))
  names = dict.fromkeys((settings.eval_split, *_EVALUATION_NAMES))
  evaluation = [path_of(name) for name in names if is_there(name)]
  train = settings.train_split
  return path_of(train) if is_there(train) else None, evaluation


def _folders_beside(root: str, parts: list[str]) -> list[str]:
  """Names of the folders of `root` that have images and are none of `parts`."""
  _, folders = _list(root)
  paths = {name: os.path.join(root, name) for name in sorted(folders)}
  return [
    name
    for name, path in paths.items()
    if path not in parts and _walk(path, first_only=True).files
  ]


def _walk(
  top: str, excluded: Collection[str] = (), *, first_only: bool = False
) -> _Tree:
  """The images below `top`.

  Links are followed; a directory that contains itself is entered once. Names
  that begin with a dot are skipped (macOS leaves such files beside images), and
  directories that cannot be read.

  Args:
    top: Where to begin.
    excluded: Directories not to enter.
    first_only: Whether one image is enough.

  Raises:
    UserError: `top` itself cannot be read.
  """
  remote = "://" in top
  entered = {os.path.realpath(top)}
  pending = [""]
  found, num_others = [], 0
  while pending and not (first_only and found):
    folder = pending.pop()
    path = os.path.join(top, folder)
    if path in excluded:
      continue
    try:
      files, folders = _list(path)
    except (OSError, tf.errors.OpError) as error:
      reason = getattr(error, "strerror", None) or error
      if not folder:
        raise UserError(f"Cannot read the directory {top!r}: {reason}.") from (
          error
        )
      _warn_once(path, reason)
      continue
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    num_others += len(files) - len(images)
    found += [f"{folder}/{name}".lstrip("/") for name in sorted(images)]
    for name in sorted(folders, reverse=True):
      child = os.path.realpath(os.path.join(path, name))
      if remote or child not in entered:
        entered.add(child)
        pending.append(f"{folder}/{name}".lstrip("/"))
  return _Tree(found, num_others)


@functools.cache  # A tree is walked for each split.
def _warn_once(path: str, reason: Any) -> None:
  logging.warning("Cannot read %s: %s; it is left out.", path, reason)


def _list(path: str) -> tuple[list[str], list[str]]:
  """Names of the visible files and folders in a directory."""
  return _list_remote(path) if "://" in path else _list_local(path)


def _list_local(path: str) -> tuple[list[str], list[str]]:
  files, folders = [], []
  with os.scandir(path) as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      try:
        (folders if entry.is_dir() else files).append(entry.name)
      except OSError as error:  # A link to itself.
        _warn_once(entry.path, error.strerror)
  return files, folders


def _list_remote(path: str) -> tuple[list[str], list[str]]:
  names = [name.rstrip("/") for name in tf.io.gfile.listdir(path)]
  names = [name for name in names if name and not name.startswith(".")]
  # Asking about every file costs a request each; images have an extension.
  images = [n for n in names if n.lower().endswith(EXTENSIONS)]
  others = [n for n in names if not n.lower().endswith(EXTENSIONS)]
  folders = [n for n in others if tf.io.gfile.isdir(os.path.join(path, n))]
  return [*images, *sorted(set(others) - set(folders))], folders


def _classes(files: list[str]) -> list[str]:
  """First-level folders, if they can be classes; else an empty list."""
  folders = {name.partition("/")[0] for name in files}
  loose = any("/" not in name for name in files)
  return [] if loose or len(folders) < 2 else sorted(folders)


def _training_classes(
  settings: Any, train: list[str], classes: list[str]
) -> list[str]:
  """The classes of the training part, which number the labels.

  An evaluation part may lack some of them but may not have others. Without
  classes for training, the evaluation's own number its labels.
  """
  unknown = sorted(set(classes) - set(train))
  if train and unknown:
    raise UserError(
      f"The evaluation part of {settings.path!r} has class folder"
      f" {unknown[0]!r}, which the training part does not have; expected the"
      f" same folders in both."
    )
  return train or classes


def _source(
  settings: Any,
  top: str,
  tree: _Tree,
  classes: list[str],
  remarks: Collection[str] = (),
) -> source_lib.Source:
  files = tree.files
  if tree.num_others:
    remarks = [f"{tree.num_others} other files ignored", *remarks]
  if not files:
    raise UserError(
      f"No images under {top!r}; expected files that end in"
      f" {', '.join(EXTENSIONS)}."
    )
  labels = None
  if classes:
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[name.partition("/")[0]] for name in files]
    labels = np.array(labels, np.int32)
  paths = [os.path.join(top, name) for name in files]
  table = tf.constant([os.fsencode(path) for path in paths])
  return source_lib.Source(
    name=f"folder:{top}",
    num_examples=len(files),
    num_classes=len(classes),
    label_names=tuple(classes),
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    labels=labels,
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: paths[index],
    stamp=lambda: _stamp(files, paths),
    remarks=tuple(remarks),
  )


def _stamp(files: list[str], paths: list[str]) -> str:
  """Names, sizes and times of all files: one that is replaced has others."""
  digest = hashlib.sha256()
  for name, path in zip(files, paths, strict=True):
    found = tf.io.gfile.stat(path)
    digest.update(f"{name} {found.length} {found.mtime_nsec}\n".encode())
  return digest.hexdigest()
