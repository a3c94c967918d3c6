"""How fast the host half is, and where its time goes.

Speeds are given per second of CPU time as well as per second: what else runs on
the machine changes the latter much more. The reference is what a PyTorch
pipeline does with the same images and the same boxes: PIL decodes an image
once, then cuts, resizes and flips it for each view, on one core.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn import datasets

from imsvd_jax.data import crops, decode, make_source, pipeline
from imsvd_jax.data.source import Source

_SEED = 0


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
  num_batches: int = 20,
  with_pil: bool = True,
) -> dict[str, float]:
  """Measures the training pipeline alone.

  Args:
    settings: config.data.
    views: config.views.
    batch_size: Images per batch.
    num_batches: Batches to measure.
    with_pil: Whether to measure the reference too; needs Pillow.

  Returns:
    images_per_second, views_per_second, views_per_cpu_second; threads;
    bad_images; the shares of the CPU time share_reading, share_decode,
    share_crop and share_batching; and from PIL, with one decoding per image or
    one per view, pil_views_per_cpu_second, pil_per_view_views_per_cpu_second,
    and speedup, the ratio of views_per_cpu_second to the former.
  """
  source = make_source(settings, "train")
  view_list = pipeline.view_crops(views)
  batches = pipeline.train_batches(
    source, views=views, batch_size=batch_size, seed=_SEED
  )
  images = batch_size * num_batches
  seconds, cpu_seconds = _time(batches, num_batches)
  result = {
    "images_per_second": images / seconds,
    "views_per_second": images * len(view_list) / seconds,
    "views_per_cpu_second": images * len(view_list) / cpu_seconds,
    "threads": pipeline.num_threads(),
    "bad_images": batches.bad_images,
  }
  del batches  # Stops its threads.
  if not source.small_images:
    result |= _shares(
      source, view_list, batch_size, num_batches, cpu_seconds / images
    )
  if with_pil:
    result |= _pil(source, view_list, min(images, 400))
    result["speedup"] = (
      result["views_per_cpu_second"] / result["pil_views_per_cpu_second"]
    )
  return result


def _time(iterator: Iterator[Any], count: int) -> tuple[float, float]:
  """Wall and CPU seconds of `count` elements, after two to warm up."""
  for _ in range(2):
    next(iterator)
  wall, cpu = time.perf_counter(), time.process_time()
  for _ in range(count):
    next(iterator)
  return time.perf_counter() - wall, time.process_time() - cpu


# --- Shares -------------------------------------------------------------------


def _shares(
  source: Source,
  view_list: list[crops.Crop],
  batch_size: int,
  num_batches: int,
  total: float,
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

  measure = lambda stage: _stage(
    source, stage, len(view_list), batch_size, num_batches
  )
  until = [measure(stage) for stage in (reading, decoding, cropping)]
  until.append(total)
  names = ("share_reading", "share_decode", "share_crop", "share_batching")
  added = np.maximum(np.diff([0.0, *until]), 0.0)
  return dict(zip(names, (added / added.sum()).tolist(), strict=True))


@tf.autograph.experimental.do_not_convert
def _stage(
  source: Source,
  stage: Callable[[dict[str, tf.Tensor]], Any],
  num_views: int,
  batch_size: int,
  num_batches: int,
) -> float:
  """CPU seconds per image of a pipeline that ends with `stage`."""
  records = pipeline.ordered_records(
    source,
    batch_size=batch_size,
    num_views=num_views,
    seed=_SEED,
    start_step=0,
    process_index=0,
    process_count=1,
  )
  records = records.unbatch().map(
    stage, num_parallel_calls=pipeline.num_threads()
  )
  records = records.ignore_errors(log_warning=False).batch(batch_size)
  records = records.with_options(pipeline.options())
  _, cpu_seconds = _time(iter(records), num_batches)
  return cpu_seconds / (batch_size * num_batches)


# --- The reference ------------------------------------------------------------


def _pil(
  source: Source, view_list: list[crops.Crop], count: int
) -> dict[str, float]:
  """Views per CPU second of PIL, one decoding per image or per view."""
  work = list(_pil_work(source, view_list, count))
  num_views = len(work) * len(view_list)
  once = _cpu_seconds(lambda item: _pil_views(*item, view_list), work)
  singles = [
    (contents, [box], [crop])
    for contents, boxes in work
    for box, crop in zip(boxes, view_list, strict=True)
  ]
  per_view = _cpu_seconds(lambda item: _pil_views(*item), singles)
  return {
    "pil_views_per_cpu_second": num_views / once,
    "pil_per_view_views_per_cpu_second": num_views / per_view,
  }


def _pil_work(
  source: Source, view_list: list[crops.Crop], count: int
) -> Iterator[tuple[bytes, list[tuple[int, ...]]]]:
  """Encoded images with the boxes that the pipeline cuts out of them."""
  from PIL import Image, UnidentifiedImageError

  records = pipeline.ordered_records(
    source,
    batch_size=count,
    num_views=len(view_list),
    seed=_SEED,
    start_step=0,
    process_index=0,
    process_count=1,
  )
  read = source.reader()
  for record in records.unbatch().take(count):
    contents = read(record)
    if contents.dtype == tf.uint8:
      contents = tf.io.encode_png(contents)
    contents = contents.numpy()
    try:
      width, height = Image.open(io.BytesIO(contents)).size
    except (UnidentifiedImageError, OSError):
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


def _cpu_seconds(function: Callable[[Any], Any], items: Iterable[Any]) -> float:
  function(next(iter(items)))
  start = time.process_time()
  for item in items:
    function(item)
  return time.process_time() - start
