"""Batches of records that TensorFlow reads and decodes one by one.

`order` decides the order of the images, `faults` handles unreadable ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.data import boxes, decode, graph_stateless, order
from imsvd_jax.data.execution import num_threads
from imsvd_jax.data.faults import Batches, first_readable
from imsvd_jax.data.source import Source

# A record or a batch of them, by the names of their parts.
Record = dict[str, tf.Tensor]

LabelReader = Callable[[Record], tf.Tensor]


# --- Training -----------------------------------------------------------------


def cropped(
  source: Source,
  view_list: list[boxes.Crop],
  remedy: str,
  *,
  with_labels: bool,
  start_step: int,
  **arguments: int,
) -> Batches:
  """Returns batches of the given crops, in the order of `ordered_records`."""
  size = order.local_batch_size(
    arguments["batch_size"], arguments["process_count"]
  )

  def build(step: int, careful: bool) -> tf.data.Dataset:
    dataset = ordered_records(
      source, num_views=len(view_list), start_step=step, **arguments
    )
    label_of = _label_reader(source) if with_labels else None
    return _crop_records(dataset, source, view_list, size, careful, label_of)

  return Batches(build, source, start_step, remedy)


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
  size = order.local_batch_size(batch_size, process_count)

  def places(step: tf.Tensor) -> Record:
    found = graph_stateless.in_graph(
      lambda step: np.stack(
        order.batch_of(
          step,
          source.num_examples,
          batch_size=batch_size,
          seed=seed,
          process_index=process_index,
          process_count=process_count,
        )
      ),
      [2, size],
      tf.int64,
      step,
    )
    return {"epoch": found[0], "index": found[1]}

  def with_uniforms(batch: Record) -> Record:
    uniforms = graph_stateless.in_graph(
      lambda *places: order.uniforms_of(
        *places, seed=seed, num_views=num_views
      ),
      [None, num_views, boxes.NUM_UNIFORMS],
      tf.float32,
      *(batch["epoch"], batch["index"]),
    )
    return batch | {"uniforms": uniforms}

  if source.stream is None:
    batches = tf.data.Dataset.range(start_step, tf.int64.max).map(places)
  else:
    records = source.stream.train(
      order.key_of(seed), start_step * size, process_index, process_count
    )
    batches = records.batch(size)
  return batches.map(with_uniforms)


def _label_reader(source: Source) -> LabelReader:
  """Returns a function from a record or a batch to its labels."""
  stream = source.stream
  if stream is not None and source.labels is None:
    return lambda record: stream.parse(record["serialized"])["label"]
  labels = tf.constant(source.labels, tf.int32)
  return lambda record: tf.gather(labels, record["index"])


def _crop_records(
  dataset: tf.data.Dataset,
  source: Source,
  view_list: list[boxes.Crop],
  size: int,
  careful: bool,
  label_of: LabelReader | None,
) -> tf.data.Dataset:
  """Reads images one by one, cuts their views, and batches them again."""
  blank = [  # Shaped like the views of `decode.train_views`.
    tf.zeros([len(g), g[0].size, g[0].size, source.channels], source.pixel_type)
    for g in boxes.by_size(view_list)
  ]
  read = source.reader()

  def cut(record: Record) -> dict[str, Any]:
    views_of = lambda record: decode.train_views(
      source, read(record), record["uniforms"], view_list
    )
    black = tf.constant(False)
    if careful:
      views, bad, black = first_readable(views_of, record, source, blank)
    else:
      views, bad = views_of(record), tf.constant(False)
    element = _train_element(record, views) | {"bad": bad}
    if label_of is not None:
      element |= {"label": label_of(record), "mask": ~bad}
      black = tf.constant(False)  # Masked out, so a replacement is not needed.
    return element | {"black": black}

  dataset = dataset.unbatch().map(cut, num_parallel_calls=num_threads())
  return dataset.batch(size, drop_remainder=True)


def _train_element(record: Record, views: list[tf.Tensor]) -> dict[str, Any]:
  return {
    "views": tuple(views),
    "index": tf.cast(record["index"], tf.int32),
    "epoch": tf.cast(record["epoch"], tf.int32),
  }


# --- Evaluation ---------------------------------------------------------------


def centered(
  source: Source,
  indices: np.ndarray,
  *,
  batch_size: int,
  resize: int,
  crop: int,
) -> Batches:
  """Returns the batches of `evaluation_batches.eval_batches`.

  `indices` are those of a whole number of batches; -1 is padding.
  """

  def build(first_batch: int, careful: bool) -> tf.data.Dataset:
    rest = indices[first_batch * batch_size :]
    if source.stream is None:
      dataset = tf.data.Dataset.from_tensor_slices({"index": rest})
    else:
      start, count = max(rest[0], 0), int((rest >= 0).sum())
      dataset = source.stream.evaluate(start, start + count)
      dataset = _padded(dataset, len(rest))
    dataset = _eval_records(dataset, source, resize, crop, careful)
    dataset = dataset.batch(batch_size)
    if source.labels is None:
      return dataset
    labels = tf.constant(source.labels, tf.int32)
    return dataset.map(lambda batch: _add_labels(batch, labels))

  return Batches(build, source, 0, "it is left out")


def _padded(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Appends empty records of index -1 to a stream."""
  empty = tf.data.Dataset.from_tensors(
    {"serialized": tf.constant(""), "index": tf.constant(-1, tf.int64)}
  )
  return dataset.concatenate(empty.repeat()).take(length)


def _eval_records(
  dataset: tf.data.Dataset,
  source: Source,
  resize: int,
  crop: int,
  careful: bool,
) -> tf.data.Dataset:
  """Reads, resizes and crops images one by one."""
  blank = tf.zeros([crop, crop, source.channels], source.pixel_type)
  no_label = tf.fill([source.num_classes] if source.multi_label else [], -1)
  read, stream = source.reader(), source.stream
  view_of = lambda record: decode.eval_view(source, read(record), resize, crop)

  def view(record: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    if not careful:
      return view_of(record), tf.constant(False)
    views, bad, _ = first_readable(
      lambda record: [view_of(record)], record, source, [blank], 1
    )
    return views[0], bad

  def cut(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    image, bad = tf.cond(
      record["index"] >= 0,
      lambda: view(record),
      lambda: (blank, tf.constant(False)),
    )
    element = _eval_element(record, image)
    element = element | {"mask": element["mask"] & ~bad, "bad": bad}
    if stream is not None and source.num_classes:
      element["label"] = tf.cond(
        record["index"] >= 0,
        lambda: stream.parse(record["serialized"])["label"],
        lambda: no_label,
      )
    return element

  return dataset.map(cut, num_parallel_calls=num_threads())


def _eval_element(
  record: dict[str, tf.Tensor], images: tf.Tensor
) -> dict[str, tf.Tensor]:
  return {
    "image": images,
    "index": tf.cast(record["index"], tf.int32),
    "mask": record["index"] >= 0,
  }


def _add_labels(
  batch: dict[str, tf.Tensor], labels: tf.Tensor
) -> dict[str, tf.Tensor]:
  label = tf.gather(labels, tf.maximum(batch["index"], 0))
  known = batch["index"] >= 0
  if labels.shape.rank == 2:
    known = known[:, tf.newaxis]
  return batch | {"label": tf.where(known, label, -1)}
