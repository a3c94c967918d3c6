"""The host's work for files, for packs of them, and PIL's, in turn.

PIL decodes each file once and cuts, resizes and flips its views; so does the
pipeline of files. Of a pack, the host reads squares and draws boxes, and the
devices do the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.benchmarks import host_stages, pil_reference
from imsvd_jax.data import boxes, make_source, pack_files, packing
from imsvd_jax.data.pack_options import PackOptions

ROUNDS = 5
_IMAGES = 64  # Of PIL, used in turn.


def measure(
  config: ConfigDict, folder: str, batch_size: int, seconds: float
) -> dict[str, dict[str, Any]]:
  """Measures files, both kinds of pack and PIL, in turn, round by round.

  Args:
    config: Its data are files.
    folder: Where to put the packs.
    batch_size: Images of a batch.
    seconds: How long each measurement lasts.

  Returns:
    By the contender: views_per_cpu_second and times_pil, each as median,
    smallest and largest; bytes of an image on disk, and of pixels that are
    sent to the devices.
  """
  source = make_source(config.data, "train")
  view_list = boxes.view_crops(config.views)
  sources = {"files": source}
  found: dict[str, dict[str, Any]] = {}
  for kind in pack_files.ENCODINGS:
    path = os.path.join(folder, kind)
    packing.pack(path, {"train": source}, PackOptions(format=kind))
    packed = config.copy_and_resolve_references()
    packed.data.update(name="pack", path=path)
    sources[f"pack, {kind}"] = make_source(packed.data, "train")
    size = sum(entry.stat().st_size for entry in os.scandir(path))
    found[f"pack, {kind}"] = {"disk_bytes": size / source.num_examples}
  contenders: dict[str, Callable[[], float]] = {}
  for name, each in sources.items():
    batches = host_stages.training_batches(each, config.views, batch_size)
    found.setdefault(name, {})["sent_bytes"] = _pixels(batches, batch_size)
    contenders[name] = _pace(batches, batch_size, len(view_list), seconds)
  contenders["PIL"] = _pil_pace(source, view_list, seconds)
  paces: dict[str, list[float]] = {name: [] for name in contenders}
  for _ in range(ROUNDS):
    for name, pace in contenders.items():
      paces[name].append(pace())
  for name, values in paces.items():
    ratios = np.divide(values, paces["PIL"])
    found.setdefault(name, {}).update(
      views_per_cpu_second=_range(values), times_pil=_range(ratios)
    )
  return found


def as_text(found: dict[str, dict[str, Any]]) -> list[str]:
  """Returns a table of what was measured, line by line."""
  lines = ["", "Beside PIL, which decodes once; median [min, max] of rounds:"]
  for name, row in found.items():
    speed = "{:,.0f} [{:,.0f}, {:,.0f}]".format(*row["views_per_cpu_second"])
    ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*row["times_pil"])
    sizes = [
      f"{row[key] / 1e3:.1f} kB {what}"
      for key, what in (("disk_bytes", "on disk"), ("sent_bytes", "sent"))
      if key in row
    ]
    about = ", ".join([f"{speed} views per CPU second", f"x {ratio}", *sizes])
    lines.append(f"{name:12} {about}")
  return lines


def _pixels(batches: Iterator[dict[str, Any]], batch_size: int) -> float:
  """Returns the bytes of pixels that travel for an image."""
  batch = next(batches)
  pixels = [batch["images"]] if "images" in batch else batch["views"]
  return sum(group.nbytes for group in pixels) / batch_size


def _pace(
  batches: Iterator[Any], batch_size: int, num_views: int, seconds: float
) -> Callable[[], float]:
  def pace() -> float:
    images, _, cpu = host_stages.time_batches(batches, batch_size, seconds)
    return images * num_views / cpu

  return pace


def _pil_pace(
  source: Any, view_list: list[boxes.Crop], seconds: float
) -> Callable[[], float]:
  work = list(pil_reference.work_of(source, view_list, _IMAGES))
  kernel = source.train_kernel.upper()

  def pace() -> float:
    images, start = 0, time.thread_time()
    while (spent := time.thread_time() - start) < seconds or not images:
      contents, places = work[images % len(work)]
      pil_reference.views_of(contents, places, view_list, kernel)
      images += 1
    return images * len(view_list) / spent

  return pace


def _range(values: Any) -> tuple[float, float, float]:
  return float(np.median(values)), float(np.min(values)), float(np.max(values))
