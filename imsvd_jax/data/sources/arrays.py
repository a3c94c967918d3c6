"""The user's own arrays: an .npz file, or .npy files, of images of one size.

`data.path` is one of

    FILE.npz        with the arrays train_images, train_labels, val_images, ...,
                    test_labels (MedMNIST's layout), or images and labels
    FOLDER          with train_images.npy, ..., or images.npy and labels.npy
    .../images.npy  that file, and labels.npy beside it

Images are uint8 [n, height, width] or [n, height, width, channels]. Labels may
be absent; they are integers from 0, [n] or [n, 1], or for several classes per
image 0 or 1 for each, [n, classes]. Files of .npy are mapped into memory, not
read: they may be larger than it. Nothing is unpickled.

A split is the part before the underscore; "val", "validation" and "valid" are
one. Arrays without that part are for training.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError, listing
from imsvd_jax.data import source as source_lib

T = TypeVar("T")

_VALIDATION = ("val", "validation", "valid")
_MAX_CLASSES = 2**20  # A larger label is no number of a class.

# Name of an array -> a function that reads it.
_Contents = Mapping[str, Callable[[], np.ndarray]]


def make(settings: ConfigDict, split: str) -> source_lib.Source | None:
  """Returns one split of `data.path`; None if it has no evaluation part."""
  source_lib.reject_num_examples(settings)
  path = os.path.expanduser(settings.path)
  contents = _contents(path)
  prefix = _prefix(contents, path, settings, split)
  if prefix is None:
    return None
  images = _images(contents[f"{prefix}images"](), f"{prefix}images", path)
  labels, several, num_classes = None, False, 0
  if f"{prefix}labels" in contents:
    labels, several = _labels(contents, prefix, path, len(images))
    num_classes = labels.shape[1] if several else _num_classes(contents, path)
  return source_lib.Source(
    name=f"arrays:{path} {prefix.rstrip('_')}".rstrip(),
    num_examples=len(images),
    num_classes=num_classes,
    label_names=tuple(map(str, range(num_classes))),
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    images=_with_channels(images, settings, path),
    labels=labels,
    multi_label=several,
    describe=lambda index: f"{index} of {prefix}images in {path}",
  )


def split_names(settings: ConfigDict) -> list[str]:
  """Returns the splits of `data.path`."""
  contents = _contents(os.path.expanduser(settings.path))
  found = [key for key in contents if re.fullmatch(r"(.*_)?images", key)]
  return [key.removesuffix("images").rstrip("_") or "train" for key in found]


# --- Files --------------------------------------------------------------------


def _contents(path: str) -> _Contents:
  """Returns what the path holds, unread."""
  if not path:
    raise UserError(
      "data.path is empty; source 'arrays' expects a file of arrays, for"
      " example --config.data.path=images.npz."
    )
  if os.path.isdir(path):
    files = [name for name in os.listdir(path) if name.endswith(".npy")]
    return _mapped(path, files)
  if not os.path.isfile(path):
    found = "a pipe or a device" if os.path.exists(path) else "nothing"
    raise UserError(
      f"data.path is {path!r}: found {found}, expected an .npz file, or .npy"
      " files or their folder, on this machine."
    )
  folder, name = os.path.split(path)
  if name.endswith("images.npy"):
    return _mapped(folder, [name, name.replace("images.npy", "labels.npy")])
  if not name.endswith(".npz"):
    raise UserError(
      f"data.path is {path!r}; expected the name of a file of arrays: it ends"
      " in .npz, or in images.npy."
    )
  names = _read(path, lambda: _of_npz(path, lambda file: list(file)))
  return {key: functools.partial(_read_member, path, key) for key in names}


def _mapped(folder: str, names: list[str]) -> _Contents:
  paths = {n.removesuffix(".npy"): os.path.join(folder, n) for n in names}
  return {
    key: functools.partial(_map, path)
    for key, path in paths.items()
    if os.path.isfile(path)
  }


def _map(path: str) -> np.ndarray:
  load = functools.partial(np.load, path, mmap_mode="r", allow_pickle=False)
  return _read(path, load)


def _read_member(path: str, key: str) -> np.ndarray:
  load = lambda: _of_npz(path, lambda file: file[key])
  return _read(f"{key} in {path}", load)


def _of_npz(path: str, what: Callable[[Any], T]) -> T:
  with open(path, "rb") as file:  # NumPy leaves a damaged one open.
    return what(np.load(file, allow_pickle=False))


def _read(what: str, load: Callable[[], T]) -> T:
  try:
    return load()
  except Exception as error:  # Damaged files fail in many ways.
    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    raise UserError(
      f"Cannot read {what}: {type(error).__name__}: {reason}; expected arrays"
      " of numbers as numpy.savez or numpy.save writes them."
    ) from error


def _prefix(
  contents: _Contents, path: str, settings: ConfigDict, split: str
) -> str | None:
  """Returns how the names of a split's arrays begin; None: there is none.

  Raises:
    UserError: There is no such split.
  """
  names = _VALIDATION if split in _VALIDATION else (split,)
  for name in names:
    if f"{name}_images" in contents:
      return f"{name}_"
  found = [key for key in sorted(contents) if key.endswith("images")]
  is_training = split == settings.train_split
  if is_training and "images" in contents:
    return ""
  if not is_training and set(found) <= {
    "images",
    f"{settings.train_split}_images",
  }:
    return None
  raise UserError(
    f"{path} has no {split}_images: found"
    f" {listing(found or sorted(contents) or ['no array'])}; name the split"
    " with data.train_split and data.eval_split, such as 'train' and 'test'."
  )


# --- What they hold -----------------------------------------------------------


def _images(images: np.ndarray, name: str, path: str) -> np.ndarray:
  """Returns images as [n, height, width, C]; raises if they are none."""
  if images.dtype != np.uint8 or images.ndim not in (3, 4):
    raise UserError(
      f"{name} in {path} is {images.dtype} {list(images.shape)}; expected uint8"
      " [n, height, width] or [n, height, width, channels]."
    )
  if not images.size:
    raise UserError(
      f"{name} in {path} is empty: {list(images.shape)}; expected at least one"
      " image."
    )
  return images if images.ndim == 4 else images[..., np.newaxis]


def _with_channels(
  images: np.ndarray, settings: ConfigDict, path: str
) -> np.ndarray:
  """Returns the images with data.channels channels; gray is repeated."""
  found, expected = images.shape[-1], settings.channels
  if found == expected:
    return images
  if found == 1 and expected == 3:
    return np.broadcast_to(images, (*images.shape[:-1], expected))
  raise UserError(
    f"Images of {path} have {found} channels, but data.channels is {expected};"
    f" set --config.data.channels={found}, with as many data.mean and data.std."
  )


def _labels(
  contents: _Contents, prefix: str, path: str, count: int
) -> tuple[np.ndarray, bool]:
  """Returns int32 labels, and whether an image may have several."""
  name = f"{prefix}labels"
  labels = contents[name]()
  if labels.ndim == 2 and labels.shape[1] == 1:
    labels = labels[:, 0]
  if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2):
    raise UserError(
      f"{name} in {path} is {labels.dtype} {list(labels.shape)}; expected"
      " integers [n], or [n, classes] of 0 and 1."
    )
  if len(labels) != count:
    raise UserError(
      f"{name} in {path} has {len(labels)} rows for {count} images; expected"
      " one for each."
    )
  several = labels.ndim == 2
  most = 1 if several else _MAX_CLASSES - 1
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high > most:
    raise UserError(
      f"{name} in {path} has values from {low} to {high}; expected"
      f" {'0 and 1' if several else 'numbers of classes, from 0'}."
    )
  return np.array(labels, np.int32), several


def _num_classes(contents: _Contents, path: str) -> int:
  """Returns one more than the largest label of all splits."""
  prefixes = [key.removesuffix("labels") for key in contents]
  largest = 0
  for prefix, key in zip(prefixes, contents, strict=True):
    if key.endswith("labels") and f"{prefix}images" in contents:
      found, _ = _labels(contents, prefix, path, len(contents[key]()))
      largest = max(largest, int(found.max()))
  return largest + 1
