"""Sources of images, and the batches that are made of them.

What handles encoded images needs TensorFlow and is imported late: arrays do
without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Literal, overload

from ml_collections import ConfigDict

from imsvd_jax.base import errors
from imsvd_jax.data import quiet_import
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import arrays, digits, scenes, shapes, synthetic


def _folder(settings: ConfigDict, split: str) -> Source | None:
  from imsvd_jax.data.sources import folder

  return folder.make(settings, split)


def _pack(settings: ConfigDict, split: str) -> Source | None:
  from imsvd_jax.data.sources import packed

  return packed.make(settings, split)


def _tfds(settings: ConfigDict, split: str) -> Source:
  from imsvd_jax.data.sources import tfds

  return tfds.make(settings, split)


def _tar(settings: ConfigDict, split: str) -> Source:
  from imsvd_jax.data.sources import tar

  return tar.make(settings, split)


# name -> make(settings, split) -> Source
SOURCES = {
  "arrays": arrays.make,
  "digits": digits.make,
  "folder": _folder,
  "pack": _pack,
  "scenes": scenes.make,
  "shapes": shapes.make,
  "synthetic": synthetic.make,
  "tar": _tar,
  "tfds": _tfds,
}
_WITH_TENSORFLOW = ("folder", "pack", "tar", "tfds")
# Those that draw data.num_examples images; others know their own number.
DRAWN = ("scenes", "shapes", "synthetic")
WITHOUT_FILES = ("digits", *DRAWN)


@overload
def make_source(settings: ConfigDict, split: Literal["train"]) -> Source: ...


@overload
def make_source(settings: ConfigDict, split: str) -> Source | None: ...


def make_source(settings: ConfigDict, split: str) -> Source | None:
  """Returns one split of the source that `settings` names.

  Args:
    settings: config.data; `name` is a key of SOURCES. For TFDS the data set
      follows after a colon ("tfds:cifar10").
    split: "train" for `settings.train_split`, "eval" for `settings.eval_split`.

  Returns:
    The source; None if there are no evaluation images: `settings.eval_split` is
    empty, or a folder has no evaluation part.

  Raises:
    UserError: The data do not fit the settings, or need a package that is not
      there.
  """
  splits = {"train": settings.train_split, "eval": settings.eval_split}
  name = settings.name.partition(":")[0]
  make = errors.lookup(SOURCES, name, "data source")
  split_name = errors.lookup(splits, split, "split")
  if split == "eval" and not split_name:
    return None
  if name != "folder" and source_lib.setting(settings, "holdout"):
    raise errors.UserError(
      f"data.holdout holds a part of a folder out, and data.name is"
      f" {settings.name!r}; use its splits, such as 'train[:90%]' of TFDS."
    )
  with tensorflow_needed(f"Source {name!r}"):
    if name in _WITH_TENSORFLOW:
      quiet_import.import_tensorflow()
    source = make(settings, split_name)
  if source is None:
    return None
  return dataclasses.replace(
    source,
    # Recipes of earlier versions lack these.
    train_interpolation=getattr(settings, "train_interpolation", ""),
    antialias=getattr(settings, "antialias", False),
  )


@contextlib.contextmanager
def tensorflow_needed(what: str) -> Iterator[None]:
  """Turns a failed import into a UserError; `what` needs it."""
  try:
    yield
  except ImportError as error:
    raise errors.UserError(
      f"{what} reads images with TensorFlow, which cannot be imported"
      f" ({error}); pip install tensorflow tensorflow-datasets, or use a source"
      " of arrays: arrays, digits, shapes."
    ) from error
