"""Training batches with their views: read, decode, crop, batch.

Of images in memory by `array_batches`, of encoded ones by `record_batches`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.data import array_batches, boxes
from imsvd_jax.data.order import local_batch_size
from imsvd_jax.data.source import Source


def train_batches(
  source: Source,
  *,
  views: ConfigDict,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[dict[str, Any]]:
  """Returns an endless iterator over this process's part of each batch.

  The views are a function of (seed, epoch, index): they are the same at any
  step, batch size or number of processes.

  Args:
    source: Where images come from.
    views: config.views: `view1`, `view2`, `local`, `num_local`.
    batch_size: Images per step over all processes (B).
    seed: Seed of the order and of the crops.
    start_step: The first step to return; earlier ones cost nothing.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    Batches {"views": (uint8 [B / P, 2, S, S, C], and with local views uint8
    [B / P, L, s, s, C]), "index": int32 [B / P], "epoch": int32 [B / P]}, and
    "bad": bool [B / P], whether an image was unreadable and has been replaced;
    absent where the source holds its images decoded.
  """
  return _cropped_batches(
    source,
    boxes.view_crops(views),
    f"{'a black' if source.stream else 'another'} image replaces it",
    start_step=start_step,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )


def labeled_epochs(
  source: Source,
  *,
  crop: boxes.Crop,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Callable[..., Iterator[dict[str, np.ndarray]]]:
  """Returns epochs of images in one crop each, with their labels.

  The order is that of `train_batches`. A batch may reach from one epoch into
  the next, so the first E epochs show every image E times, except for the
  rounding of the last batch. An epoch has at least one batch.

  Args:
    source: Where images come from; it has labels.
    crop: The crop and flip.
    batch_size: Images per step over all processes (B).
    seed: Seed of the order and of the crops.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    A function to be called with 0, 1, 2, ... in turn. It gives the batches of
    that epoch: {"image": uint8 [b, S, S, C], "label": int32 [b], "index": int32
    [b], "epoch": int32 [b], "mask": bool [b]}, b = B / P; mask is False where
    an image is unreadable. The first call may ask for a later epoch, and for
    its batches but the first `done`; earlier batches cost nothing.
  """

  def size(epoch: int) -> int:
    first, end = (
      round(e * source.num_examples / batch_size) for e in (epoch, epoch + 1)
    )
    return max(1, end - first)

  open_at = functools.partial(
    _cropped_batches,
    source,
    [crop],
    "it is masked out",
    with_labels=True,
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )
  batches: Iterator[dict[str, Any]] | None = None

  def epoch_of(epoch: int, done: int = 0) -> Iterator[dict[str, np.ndarray]]:
    nonlocal batches
    if batches is None:
      batches = open_at(start_step=sum(map(size, range(epoch))) + done)
    for batch in itertools.islice(batches, size(epoch) - done):
      views = batch.pop("views")
      batch.pop("bad", None)  # The same as ~mask.
      yield {"image": views[0][:, 0], **batch}

  return epoch_of


def _cropped_batches(
  source: Source,
  view_list: list[boxes.Crop],
  remedy: str,
  *,
  with_labels: bool = False,
  start_step: int = 0,
  **order: int,
) -> Iterator[dict[str, Any]]:
  """Returns batches of the given crops, in the order of training."""
  local_batch_size(order["batch_size"], order["process_count"])  # Checks it.
  if source.images is not None:
    return array_batches.cropped(
      source,
      source.images,
      view_list,
      with_labels=with_labels,
      start_step=start_step,
      **order,
    )
  from imsvd_jax.data import record_batches  # It needs TensorFlow.

  return record_batches.cropped(
    source,
    view_list,
    remedy,
    with_labels=with_labels,
    start_step=start_step,
    **order,
  )
