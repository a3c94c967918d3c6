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

import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import crops, stateless
from imsvd_jax.data.source import Source

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


def ordered_records(
  source: Source,
  *,
  batch_size: int,
  num_views: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> tf.data.Dataset:
  """Returns this process's part of each batch, before any image is read.

  Returns:
    Batches of {"epoch", "index": int64 [b], "uniforms": float32 [b, V,
    NUM_UNIFORMS], and for a stream "serialized": strings [b]}.
  """
  key = stateless.key(seed, _ORDER)
  size = local_batch_size(batch_size, process_count)

  def order(step: tf.Tensor) -> dict[str, tf.Tensor]:
    first = step * batch_size + process_index * size
    positions = first + tf.range(size, dtype=tf.int64)
    epoch = positions // source.num_examples
    index = stateless.permute(
      positions % source.num_examples,
      source.num_examples,
      stateless.fold_in(key, epoch),
    )
    return {"epoch": epoch, "index": index}

  if source.stream is None:
    batches = tf.data.Dataset.range(start_step, tf.int64.max).map(order)
  else:
    first = start_step * size
    records = source.stream.train(key, first, process_index, process_count)
    batches = records.batch(size)
  return batches.map(lambda batch: _add_uniforms(batch, seed, num_views))


def _add_uniforms(
  batch: dict[str, tf.Tensor], seed: int, num_views: int
) -> dict[str, tf.Tensor]:
  """Adds the crops' random numbers, float32 [b, V, NUM_UNIFORMS]."""
  keys = stateless.fold_in(stateless.key(seed, _CROPS), batch["epoch"])
  keys = stateless.fold_in(keys, batch["index"])
  keys = stateless.fold_in(
    keys[:, tf.newaxis], tf.range(num_views, dtype=tf.int64)
  )
  return batch | {"uniforms": stateless.uniform(keys, crops.NUM_UNIFORMS)}
