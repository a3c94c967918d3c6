"""The host half of the data path: sources of images, and their batches."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, overload

import tensorflow as tf

from imsvd_jax.base import errors
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import digits, folder, shapes, synthetic, tfds

# The accelerators are JAX's; TensorFlow would take their memory for itself. It
# refuses if the caller has used it already, and then it is the caller's choice.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], "GPU")
  tf.config.set_visible_devices([], "TPU")

# name -> make(settings, split) -> Source
SOURCES = {
  "digits": digits.make,
  "folder": folder.make,
  "shapes": shapes.make,
  "synthetic": synthetic.make,
  "tfds": tfds.make,
}


@overload
def make_source(settings: Any, split: Literal["train"]) -> Source: ...


@overload
def make_source(settings: Any, split: str) -> Source | None: ...


def make_source(settings: Any, split: str) -> Source | None:
  """Returns one split of the source that `settings` names.

  Args:
    settings: config.data; `name` is a source, for TFDS with the data set after
      a colon ("tfds:cifar10").
    split: "train" or "eval"; the source is asked for `settings.train_split` or
      `settings.eval_split`.

  Returns:
    The source; None if there is nothing to evaluate on: `settings.eval_split`
    is empty, or a folder has no evaluation part.
  """
  splits = {"train": settings.train_split, "eval": settings.eval_split}
  name = settings.name.partition(":")[0]
  make = errors.lookup(SOURCES, name, "data source")
  split_name = errors.lookup(splits, split, "split")
  if split == "eval" and not split_name:
    return None
  return make(settings, split_name)
