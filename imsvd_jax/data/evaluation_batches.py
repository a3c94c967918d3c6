"""Evaluation batches: each image once, resized, center-cropped and padded."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import crops, decode
from imsvd_jax.data.execution import num_threads
from imsvd_jax.data.faults import Batches, first_readable
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
) -> Batches:
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
    Batches {"image": [b, crop, crop, C] of `source.pixel_type`, "label": int32
    [b] (absent when the source has none; [b, classes] where an image may have
    several), "index": int32 [b], "mask": bool [b]}. Padding has mask False,
    label -1 and index -1. An unreadable image has mask False, and "bad", bool
    [b], True; "bad" is absent where the source holds its images decoded.
  """
  if crop > resize:
    raise UserError(
      f"data.crop is {crop}, larger than data.resize, {resize}; expected"
      " crop <= resize."
    )
  size = local_batch_size(batch_size, process_count)
  share = -(-source.num_examples // process_count)
  num_batches = -(-share // size)
  first = process_index * share
  last = min(first + share, source.num_examples)

  def build(first_batch: int, careful: bool) -> tf.data.Dataset:
    start = first + first_batch * size
    end = first + num_batches * size
    dataset = tf.data.Dataset.range(start, end).map(
      lambda index: {"index": tf.where(index < last, index, -1)}
    )
    if source.stream is not None:
      dataset = _padded(source.stream.evaluate(start, last), end - start)
    if source.images is not None and source.small_images:
      dataset = _eval_arrays(
        dataset.batch(size), source.images, source.interpolation, resize, crop
      )
    else:
      dataset = _eval_records(dataset, source, resize, crop, careful)
      dataset = dataset.batch(size)
    if source.labels is None:
      return dataset
    labels = tf.constant(source.labels, tf.int32)
    return dataset.map(lambda batch: _add_labels(batch, labels))

  return Batches(build, source, 0, "the evaluation skips it")


def _padded(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Appends empty records of index -1 to a stream."""
  empty = tf.data.Dataset.from_tensors(
    {"serialized": tf.constant(""), "index": tf.constant(-1, tf.int64)}
  )
  return dataset.concatenate(empty.repeat()).take(length)


def _eval_arrays(
  dataset: tf.data.Dataset,
  arrays: np.ndarray,
  interpolation: str,
  resize: int,
  crop: int,
) -> tf.data.Dataset:
  """Resizes and crops a whole batch of images that are in memory."""
  pixels = tf.constant(arrays)
  height, width = arrays.shape[1:3]

  def cut(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    index = tf.maximum(batch["index"], 0)
    images = tf.gather(pixels, index)
    if (height, width, resize) != (crop, crop, crop):
      all_of = lambda side: tf.fill(tf.shape(index), float(side))
      images = crops.resample(
        tf.cast(images, tf.float32),
        crops.center_box(all_of(height), all_of(width), resize, crop),
        size=crop,
        kernel=interpolation,
        clip_to_box=False,
      )
    return _eval_element(batch, images)

  return dataset.map(cut, num_parallel_calls=num_threads())


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
