"""Parts of a source, and the labels of a whole one."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import Source, Stream
from imsvd_jax.data.squares import Squares

if TYPE_CHECKING:  # Sources of arrays do without it.
  import tensorflow as tf


def take(source: Source, indices: np.ndarray) -> Source:
  """Returns the source of some of the images, numbered from 0.

  The records of a stream are read once, undecoded, and kept in memory: for
  ImageNet about 110 KB each.

  Args:
    source: The whole.
    indices: int [n], increasing.
  """
  indices = np.asarray(indices, np.int64)
  chosen = hashlib.sha256(indices.tobytes()).hexdigest()
  part = dataclasses.replace(
    source,
    num_examples=len(indices),
    describe=lambda index: source.describe(int(indices[index])),
    stamp=lambda: f"{chosen} of {source.num_examples}: {source.stamp()}",
  )
  if source.stream is not None:
    from imsvd_jax.data.sources import tfds

    records = _chosen_records(source.stream, indices)
    return tfds.read_into_memory(part, source.stream, records, (None, None))
  fetch, images = source.fetch, source.images
  fetch_of_whole = fetch
  if fetch_of_whole is not None and not isinstance(images, np.ndarray):
    import tensorflow as tf

    table = tf.constant(indices)
    fetch = lambda index: fetch_of_whole(table[index])
  rows = lambda array: None if array is None else array[indices]
  return dataclasses.replace(
    part,
    images=images.part(indices)
    if isinstance(images, Squares)
    else rows(images),
    labels=rows(source.labels),
    factors=rows(source.factors),
    fetch=fetch,
  )


def _chosen_records(stream: Stream, indices: np.ndarray) -> tf.data.Dataset:
  import tensorflow as tf

  first, last = int(indices[0]), int(indices[-1]) + 1
  is_chosen: np.ndarray = np.zeros(last, bool)
  is_chosen[indices] = True
  table = tf.constant(is_chosen)
  records = stream.evaluate(first, last)
  is_taken = lambda record: table[record["index"]]
  return records.filter(tf.autograph.experimental.do_not_convert(is_taken))


def labels_of(source: Source) -> np.ndarray:
  """Returns the labels of all images, int32 [N] (see `Source.labels`).

  All records of a stream are read, undecoded.

  Raises:
    UserError: There are no labels.
  """
  stream = source.stream
  if source.labels is not None:
    return source.labels
  if stream is None or not source.num_classes:
    reason = f" ({source.why_unlabeled})" if source.why_unlabeled else ""
    raise UserError(
      f"{source.name} has no labels{reason}; this protocol needs them: choose a"
      " labeled data set, or the protocol 'collapse'."
    )
  import tensorflow as tf

  label_of = lambda record: stream.parse(record["serialized"])["label"]
  labels = stream.evaluate(0, source.num_examples).map(
    tf.autograph.experimental.do_not_convert(label_of),
    num_parallel_calls=tf.data.AUTOTUNE,
  )
  batches = labels.batch(4096).as_numpy_iterator()
  return np.concatenate(list(batches)).astype(np.int32)
