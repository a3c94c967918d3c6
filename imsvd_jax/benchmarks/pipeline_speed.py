"""How fast the host half is, and where its time goes.

Speeds are given per second of CPU time as well as per second: what else runs on
the machine changes the latter much more. The reference is what a PyTorch
pipeline does with the same images and the same boxes: PIL decodes an image
once, then cuts, resizes and flips it for each view, on one core. It takes turns
with the pipeline, batch by batch, so that both meet the same disturbances.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn import datasets

from imsvd_jax.data import (
  crops,
  decode,
  execution,
  faults,
  host_pipeline,
  make_source,
  order,
)
from imsvd_jax.data.source import Source

_SEED = 0
_ROUNDS = 3  # Each stage is measured so often; the least counts.
_PIL_IMAGES = 64  # Read once; the reference goes through them in turn.
_WAIT_SECONDS, _MAX_WAITS = 0.2, 50  # For threads to come to rest.
_PIL_TURN = 16  # Images of the reference between two batches.


def write_photographs(
  folder: str, count: int, *, width: int = 500, height: int = 375
) -> None:
  """Writes JPEGs cut out of scikit-learn's two photographs (640 x 427)."""
  os.makedirs(folder, exist_ok=True)
  photographs = datasets.load_sample_images().images
  rng = np.random.default_rng(_SEED)
  for number in range(count):
    photograph = photographs[number % len(photographs)]
    # Parts of at least 7/8 of the photograph, so that details stay sharp.
    shrink = rng.uniform(0.875, 1.0)
    rows, columns = (int(shrink * side) for side in photograph.shape[:2])
    top = rng.integers(0, photograph.shape[0] - rows + 1)
    left = rng.integers(0, photograph.shape[1] - columns + 1)
    part = photograph[top : top + rows, left : left + columns]
    pixels = tf.image.resize(part, (height, width), "bicubic", antialias=True)
    contents = tf.io.encode_jpeg(crops.to_uint8(pixels), quality=90)
    tf.io.write_file(os.path.join(folder, f"{number:05}.jpg"), contents)


def run(
  settings: Any,
  views: Any,
  *,
  batch_size: int,
  seconds: float = 5.0,
  reference: bool = False,
) -> dict[str, float]:
  """Measures the training pipeline alone.

  Args:
    settings: config.data.
    views: config.views.
    batch_size: Images per batch.
    seconds: How long each of a handful of measurements lasts, at least.
    reference: Whether to measure PIL too; needs Pillow.

  Returns:
    images_per_second, views_per_second, views_per_cpu_second; threads;
    images and, of these, bad_images (each time that one came), bad_files
    (different ones); where images are decoded one by one the shares of the CPU
    time share_reading, share_decode, share_crop and share_batching; from PIL,
    with one decoding per image or one per view, pil_views_per_cpu_second and
    pil_per_view_views_per_cpu_second, and the ratios of the pipeline's views
    per CPU second in the same minutes to them, speedup and speedup_per_view.
  """
  source = make_source(settings, "train")
  view_list = host_pipeline.view_crops(views)
  batches = host_pipeline.train_batches(
    source, views=views, batch_size=batch_size, seed=_SEED
  )
  images, wall, cpu = _time(batches, batch_size, seconds)
  per_image = len(view_list)
  result = {
    "images_per_second": images / wall,
    "views_per_second": images * per_image / wall,
    "views_per_cpu_second": images * per_image / cpu,
    "threads": execution.num_threads(),
    "images": images,
    "bad_images": batches.bad_images,
    "bad_files": len(source.named),
  }
  if reference:
    result |= _beside_pil(source, batches, view_list, batch_size, seconds)
  del batches  # Stops its threads.
  if not source.small_images:
    result |= _shares(source, views, view_list, batch_size, seconds)
  return result


def _time(
  iterator: Iterator[Any], batch_size: int, seconds: float
) -> tuple[int, float, float]:
  """Images of some seconds; wall and CPU seconds for that many."""
  next(iterator)  # Starts the threads.
  _settle()
  cpu = time.process_time()
  for _ in range(2):
    next(iterator)
  images, wall = 0, time.perf_counter()
  while images == 0 or time.perf_counter() - wall < seconds:
    next(iterator)
    images += batch_size
  wall = time.perf_counter() - wall
  _settle()
  cpu = time.process_time() - cpu
  return images, wall, cpu * images / (images + 2 * batch_size)


def _settle() -> None:
  """Waits until all buffers are full: what is made then, was taken before."""
  for _ in range(_MAX_WAITS):
    before = time.process_time()
    time.sleep(_WAIT_SECONDS)
    if time.process_time() - before < 0.01 * _WAIT_SECONDS:
      return


# --- Shares -------------------------------------------------------------------


def _shares(
  source: Source,
  views: Any,
  view_list: list[crops.Crop],
  batch_size: int,
  seconds: float,
) -> dict[str, float]:
  """What each stage adds to the CPU time of the stages before it."""
  read = source.reader()

  def reading(record: dict[str, tf.Tensor]) -> tf.Tensor:
    image = read(record)
    return tf.shape(image) if image.dtype == tf.uint8 else tf.size(image)

  def decoding(record: dict[str, tf.Tensor]) -> tf.Tensor:
    image, _ = decode.decode_for_views(
      source, read(record), record["uniforms"], view_list
    )
    return image[0, 0]

  def cropping(record: dict[str, tf.Tensor]) -> list[tf.Tensor]:
    views = decode.train_views(
      source, read(record), record["uniforms"], view_list
    )
    return tuple(view[:, 0, 0] for view in views)

  stages = [
    lambda stage=stage: _stage(source, stage, len(view_list), batch_size)
    for stage in (reading, decoding, cropping)
  ]
  stages.append(
    lambda: host_pipeline.train_batches(
      source, views=views, batch_size=batch_size, seed=_SEED
    )
  )
  until = np.full([_ROUNDS, len(stages)], np.inf)
  for round_, number in np.ndindex(until.shape):
    images, _, cpu = _time(stages[number](), batch_size, seconds / _ROUNDS)
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
  """A pipeline that ends with `stage`."""
  records = _records(source, batch_size, num_views).map(
    stage, num_parallel_calls=execution.num_threads()
  )
  records = records.ignore_errors(log_warning=False).batch(batch_size)
  return iter(records.with_options(execution.pipeline_options()))


def _records(
  source: Source, batch_size: int, num_views: int
) -> tf.data.Dataset:
  """Records in the order of training, one by one."""
  return order.ordered_records(
    source,
    batch_size=batch_size,
    num_views=num_views,
    seed=_SEED,
    start_step=0,
    process_index=0,
    process_count=1,
  ).unbatch()


# --- The reference ------------------------------------------------------------


def _beside_pil(
  source: Source,
  batches: faults.Batches,
  view_list: list[crops.Crop],
  batch_size: int,
  seconds: float,
) -> dict[str, float]:
  """The pipeline and PIL by turns, with one decoding per image or per view.

  PIL works in this thread, whose CPU time is its own; what else the process
  used, the pipeline did.
  """
  work = list(_pil_work(source, view_list, _PIL_IMAGES))
  if not work:
    return {}
  num_views = len(view_list)
  pil = {"once": 0.0, "per_view": 0.0}
  images = turns = 0
  _settle()
  wall, cpu = time.perf_counter(), time.process_time()
  while turns < 2 or time.perf_counter() - wall < 2 * seconds:
    next(batches)
    images += batch_size
    start = time.thread_time()
    for turn in range(turns * _PIL_TURN, (turns + 1) * _PIL_TURN):
      contents, boxes = work[turn % len(work)]
      _pil_views(contents, boxes, view_list)
      middle = time.thread_time()
      for box, crop in zip(boxes, view_list, strict=True):
        _pil_views(contents, [box], [crop])
      end = time.thread_time()
      pil["once"] += middle - start
      pil["per_view"] += end - middle
      start = end
    turns += 1
  _settle()
  cpu = time.process_time() - cpu - sum(pil.values())
  ours = images * num_views / cpu
  once, per_view = (turns * _PIL_TURN * num_views / s for s in pil.values())
  return {
    "pil_views_per_cpu_second": once,
    "pil_per_view_views_per_cpu_second": per_view,
    "speedup": ours / once,
    "speedup_per_view": ours / per_view,
  }


def _pil_work(
  source: Source, view_list: list[crops.Crop], count: int
) -> Iterator[tuple[bytes, list[tuple[int, ...]]]]:
  """Encoded images with the boxes that the pipeline cuts out of them."""
  from PIL import Image

  read = source.reader()
  for record in _records(source, count, len(view_list)).take(count):
    contents = read(record)
    if contents.dtype == tf.uint8:
      contents = tf.io.encode_png(contents)
    contents = contents.numpy()
    try:
      width, height = Image.open(io.BytesIO(contents)).convert("RGB").size
    except (OSError, SyntaxError):  # PIL's errors for what it cannot read.
      continue
    sides = tf.constant(float(height)), tf.constant(float(width))
    boxes = crops.random_boxes(record["uniforms"], *sides, view_list)
    boxes = zip(*(side.numpy() for side in boxes), strict=True)
    yield contents, [tuple(int(side) for side in box) for box in boxes]


def _pil_views(
  contents: bytes,
  boxes: list[tuple[int, ...]],
  view_list: list[crops.Crop],
) -> np.ndarray:
  from PIL import Image

  image = Image.open(io.BytesIO(contents)).convert("RGB")
  views = []
  for (top, left, height, width, flip), crop in zip(
    boxes, view_list, strict=True
  ):
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((crop.size, crop.size), Image.Resampling.BICUBIC)
    if flip:
      view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    views.append(np.asarray(view))
  return views
