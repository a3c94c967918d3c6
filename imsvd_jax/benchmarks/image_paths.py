"""Three ways from images in memory to the views of a batch, beside each other.

All end with the same augmented views, on the device: cut on the host; cut on
the device from the images of the batch, which travel uncut; or from the whole
data set, which stays on the device.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base import devices
from imsvd_jax.benchmarks import host_stages
from imsvd_jax.data import array_batches, boxes, host_pipeline, placement
from imsvd_jax.data.source import Source
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.augment import augment_views

_ROUNDS = 3  # Of each way, in turns.


def measure(
  config: ConfigDict, source: Source, batch_size: int, seconds: float
) -> dict[str, dict[str, float]]:
  """Measures each way for some seconds, on one device.

  Returns:
    By way: images_per_second and cpu_seconds, those of 1000 images, at the
    median of three rounds, and sent_bytes, those that an image sends to the
    device.
  """
  experiment = experiment_lib.build(config, source.num_examples)
  mesh = devices.make_mesh(jax.devices()[:1])
  recipes = experiment_lib.augmentation(config)
  key = jax.random.key(0)

  @jax.jit
  def views(batch: dict[str, Any]) -> Any:
    whole = step_lib.cut_views(experiment, batch)
    return augment_views(recipes, key, whole)

  found = {}
  ways = _ways(config, source, batch_size, mesh)
  sent = {name: _sent(next(batches)) for name, (batches, _) in ways.items()}
  speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
  for batches, placed in ways.values():
    jax.block_until_ready(_run(views, batches, placed))  # Compiles.
  for _, name in itertools.product(range(_ROUNDS), ways):
    host_stages.settle()
    batches, placed = ways[name]
    run = functools.partial(_run, views, batches, placed)
    speeds[name].append(_time(run, seconds / _ROUNDS))
  for name, of_rounds in speeds.items():
    wall, cpu = np.median(of_rounds, axis=0) / batch_size
    found[name] = {
      "images_per_second": 1 / float(wall),
      "cpu_seconds": 1000 * float(cpu),
      "sent_bytes": sent[name] / batch_size,
    }
  return found


def _run(
  views: Callable[[dict[str, Any]], Any],
  batches: Iterator[dict[str, Any]],
  placed: dict[str, Any],
) -> Any:
  return views(next(batches) | placed)


def _ways(
  config: ConfigDict, source: Source, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, tuple[Iterator[dict[str, Any]], dict[str, Any]]]:
  """Returns the batches of each way, and what is on the device already."""
  images = source.images
  assert images is not None
  order = dict(seed=host_stages.SEED, process_index=0, process_count=1)
  data_set = placement.data_set(source, "device", mesh)

  def uncut() -> Iterator[dict[str, Any]]:
    return array_batches.ordered(
      images, boxes.view_crops(config.views), batch_size=batch_size, **order
    )

  return {
    "cut on the host": (
      host_pipeline.train_batches(
        source, views=config.views, batch_size=batch_size, **order
      ),
      {},
    ),
    "kept on the host, cut on the device": (
      placement.with_images(uncut(), images),
      {},
    ),
    "kept and cut on the device": (uncut(), {"data_set": data_set}),
  }


def _sent(batch: dict[str, Any]) -> int:
  return sum(array.nbytes for array in jax.tree.leaves(batch))


def _time(run: Callable[[], Any], seconds: float) -> tuple[float, float]:
  """Returns the wall and CPU seconds of a run, the mean of many."""
  count, wall, cpu = 0, time.perf_counter(), time.process_time()
  while not count or time.perf_counter() - wall < seconds:
    jax.block_until_ready(run())
    count += 1
  return (
    (time.perf_counter() - wall) / count,
    (time.process_time() - cpu) / count,
  )


def as_text(found: dict[str, dict[str, float]]) -> list[str]:
  """Returns a table as lines."""
  lines = [
    "",
    "From images in memory to augmented views, one device:",
    f"{'':38}{'images/s':>10}{'CPU s / 1000':>14}{'bytes sent':>12}",
  ]
  for name, row in found.items():
    lines.append(
      f"{name:38}{row['images_per_second']:>10,.0f}{row['cpu_seconds']:>14.3f}"
      f"{row['sent_bytes']:>12,.0f}"
    )
  return lines
