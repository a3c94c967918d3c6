"""The order of training images: positions, epochs and parts of processes.

Training reads an endless sequence of positions 0, 1, 2, ...: position p is in
epoch p // n and takes the image at p % n of that epoch's permutation. Step s
with batch size B takes positions [s * B, (s + 1) * B), and process k of P the
k-th contiguous part of them. So every image comes exactly once per epoch, a
batch may hold the end of one epoch and the start of the next, the global batch
is the same for any number of processes, and step s can be computed without the
steps before it.
"""

from __future__ import annotations

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import boxes, stateless

# Random keys of different purposes must differ.
_ORDER, _CROPS = 1, 2


def local_batch_size(batch_size: int, process_count: int) -> int:
  """Returns this process's part of a global batch."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size is {batch_size}; expected a positive multiple of the"
      f" {process_count} processes."
    )
  return batch_size // process_count


def key_of(seed: int) -> np.ndarray:
  """Returns the key of all epochs' permutations."""
  return stateless.key(seed, _ORDER)


def batch_of(
  step: int,
  num_examples: int,
  *,
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns epoch and index of each image of this process's part of a batch.

  Both are int64 [b].
  """
  size = local_batch_size(batch_size, process_count)
  first = int(step) * batch_size + process_index * size
  epoch, offset = np.divmod(first + np.arange(size), num_examples)
  index = np.empty_like(offset)
  for number in np.unique(epoch):
    rows = epoch == number
    key = stateless.fold_in(key_of(seed), number)
    index[rows] = stateless.permute(offset[rows], num_examples, key)
  return epoch, index


def uniforms_of(
  epoch: np.ndarray, index: np.ndarray, *, seed: int, num_views: int
) -> np.ndarray:
  """Returns the crops' random numbers, float32 [b, V, NUM_UNIFORMS]."""
  keys = stateless.fold_in(stateless.key(seed, _CROPS), epoch)
  keys = stateless.fold_in(keys, index)
  keys = stateless.fold_in(keys[:, np.newaxis], np.arange(num_views))
  return stateless.uniform(keys, boxes.NUM_UNIFORMS)
