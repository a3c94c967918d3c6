"""Sources of images, and the batches that the host makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Literal, overload

import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base import errors
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import (
  digits,
  folder,
  shapes,
  synthetic,
  tar,
  tfds,
)

# The accelerators are JAX's; TensorFlow would reserve their memory. It raises
# if the caller has already used them, and then the choice is the caller's.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], "GPU")
  tf.config.set_visible_devices([], "TPU")

# name -> make(settings, split) -> Source
SOURCES = {
  "digits": digits.make,
  "folder": folder.make,
  "shapes": shapes.make,
  "synthetic": synthetic.make,
  "tar": tar.make,
  "tfds": tfds.make,
}


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
  source = make(settings, split_name)
  if source is None:
    return None
  return dataclasses.replace(
    source,
    # Recipes of earlier versions lack these.
    train_interpolation=getattr(settings, "train_interpolation", ""),
    antialias=getattr(settings, "antialias", False),
  )
