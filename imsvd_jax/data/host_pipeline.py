"""Training batches made by the host: read, decode, crop, batch.

`order` decides the order of the images, `faults` handles unreadable ones.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.data import crops, decode
from imsvd_jax.data.execution import num_threads
from imsvd_jax.data.faults import Batches, first_readable
from imsvd_jax.data.order import local_batch_size, ordered_records
from imsvd_jax.data.source import Source

# A record or a batch of them, by the names of their parts.
Record = dict[str, tf.Tensor]

LabelReader = Callable[[Record], tf.Tensor]


def view_crops(views: ConfigDict) -> list[crops.Crop]:
  """Returns the crop of each view: two global ones, then the local ones."""
  return [
    crops.Crop(v.size, tuple(v.crop_scale), tuple(v.crop_ratio), v.flip_prob)
    for v in [views.view1, views.view2] + [views.local] * views.num_local
  ]


# --- Batches ------------------------------------------------------------------


def train_batches(
  source: Source,
  *,
  views: ConfigDict,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
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
    Batches {"views": ([B / P, 2, S, S, C], and with local views [B / P, L, s,
    s, C]), "index": int32 [B / P], "epoch": int32 [B / P]}, and "bad": bool
    [B / P], whether an image was unreadable and has been replaced; absent where
    the source holds its images decoded. Views are of `source.pixel_type`.
  """
  return _cropped_batches(
    source,
    view_crops(views),
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
  crop: crops.Crop,
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
  batches: Batches | None = None

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
  view_list: list[crops.Crop],
  remedy: str,
  *,
  with_labels: bool = False,
  start_step: int = 0,
  **order: int,
) -> Batches:
  """Returns batches of the given crops, in an order of `ordered_records`."""
  size = local_batch_size(order["batch_size"], order["process_count"])

  def build(step: int, careful: bool) -> tf.data.Dataset:
    dataset = ordered_records(
      source, num_views=len(view_list), start_step=step, **order
    )
    label_of = _label_reader(source) if with_labels else None
    if source.images is not None and source.small_images:
      return _crop_arrays(dataset, source, source.images, view_list, label_of)
    return _crop_records(dataset, source, view_list, size, careful, label_of)

  return Batches(build, source, start_step, remedy)


def _label_reader(source: Source) -> LabelReader:
  """Returns a function from a record or a batch to its labels."""
  stream = source.stream
  if stream is not None and source.labels is None:
    return lambda record: stream.parse(record["serialized"])["label"]
  labels = tf.constant(source.labels, tf.int32)
  return lambda record: tf.gather(labels, record["index"])


def _crop_arrays(
  dataset: tf.data.Dataset,
  source: Source,
  images: np.ndarray,
  view_list: list[crops.Crop],
  label_of: LabelReader | None,
) -> tf.data.Dataset:
  """Cuts every view of a whole batch; `images` are those of the source."""
  pixels = tf.constant(images)
  height, width = map(float, images.shape[1:3])

  def cut(batch: Record) -> dict[str, Any]:
    chosen = tf.cast(tf.gather(pixels, batch["index"]), tf.float32)
    all_of = lambda side: tf.fill(tf.shape(batch["index"]), side)
    boxes = crops.random_boxes(
      batch["uniforms"], all_of(height), all_of(width), view_list
    )
    views = [
      crops.resample(
        chosen,
        crops.Box._make(side[:, number] for side in boxes),
        size=crop.size,
        kernel=source.train_kernel,
        clip_to_box=True,
      )
      for number, crop in enumerate(view_list)
    ]
    groups = [tf.stack(group, axis=1) for group in crops.by_size(views)]
    element = _train_element(batch, groups)
    if label_of is not None:
      readable = tf.ones_like(element["index"], tf.bool)
      element |= {"label": label_of(batch), "mask": readable}
    return element

  return dataset.map(cut, num_parallel_calls=num_threads())


def _crop_records(
  dataset: tf.data.Dataset,
  source: Source,
  view_list: list[crops.Crop],
  size: int,
  careful: bool,
  label_of: LabelReader | None,
) -> tf.data.Dataset:
  """Reads images one by one, cuts their views, and batches them again."""
  blank = [  # Shaped like the views of `decode.train_views`.
    tf.zeros([len(g), g[0].size, g[0].size, source.channels], source.pixel_type)
    for g in crops.by_size(view_list)
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
