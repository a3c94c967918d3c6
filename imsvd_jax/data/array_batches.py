"""Batches of images that are in memory, decoded and of one size.

The host computes which images come, and their boxes; JAX cuts them out, in
training inside of the step. Nothing here needs TensorFlow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from imsvd_jax.data import boxes, order, resampling
from imsvd_jax.data.source import Source
from imsvd_jax.data.squares import Squares

_cut_views = jax.jit(resampling.cut_views, static_argnames=("sizes", "kernel"))
_resample = jax.jit(
  functools.partial(resampling.resample, clip_to_box=False),
  static_argnames=("size", "kernel"),
)


def ordered(
  images: np.ndarray | Squares,
  view_list: Sequence[boxes.Crop],
  *,
  seed: int,
  start_step: int = 0,
  **arguments: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this process's part of each batch, without end, before it is cut.

  Args:
    images: uint8 [n, height, width, C], or squares.
    view_list: The crops of V views.
    seed: Seed of the order and of the crops.
    start_step: The first step to return; earlier ones cost nothing.
    **arguments: Others of `order.batch_of`.

  Yields:
    {"index": int32 [b], "epoch": int32 [b], "boxes": float32 [b, V, 5]}.
  """
  count = images.shape[0]
  for step in itertools.count(start_step):
    epoch, index = order.batch_of(step, count, seed=seed, **arguments)
    uniforms = order.uniforms_of(
      epoch, index, seed=seed, num_views=len(view_list)
    )
    yield {
      "index": index.astype(np.int32),
      "epoch": epoch.astype(np.int32),
      "boxes": _random_boxes(images, index, uniforms, view_list),
    }


def _random_boxes(
  images: np.ndarray | Squares,
  index: np.ndarray,
  uniforms: np.ndarray,
  view_list: Sequence[boxes.Crop],
) -> np.ndarray:
  """Returns the boxes of the images `index`, float32 [b, V, 5]."""
  if not isinstance(images, Squares):
    height, width = images.shape[1:3]
    return boxes.random_boxes(uniforms, height, width, view_list)
  height, width = images.sides[index].T
  drawn = boxes.random_boxes(uniforms, height, width, view_list)
  return images.whole_boxes(index, drawn)


def cropped(
  source: Source,
  images: np.ndarray | Squares,
  view_list: Sequence[boxes.Crop],
  *,
  with_labels: bool,
  **arguments: int,
) -> Iterator[dict[str, Any]]:
  """Yields the batches of `ordered` with their views, see `host_pipeline`."""
  sizes = tuple(crop.size for crop in view_list)
  for batch in ordered(images, view_list, **arguments):
    index = batch["index"]
    views = _cut_views(
      images[index],
      batch.pop("boxes"),
      sizes=sizes,
      kernel=source.train_kernel,
    )
    batch["views"] = tuple(map(np.asarray, views))
    if with_labels and source.labels is not None:
      batch["label"] = source.labels[index]
      batch["mask"] = np.ones(len(index), bool)
    yield batch


def centered(
  source: Source,
  images: np.ndarray | Squares,
  indices: np.ndarray,
  *,
  batch_size: int,
  resize: int,
  crop: int,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the batches of `evaluation_batches.eval_batches`.

  `indices` are those of a whole number of batches; -1 is padding.
  """
  height, width = images.shape[1:3]
  is_cut = (height, width, resize) == (crop, crop, crop)
  for index in indices.reshape(-1, batch_size):
    rows = np.maximum(index, 0)
    pixels = images[rows]
    if isinstance(images, Squares) or not is_cut:
      centers = _center_boxes(images, rows, resize, crop)
      pixels = np.asarray(
        _resample(pixels, centers, size=crop, kernel=source.interpolation)
      )
    batch = {"image": pixels, "index": index, "mask": index >= 0}
    if source.labels is not None:
      known = batch["mask"].reshape(-1, *[1] * (source.labels.ndim - 1))
      batch["label"] = np.where(known, source.labels[rows], -1)
    yield batch


def _center_boxes(
  images: np.ndarray | Squares, rows: np.ndarray, resize: int, crop: int
) -> np.ndarray:
  """Returns what "resize, then crop the center" shows, float32 [b, 5]."""
  if not isinstance(images, Squares):
    height, width = images.shape[1:3]
    box = boxes.center_box(height, width, resize, crop)
    return np.tile(box, (len(rows), 1))
  centers = [
    boxes.center_box(height, width, resize, crop)
    for height, width in images.sides[rows].tolist()
  ]
  return images.boxes(rows, np.stack(centers))
