"""What a PyTorch pipeline does with the same images and the same boxes, by PIL.

PIL decodes an image once (or once per view), then cuts, resizes and flips it
for each view, on one core. It takes turns with our pipeline, batch by batch, so
that both meet the same disturbances.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.benchmarks import host_stages
from imsvd_jax.data import crops
from imsvd_jax.data.source import Source

_IMAGES = 64  # Read once; used in turn.
_TURN = 16  # Images between two batches of the pipeline.


def beside_pil(
  source: Source,
  batches: Iterator[dict[str, Any]],
  view_list: list[crops.Crop],
  batch_size: int,
  seconds: float,
) -> dict[str, float]:
  """Runs the pipeline and PIL in turn, with one decoding per image or view.

  PIL works in this thread, whose CPU time is its own; the rest of the process's
  CPU time is the pipeline's. This takes at least twice as many seconds.

  Returns:
    pil_views_per_cpu_second, pil_per_view_views_per_cpu_second, and the ratios
    of the pipeline's speed to them: speedup and speedup_per_view. Nothing if
    PIL can read no image.
  """
  work = list(work_of(source, view_list, _IMAGES))
  if not work:
    return {}
  num_views, kernel = len(view_list), source.train_kernel.upper()
  pil = {"once": 0.0, "per_view": 0.0}
  images = turns = 0
  host_stages.settle()
  wall, cpu = time.perf_counter(), time.process_time()
  while turns < 2 or time.perf_counter() - wall < 2 * seconds:
    next(batches)
    images += batch_size
    start = time.thread_time()
    for turn in range(turns * _TURN, (turns + 1) * _TURN):
      contents, boxes = work[turn % len(work)]
      views_of(contents, boxes, view_list, kernel)
      middle = time.thread_time()
      for box, crop in zip(boxes, view_list, strict=True):
        views_of(contents, [box], [crop], kernel)
      end = time.thread_time()
      pil["once"] += middle - start
      pil["per_view"] += end - middle
      start = end
    turns += 1
  host_stages.settle()
  cpu = time.process_time() - cpu - sum(pil.values())
  ours = images * num_views / cpu
  once, per_view = (turns * _TURN * num_views / s for s in pil.values())
  return {
    "pil_views_per_cpu_second": once,
    "pil_per_view_views_per_cpu_second": per_view,
    "speedup": ours / once,
    "speedup_per_view": ours / per_view,
  }


def work_of(
  source: Source, view_list: list[crops.Crop], count: int
) -> Iterator[tuple[bytes, list[tuple[int, ...]]]]:
  """Yields encoded images with the boxes that the pipeline cuts from them."""
  from PIL import Image

  read = source.reader()
  for record in host_stages.records(source, count, len(view_list)).take(count):
    contents = read(record)
    if contents.dtype == tf.uint8:
      contents = tf.io.encode_png(contents)
    contents = contents.numpy()
    try:
      width, height = Image.open(io.BytesIO(contents)).convert("RGB").size
    except (OSError, SyntaxError):  # PIL's errors for what it cannot read.
      continue
    sides = tf.constant(float(height)), tf.constant(float(width))
    columns = crops.random_boxes(record["uniforms"], *sides, view_list)
    boxes = zip(*(column.numpy() for column in columns), strict=True)
    yield contents, [tuple(int(side) for side in box) for box in boxes]


def views_of(
  contents: bytes,
  boxes: list[tuple[int, ...]],
  view_list: list[crops.Crop],
  kernel: str,
) -> list[np.ndarray]:
  """Returns the crops of an image, cut by PIL."""
  from PIL import Image

  image = Image.open(io.BytesIO(contents)).convert("RGB")
  views = []
  for (top, left, height, width, flip), crop in zip(
    boxes, view_list, strict=True
  ):
    view = image.crop((left, top, left + width, top + height))
    view = view.resize((crop.size, crop.size), Image.Resampling[kernel])
    if flip:
      view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    views.append(np.asarray(view))
  return views
