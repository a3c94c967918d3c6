"""A directory tree of images: the user's own.

    path/                        path/                     path/
      train/cat/1.jpg              cat/1.jpg                 any/depth/1.jpg
      train/dog/2.jpg              dog/more/2.jpg            2.png
      val/cat/3.jpg

A part of the tree named like the split (for evaluation also "val",
"validation", "valid" or "test") holds that split; without a "train" part,
everything outside of the evaluation part is for training. When all images lie
in two or more sub-folders, the first level of sub-folders names the classes;
otherwise the images are unlabelled.

Gray, RGBA and CMYK files become RGB (alpha is dropped); an animation gives its
first frame. Orientation tags (EXIF) are not applied, as in torchvision.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.data import source as source_lib
from imsvd_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")
_EVALUATION_NAMES = ("val", "validation", "valid", "test")


def make(settings: Any, split: str) -> source_lib.Source | None:
  """Returns one split of `data.path`; None if it has no evaluation part."""
  source_lib.reject_num_examples(settings)
  source_lib.check_encoded_channels(settings)
  root = _root(settings.path)
  train, evaluation = _parts(root, settings)
  if split == settings.train_split:
    files = list(_walk(train or root, () if train else (evaluation,)))
    return _source(settings, train or root, files, _classes(files))
  if evaluation is None:
    return None
  files = list(_walk(evaluation))
  classes = _classes(files)
  if classes:
    classes = _training_classes(settings, classes)
  return _source(settings, evaluation, files, classes)


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


def _parts(root: str, settings: Any) -> tuple[str | None, str | None]:
  """The directories of the training and the evaluation part, if there."""

  def first(names: tuple[str, ...]) -> str | None:
    paths = [os.path.join(root, name) for name in names if name]
    return next((path for path in paths if tf.io.gfile.isdir(path)), None)

  train = first((settings.train_split,))
  evaluation = first((settings.eval_split, *_EVALUATION_NAMES))
  return train, evaluation


def _walk(top: str, excluded: tuple[str | None, ...] = ()) -> Iterator[str]:
  """Paths of the images below `top`, relative to it with "/", in order.

  Links are followed; a directory that contains itself is entered once. Names
  that begin with a dot are skipped (macOS leaves such files beside images).
  """
  remote = "://" in top
  entered = {os.path.realpath(top)}
  pending = [""]
  while pending:
    folder = pending.pop()
    path = os.path.join(top, folder)
    if path in excluded:
      continue
    files, folders = _list_remote(path) if remote else _list_local(path)
    for name in sorted(files):
      if name.lower().endswith(EXTENSIONS):
        yield f"{folder}/{name}".lstrip("/")
    for name in sorted(folders, reverse=True):
      child = os.path.realpath(os.path.join(path, name))
      if remote or child not in entered:
        entered.add(child)
        pending.append(f"{folder}/{name}".lstrip("/"))


def _list_local(path: str) -> tuple[list[str], list[str]]:
  """Names of the visible files and folders in a directory."""
  files, folders = [], []
  with os.scandir(path) as entries:
    for entry in entries:
      if not entry.name.startswith("."):
        (folders if entry.is_dir() else files).append(entry.name)
  return files, folders


def _list_remote(path: str) -> tuple[list[str], list[str]]:
  names = [name.rstrip("/") for name in tf.io.gfile.listdir(path)]
  names = [name for name in names if name and not name.startswith(".")]
  # Asking about every file costs a request each; images have an extension.
  images = [n for n in names if n.lower().endswith(EXTENSIONS)]
  others = [n for n in names if not n.lower().endswith(EXTENSIONS)]
  folders = [n for n in others if tf.io.gfile.isdir(os.path.join(path, n))]
  return images, folders


def _classes(files: list[str]) -> list[str]:
  """First-level folders, if they can be classes; else an empty list."""
  folders = {name.partition("/")[0] for name in files}
  loose = any("/" not in name for name in files)
  return [] if loose or len(folders) < 2 else sorted(folders)


def _training_classes(settings: Any, classes: list[str]) -> list[str]:
  """The classes of the training part, which number the labels.

  An evaluation part may lack some of them but may not have others. Without
  classes for training, the evaluation's own number its labels.
  """
  train = make(settings, settings.train_split).label_names
  unknown = sorted(set(classes) - set(train))
  if train and unknown:
    raise UserError(
      f"The evaluation part of {settings.path!r} has class folder"
      f" {unknown[0]!r}, which the training part does not have; expected the"
      f" same folders in both."
    )
  return list(train) or classes


def _source(
  settings: Any, top: str, files: list[str], classes: list[str]
) -> source_lib.Source:
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
  )


def _stamp(files: list[str], paths: list[str]) -> str:
  """Names, sizes and times of all files: one that is replaced has others."""
  digest = hashlib.sha256()
  for name, path in zip(files, paths, strict=True):
    found = tf.io.gfile.stat(path)
    digest.update(f"{name} {found.length} {found.mtime_nsec}\n".encode())
  return digest.hexdigest()
