"""The host half of the path of a batch: read, decode, crop, batch.

`order` says which image comes when, `faults` what happens to unreadable ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import crops, decode
from imsvd_jax.data.faults import (
  Batches,
  first_readable,
  num_threads,
)
from imsvd_jax.data.order import (
  local_batch_size,
  ordered_records,
)
from imsvd_jax.data.source import Source


def view_crops(views: Any) -> list[crops.Crop]:
  """Returns what the host does for each view: two global, then the local ones.

  Args:
    views: config.views: `view1`, `view2`, `local`, `num_local`.
  """
  settings = [views.view1, views.view2] + [views.local] * views.num_local
  return [_view_crop(view) for view in settings]


def _view_crop(view: Any) -> crops.Crop:
  scale, ratio = tuple(view.crop_scale), tuple(view.crop_ratio)
  return crops.Crop(view.size, scale, ratio, view.flip_prob)


def _check_crop(crop: crops.Crop) -> None:
  if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
    raise UserError(
      f"crop_scale is {crop.scale}; expected 0 < smallest <= largest <= 1."
    )
  if not 0 < crop.ratio[0] <= crop.ratio[1]:
    raise UserError(f"crop_ratio is {crop.ratio}; expected 0 < low <= high.")


# --- Training -----------------------------------------------------------------


def train_batches(
  source: Source,
  *,
  views: Any,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Returns an endless iterator over this process's part of each batch.

  A function of its arguments: the same (seed, epoch, index) gives the same
  views at any step, batch size or number of processes.

  Args:
    source: Where images come from.
    views: config.views, see `view_crops`.
    batch_size: Images per step over all processes (B).
    seed: Seed of the order and of the crops.
    start_step: The first step to return; costs nothing to reach.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    Batches {"views": (uint8 [B / P, 2, S, S, C], and with local views uint8
    [B / P, L, s, s, C]), "index": int32 [B / P], "epoch": int32 [B / P]}, and
    "bad": bool [B / P], which images could not be read and were replaced;
    absent where the source holds its images decoded.
  """
  remedy = f"{'a black' if source.stream else 'another'} image takes its place"
  return _cropped_batches(
    source,
    view_crops(views),
    remedy=remedy,
    batch_size=batch_size,
    seed=seed,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )


def labelled_epochs(
  source: Source,
  *,
  crop: crops.Crop,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
  """Returns epochs of what `train_batches` gives, of one crop with its label.

  A batch may reach from one epoch into the next, so that the first E epochs
  show every image E times, but for the rounding of the last batch.

  Args:
    source: Where images come from; it has labels.
    crop: What to cut.
    batch_size: See `train_batches`, as all that follow.
    seed: Seed of the order and of the crops.
    process_index: Which process this is.
    process_count: Number of processes.

  Returns:
    A function to be called with 0, 1, 2, ... in turn, each time for the batches
    {"image": uint8 [b, S, S, C], "label": int32 [b], "index": int32 [b],
    "epoch": int32 [b], "mask": bool [b]} of that epoch, b = B / P; mask is
    False where an image cannot be read.
  """
  _check_crop(crop)
  batches = _cropped_batches(
    source,
    [crop],
    remedy="it teaches nothing",
    with_labels=True,
    batch_size=batch_size,
    seed=seed,
    start_step=0,
    process_index=process_index,
    process_count=process_count,
  )

  def epoch_of(epoch: int) -> Iterator[dict[str, np.ndarray]]:
    ends = [
      round(e * source.num_examples / batch_size) for e in (epoch, epoch + 1)
    ]
    for batch in itertools.islice(batches, ends[1] - ends[0]):
      views = batch.pop("views")
      batch.pop("bad", None)  # `mask` says it.
      yield {"image": views[0][:, 0], **batch}

  return epoch_of


def _cropped_batches(
  source: Source,
  view_list: list[crops.Crop],
  *,
  remedy: str,
  with_labels: bool = False,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> Batches:
  """Batches of the given crops; see `train_batches`."""
  size = local_batch_size(batch_size, process_count)

  def build(step: int, careful: bool) -> tf.data.Dataset:
    dataset = ordered_records(
      source,
      batch_size=batch_size,
      num_views=len(view_list),
      seed=seed,
      start_step=step,
      process_index=process_index,
      process_count=process_count,
    )
    label_of = _label_reader(source) if with_labels else None
    if source.small_images:
      return _crop_arrays(dataset, source, view_list, label_of)
    return _crop_records(dataset, source, view_list, size, careful, label_of)

  return Batches(build, source, start_step, remedy)


def _label_reader(source: Source) -> Callable[[dict[str, tf.Tensor]], Any]:
  """Returns a function of a record, or of a batch of them, to its labels."""
  if source.labels is None:
    return lambda record: source.stream.parse(record["serialized"])["label"]
  labels = tf.constant(source.labels, tf.int32)
  return lambda record: tf.gather(labels, record["index"])


def _crop_arrays(
  dataset: tf.data.Dataset,
  source: Source,
  view_list: list[crops.Crop],
  label_of: Callable[[dict[str, tf.Tensor]], Any] | None,
) -> tf.data.Dataset:
  """Cuts every view of a whole batch out of images of one size."""
  pixels = tf.constant(source.images)
  height, width = map(float, source.images.shape[1:3])

  def cut(batch: dict[str, tf.Tensor]) -> dict[str, Any]:
    images = tf.cast(tf.gather(pixels, batch["index"]), tf.float32)
    sides = [tf.fill(tf.shape(batch["index"]), s) for s in (height, width)]
    boxes = crops.random_boxes(batch["uniforms"], *sides, view_list)
    views = [
      crops.resample(
        images,
        crops.Box(*(side[:, number] for side in boxes)),
        size=crop.size,
        kernel=source.interpolation,
        clip_to_box=True,
      )
      for number, crop in enumerate(view_list)
    ]
    groups = [views[:2], views[2:]] if len(views) > 2 else [views]
    element = _train_element(batch, [tf.stack(g, axis=1) for g in groups])
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
  label_of: Callable[[dict[str, tf.Tensor]], Any] | None,
) -> tf.data.Dataset:
  """Reads images one by one, cuts their views, and batches them again."""
  blank = _blank_views(source, view_list)
  read = source.reader()

  def cut(record: dict[str, tf.Tensor]) -> dict[str, Any]:
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
      black = tf.constant(False)  # Masked out, so that no image is missed.
    return element | {"black": black}

  dataset = dataset.unbatch().map(cut, num_parallel_calls=num_threads())
  return dataset.batch(size, drop_remainder=True)


def _blank_views(
  source: Source, view_list: list[crops.Crop]
) -> list[tf.Tensor]:
  """Black views, shaped like those of `decode.train_views`."""
  groups = [view_list[:2], view_list[2:]] if len(view_list) > 2 else [view_list]
  return [
    tf.zeros([len(g), g[0].size, g[0].size, source.channels], tf.uint8)
    for g in groups
  ]


def _train_element(
  record: dict[str, tf.Tensor], views: list[tf.Tensor]
) -> dict[str, Any]:
  return {
    "views": tuple(views),
    "index": tf.cast(record["index"], tf.int32),
    "epoch": tf.cast(record["epoch"], tf.int32),
  }


# --- Evaluation ---------------------------------------------------------------
