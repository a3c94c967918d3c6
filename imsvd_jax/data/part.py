"""Parts of a source, and the labels of all of it."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import tfds


def take(source: Source, indices: np.ndarray) -> Source:
  """Returns the source of some of the images, numbered anew from 0.

  Of a stream the records are read once, undecoded, and kept in memory: for
  ImageNet about 110 KB each.

  Args:
    source: The whole.
    indices: int [n], increasing.
  """
  indices = np.asarray(indices, np.int64)
  chosen = hashlib.sha256(indices.tobytes()).hexdigest()
  common = {
    "num_examples": len(indices),
    "describe": lambda index: source.describe(int(indices[index])),
    "stamp": lambda: f"{chosen} of {source.num_examples}: {source.stamp()}",
  }
  if source.stream is not None:
    return _from_stream(source, indices, common)
  for field in ("images", "labels", "factors"):
    if getattr(source, field) is not None:
      common[field] = getattr(source, field)[indices]
  if source.fetch is not None:
    table = tf.constant(indices)
    common["fetch"] = lambda index: source.fetch(table[index])
  return dataclasses.replace(source, **common)


@tf.autograph.experimental.do_not_convert
def _from_stream(source: Source, indices: np.ndarray, common: dict) -> Source:
  wanted = np.zeros(source.num_examples, bool)
  wanted[indices] = True
  wanted = tf.constant(wanted)
  first, last = int(indices[0]), int(indices[-1]) + 1
  records = source.stream.evaluate(first, last)
  records = records.filter(lambda record: wanted[record["index"]])
  part = dataclasses.replace(source, **common)
  return tfds.hold_in_memory(part, records, (None, None))


@tf.autograph.experimental.do_not_convert
def labels_of(source: Source) -> np.ndarray:
  """Returns the labels of all images, int32 [N] (see `Source.labels`).

  Of a stream all records are read, undecoded.

  Raises:
    UserError: There are none.
  """
  if not source.num_classes:
    raise UserError(
      f"{source.name} has no labels; this protocol needs them: choose a"
      " labelled data set, or the protocol 'collapse'."
    )
  if source.labels is not None:
    return source.labels
  records = source.stream.evaluate(0, source.num_examples)
  labels = records.map(
    lambda record: source.stream.parse(record["serialized"])["label"],
    num_parallel_calls=tf.data.AUTOTUNE,
  )
  batches = labels.batch(4096).as_numpy_iterator()
  return np.concatenate(list(batches)).astype(np.int32)
