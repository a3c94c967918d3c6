"""Speed of the input pipeline on the host, and the shares of its stages.

Speeds are given per second of CPU time as well as per second: other programs on
the machine change the latter much more.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.data import (
  array_batches,
  boxes,
  crops,
  decode,
  execution,
  host_pipeline,
  placement,
  record_batches,
)
from imsvd_jax.data.source import Source

SEED = 0
_ROUNDS = 3  # Measurements of each stage; the smallest counts.
_WAIT_SECONDS, _MAX_WAITS = 0.2, 50  # For threads to become idle.


def training_batches(
  source: Source, views: ConfigDict, batch_size: int
) -> Iterator[dict[str, Any]]:
  """Returns the batches that the host makes for a run, without end.

  Views of images in memory, and of squares, are left to the devices.
  """
  if source.images is None:
    return host_pipeline.train_batches(
      source, views=views, batch_size=batch_size, seed=SEED
    )
  batches = array_batches.ordered(
    source.images,
    boxes.view_crops(views),
    batch_size=batch_size,
    seed=SEED,
    process_index=0,
    process_count=1,
  )
  return placement.with_images(batches, source.images)


def time_batches(
  iterator: Iterator[Any], batch_size: int, seconds: float
) -> tuple[int, float, float]:
  """Returns the images of some seconds, and the wall and CPU time they took."""
  next(iterator)  # Starts the threads.
  settle()
  cpu = time.process_time()
  for _ in range(2):
    next(iterator)
  images, wall = 0, time.perf_counter()
  while images == 0 or time.perf_counter() - wall < seconds:
    next(iterator)
    images += batch_size
  wall = time.perf_counter() - wall
  settle()
  cpu = time.process_time() - cpu
  return images, wall, cpu * images / (images + 2 * batch_size)


def settle() -> None:
  """Waits until all buffers are full: then as much was made as was taken."""
  for _ in range(_MAX_WAITS):
    before = time.process_time()
    time.sleep(_WAIT_SECONDS)
    if time.process_time() - before < 0.01 * _WAIT_SECONDS:
      return


def stage_shares(
  source: Source,
  views: ConfigDict,
  view_list: list[crops.Crop],
  batch_size: int,
  seconds: float,
) -> dict[str, float]:
  """Returns what each stage adds to the CPU time of the stages before it.

  Each stage is measured for as many seconds; `view_list` has the crops of
  `views`.

  Returns:
    share_reading, share_decode, share_crop and share_batching; their sum is 1.
  """
  read = source.reader()

  def reading(record: dict[str, tf.Tensor]) -> tf.Tensor:
    image = read(record)
    return tf.shape(image) if image.dtype == tf.uint8 else tf.size(image)

  def decoding(record: dict[str, tf.Tensor]) -> tf.Tensor:
    image, _ = decode.decode_for_views(
      source, read(record), record["uniforms"], view_list
    )
    return image[0, 0]

  def cropping(record: dict[str, tf.Tensor]) -> tuple[tf.Tensor, ...]:
    cropped = decode.train_views(
      source, read(record), record["uniforms"], view_list
    )
    return tuple(view[:, 0, 0] for view in cropped)

  stages: list[Callable[[], Iterator[Any]]] = [
    functools.partial(_stage, source, stage, len(view_list), batch_size)
    for stage in (reading, decoding, cropping)
  ]
  stages.append(
    functools.partial(
      host_pipeline.train_batches,
      source,
      views=views,
      batch_size=batch_size,
      seed=SEED,
    )
  )
  until = np.full([_ROUNDS, len(stages)], np.inf)
  for round_, number in np.ndindex(until.shape):
    images, _, cpu = time_batches(
      stages[number](), batch_size, seconds / _ROUNDS
    )
    until[round_, number] = cpu / images
  names = ("share_reading", "share_decode", "share_crop", "share_batching")
  added = np.maximum(np.diff([0.0, *until.min(axis=0)]), 0.0)
  return dict(zip(names, (added / added.sum()).tolist(), strict=True))


@tf.autograph.experimental.do_not_convert
def _stage(
  source: Source,
  stage: Callable[[dict[str, tf.Tensor]], Any],
  num_views: int,
  batch_size: int,
) -> Iterator[Any]:
  """Returns a pipeline that ends with `stage`."""
  results = records(source, batch_size, num_views).map(
    stage, num_parallel_calls=execution.num_threads()
  )
  results = results.ignore_errors(log_warning=False).batch(batch_size)
  return iter(results.with_options(execution.pipeline_options()))


def records(source: Source, batch_size: int, num_views: int) -> tf.data.Dataset:
  """Returns the records in the order of training, one by one."""
  return record_batches.ordered_records(
    source,
    batch_size=batch_size,
    num_views=num_views,
    seed=SEED,
    start_step=0,
    process_index=0,
    process_count=1,
  ).unbatch()
