"""Evaluation batches: each image once, resized, center-cropped and padded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import array_batches
from imsvd_jax.data.order import local_batch_size
from imsvd_jax.data.source import Source


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  resize: int,
  crop: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, Any]]:
  """Returns an iterator that gives each image once, over all processes.

  Process k of P reads images [k * c, (k + 1) * c), c = ceil(n / P); every
  process returns the same number of batches. The shorter side is resized to
  `resize` and the center cropped; an image of the right size is unchanged.

  Args:
    source: Where images come from.
    batch_size: Images per batch over all processes (b * P).
    resize: Size of the shorter side before the crop.
    crop: Height and width of the result.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    Batches {"image": uint8 [b, crop, crop, C], "label": int32 [b] (absent when
    the source has none; [b, classes] where an image may have several),
    "index": int32 [b], "mask": bool [b]}. Padding has mask False, label -1 and
    index -1. An unreadable image has mask False, and "bad", bool [b], True;
    "bad" is absent where the source holds its images decoded.
  """
  if crop > resize:
    raise UserError(
      f"data.crop is {crop}, larger than data.resize, {resize}; expected"
      " crop <= resize."
    )
  size = local_batch_size(batch_size, process_count)
  share = -(-source.num_examples // process_count)
  first = process_index * share
  last = min(first + share, source.num_examples)
  indices = first + np.arange(-(-share // size) * size)
  indices = np.where(indices < last, indices, -1)
  images, arguments = source.images, dict(resize=resize, crop=crop)
  if images is not None:
    return array_batches.centered(
      source, images, indices.astype(np.int32), batch_size=size, **arguments
    )
  from imsvd_jax.data import record_batches  # It needs TensorFlow.

  return record_batches.centered(source, indices, batch_size=size, **arguments)
