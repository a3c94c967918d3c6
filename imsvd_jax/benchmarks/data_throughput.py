"""How fast a recipe's images are read, decoded and cropped, on the host.

Beside it: what augmentation on the device costs per image.
"""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from sklearn import datasets

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import (
  host_stages,
  image_paths,
  packed_reading,
  pil_reference,
)
from imsvd_jax.benchmarks.text import Findings
from imsvd_jax.data import boxes, crops, execution, make_source
from imsvd_jax.training import experiment
from imsvd_jax.training.augment import augment_views

# More images only make the measurement slower; the cost per image is the same.
_MAX_BATCH = 64


def benchmark(
  config: ConfigDict,
  *,
  seconds: float,
  reference: bool = False,
  photographs: int = 0,
  packed: bool = False,
) -> Findings:
  """Measures how fast config.data is read, for some seconds per measurement.

  Args:
    reference: Whether to measure PIL with the same crops, too.
    photographs: How many JPEGs to make from scikit-learn's photographs, 500 x
      375 pixels, and to read instead of config.data; 0 reads config.data.
    packed: Whether to pack the images, too, and to measure all beside PIL.

  Raises:
    UserError: The data cannot be read.
  """
  if seconds <= 0:
    raise UserError(f"--seconds={seconds}; expected more than 0.")
  with tempfile.TemporaryDirectory() as folder:
    if photographs:
      console.print_line(f"Writing {photographs} JPEGs ...")
      write_photographs(folder, photographs)
      config = config.copy_and_resolve_references()
      with config.unlocked():
        config.data.update(name="folder", path=folder, num_examples=0)
    results = _measure(config, seconds, reference)
    if packed:
      with tempfile.TemporaryDirectory() as packs:
        batch_size = results["batch_size"]
        results["packed"] = packed_reading.measure(
          config, packs, batch_size, seconds
        )
  return Findings(_as_text(results), results)


def write_photographs(
  folder: str, count: int, *, width: int = 500, height: int = 375
) -> None:
  """Writes JPEGs cut out of scikit-learn's two photographs (640 x 427)."""
  os.makedirs(folder, exist_ok=True)
  photographs = datasets.load_sample_images().images
  rng = np.random.default_rng(host_stages.SEED)
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


def _measure(
  config: ConfigDict, seconds: float, reference: bool
) -> dict[str, Any]:
  """Measures the host's pipeline, and augmentation on the device."""
  experiment.check(config)
  batch_size = min(config.batch_size, _MAX_BATCH)
  total = seconds * (6 + 2 * reference)  # At most.
  console.print_line(f"Measuring, about {total:.0f} s ...")
  return {
    "batch_size": batch_size,
    "view_sizes": [config.views.view1.size] * experiment.NUM_GLOBAL
    + [config.views.local.size] * config.views.num_local,
    "interpolation": config.data.train_interpolation
    or config.data.interpolation,
    "antialias": config.data.antialias,
    **_host(config, batch_size, seconds, reference),
    "device": jax.devices()[0].device_kind,
    # Milliseconds of the device for all views of an image.
    "augment_ms_per_image": _augment_ms(config, batch_size, seconds),
  }


def _host(
  config: ConfigDict, batch_size: int, seconds: float, reference: bool
) -> dict[str, Any]:
  """Measures the training pipeline alone.

  One file may count twice in bad_images. Images that are decoded one by one
  have the shares of `host_stages.stage_shares`.
  """
  source = make_source(config.data, "train")
  view_list = boxes.view_crops(config.views)
  batches = host_stages.training_batches(source, config.views, batch_size)
  images, wall, cpu = host_stages.time_batches(batches, batch_size, seconds)
  num_views = len(view_list)
  result: dict[str, Any] = {
    "images_per_second": images / wall,
    "views_per_second": images * num_views / wall,
    "views_per_cpu_second": images * num_views / cpu,
    "threads": execution.num_threads(),
    "images": images,
    "bad_images": getattr(batches, "bad_images", 0),
    "bad_files": len(source.named),
  }
  if reference:
    result |= pil_reference.beside_pil(
      source, batches, view_list, batch_size, seconds
    )
  del batches  # Stops its threads.
  if source.images is not None:
    result["paths"] = image_paths.measure(config, source, batch_size, seconds)
  else:
    result |= host_stages.stage_shares(
      source, config.views, view_list, batch_size, seconds
    )
  return result


def _augment_ms(config: ConfigDict, batch_size: int, seconds: float) -> float:
  """Returns the milliseconds of one device for all views of an image."""
  rng = np.random.default_rng(0)
  batch = experiment.abstract_batch(config)
  batch = jax.tree.map(
    lambda x: rng.integers(0, 256, (batch_size, *x.shape[1:])).astype(x.dtype),
    batch,
  )
  batch = jax.device_put(batch, jax.devices()[0])
  recipes = experiment.augmentation(config)
  augment = jax.jit(lambda key, batch: augment_views(recipes, key, batch))
  key = jax.random.key(0)
  jax.block_until_ready(augment(key, batch))  # Compiles.
  begin = time.perf_counter()
  times: list[float] = []
  while not times or time.perf_counter() - begin < seconds:
    start = time.perf_counter()
    jax.block_until_ready(augment(key, batch))
    times.append(time.perf_counter() - start)
  return 1e3 * float(np.median(times)) / batch_size


def _as_text(results: dict[str, Any]) -> str:
  sizes = results["view_sizes"]
  counts = ", ".join(f"{sizes.count(s)} of {s}" for s in dict.fromkeys(sizes))
  lines = [
    f"Views per image (pixels): {counts}; {results['interpolation']}"
    f"{', antialiased' * results['antialias']}; "
    f"{results['threads']} thread(s), batches of {results['batch_size']}",
    "",
    _row("images/s", results["images_per_second"]),
    _row("views/s", results["views_per_second"]),
    _row("views per CPU second", results["views_per_cpu_second"]),
  ]
  if "share_decode" in results:
    lines += [
      _row(f"share of {stage}", results[f"share_{stage}"], ".0%")
      for stage in ("reading", "decode", "crop", "batching")
    ]
  else:
    lines.append("(the devices cut the views)")
  lines += [
    _row("bad files", results["bad_files"]),
    _row("bad images", results["bad_images"])
    + f" of {results['images']:,} read",
  ]
  if "speedup" in results:
    per_view = "pil_per_view_views_per_cpu_second"
    lines += [
      "",
      "PIL on one core, the same crops; views per CPU second:",
      _row("decoding once", results["pil_views_per_cpu_second"]),
      _row("decoding per view", results[per_view]),
      _row("pipeline / PIL, once", results["speedup"], ".2f"),
      _row("pipeline / PIL, per view", results["speedup_per_view"], ".2f"),
    ]
  if "packed" in results:
    lines += packed_reading.as_text(results["packed"])
  if "paths" in results:
    lines += image_paths.as_text(results["paths"])
  lines += [
    "",
    _row("augmentation", results["augment_ms_per_image"], ".3f")
    + f" ms per image on one {results['device']}",
  ]
  return "\n".join(lines)


def _row(name: str, value: float, form: str = ",.0f") -> str:
  return f"{name:26}{format(value, form):>10}"
