"""A directory tree of the user's images.

    path/                        path/                     path/
      train/cat/1.jpg              cat/1.jpg                 any/depth/1.jpg
      train/dog/2.jpg              dog/more/2.jpg            2.png
      val/cat/3.jpg

`folder_splits` says which files belong to a split. If all images of a split lie
in two or more subfolders, the first level of subfolders names the classes;
otherwise the images are unlabeled, and the log says why. `data.labels` gives
labels in a table instead.

Pipes, devices, sockets and looping links are skipped and counted: reading one
could wait for ever. A broken link is a bad image.

Gray, RGBA and CMYK files become RGB (transparent pixels as `data.background`
says); an animation gives its first frame. `image_files` says which formats
there are.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import printable
from imsvd_jax.data import (
  execution,  # noqa: F401  # Before TensorFlow starts.
  image_files,
  label_tables,
)
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.sources import folder_splits
from imsvd_jax.data.sources.folder_listing import Found


def make(settings: ConfigDict, split: str) -> source_lib.Source | None:
  """Returns one split of `data.path`; None if it has no evaluation part.

  Raises:
    UserError: There is no such split, or no image in it; its classes are not
      those of training; `data.labels` does not fit.
  """
  source_lib.reject_num_examples(settings)
  layout = folder_splits.Layout(settings)
  part = layout.part(split)
  if part is None:
    return None
  found = part.found
  _check_not_empty(settings, part.top, found)
  if source_lib.setting(settings, "labels"):
    names, labels, why = label_tables.labels_of(settings, part)
  else:
    names, labels, why = _labels_by_folder(settings, layout, part)
  files = found.files
  if part.chosen is not None:
    files = [files[i] for i in part.chosen]
    labels = None if labels is None else labels[part.chosen]
  return _source(settings, part, files, names, labels, why)


def _labels_by_folder(
  settings: ConfigDict, layout: folder_splits.Layout, part: folder_splits.Part
) -> tuple[list[str], np.ndarray | None, str]:
  """Returns the names of the classes, the labels, and why there are none."""
  names, why = classes_of(part.found)
  if names and not part.is_train:
    train = classes_of(layout.training_files)[0]
    names = _training_classes(settings, train, names)
  if not names:
    return [], None, why
  number = {name: i for i, name in enumerate(names)}
  labels = [number[class_of(file)] for file in part.found.files]
  return names, np.array(labels, np.int32), ""


def class_of(file: str) -> str:
  """Returns the first folder of a file's path.

  In Unicode's NFC: macOS writes names in another form than other systems.
  """
  return unicodedata.normalize("NFC", file.partition("/")[0])


def classes_of(found: Found) -> tuple[list[str], str]:
  """Returns the first-level folders if they can be classes, else why not."""
  folders = {class_of(name) for name in found.files if "/" in name}
  loose = [name for name in found.files if "/" not in name]
  if len(folders) > 1 and not loose:
    return sorted(folders), ""
  if len(folders) > 1:
    beside = f"{printable(loose[0])!r}" + " and others" * (len(loose) > 1)
    return [], (
      f"{len(loose)} of {len(found.files)} images ({beside}) are beside the"
      f" {len(folders)} folders that could be classes; with labels once every"
      " image is in one of them"
    )
  without = sorted(found.folders_without_images - folders)
  if len(folders) == 1 and not loose and without:
    shown = ", ".join(map(printable, without[:3]))
    return [], (
      f"only one subfolder has images, {printable(folders.pop())!r}; there are"
      f" none in {shown}{', ...' * (len(without) > 3)}"
    )
  return [], ""


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
      f"The evaluation part of {printable(settings.path)!r} has class folder"
      f" {printable(unknown[0])!r}, which the training part does not have;"
      " expected the same folders in both."
    )
  return train or classes


def _check_not_empty(settings: ConfigDict, top: str, found: Found) -> None:
  extensions: tuple[str, ...] = image_files.EXTENSIONS
  if settings.channels not in (1, 3, 4):
    extensions = image_files.ARRAY_EXTENSIONS
  if not any(name.lower().endswith(extensions) for name in found.files):
    if found.files:
      raise UserError(
        f"data.channels is {settings.channels}; expected 1, 3 or 4 for image"
        f" files other than {', '.join(extensions)}, and there are none of"
        f" these under {printable(top)!r}."
      )
    raise UserError(
      f"No images under {printable(top)!r}; expected files that end in"
      f" {', '.join(extensions)}{found.ignored_text(' (ignored: {})')}."
    )


def _source(
  settings: ConfigDict,
  part: folder_splits.Part,
  files: list[str],
  names: list[str],
  labels: np.ndarray | None,
  why_unlabeled: str,
) -> source_lib.Source:
  paths = [os.path.join(part.top, name) for name in files]
  table = tf.constant([os.fsencode(path) for path in paths])
  value_range = source_lib.value_range_of(settings)
  unread = image_files.missing_readers(files)
  remarks = [*unread, *part.found.remarks(), *part.remarks]
  if value_range is not None:
    meaning = "of their type" if value_range == "auto" else "given"
    remarks.append(
      f"numbers that are not 8 bits are scaled by the range {meaning}"
      f" (data.value_range={value_range})"
    )
  return source_lib.Source(
    name=f"folder:{printable(part.top)}{part.slice_text}",
    root=printable(folder_splits.root_of(settings.path)),
    num_examples=len(files),
    num_classes=len(names),
    label_names=tuple(map(printable, names)),
    labels=labels,
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: printable(paths[index]),
    # With another plug-in, other images can be read.
    stamp=lambda: "".join([_stamp(files, paths), *unread]),
    remarks=tuple(remarks),
    why_unlabeled=why_unlabeled,
    **source_lib.decoding_of(settings),
  )


def _stamp(files: list[str], paths: list[str]) -> str:
  """Returns a digest of the names, sizes and times of all files."""
  digest = hashlib.sha256()
  for name, path in zip(files, paths, strict=True):
    try:
      found = tf.io.gfile.stat(os.fsencode(path))
      facts = f"{found.length} {found.mtime_nsec}"
    except tf.errors.OpError:  # A broken link.
      facts = "unreadable"
    digest.update(os.fsencode(f"{name} {facts}\n"))
  return digest.hexdigest()
