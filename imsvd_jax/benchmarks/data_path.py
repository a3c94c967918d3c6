"""What `python -m imsvd_jax benchmark data` measures and prints.

The host's half alone, and beside it what the device's half of augmentation
costs per image.
"""

import json
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import pipeline_speed
from imsvd_jax.training import augment as augment_lib
from imsvd_jax.training import experiment

# Batches of more images only make the measurement slower; the cost per image is
# the same.
_MAX_BATCH = 64


def main(
  config: Any,
  *,
  seconds: float = 5.0,
  reference: bool = False,
  photographs: int = 0,
  as_json: bool = False,
) -> None:
  """Prints how fast config.data can be read, on standard output.

  Args:
    config: A recipe (see configs/common.py).
    seconds: How long each measurement lasts.
    reference: Whether to measure PIL doing the same crops, too.
    photographs: If not 0, so many JPEGs of 500 x 375 pixels made from
      scikit-learn's photographs are read instead of config.data.
    as_json: Whether to print JSON.

  Raises:
    UserError: The data cannot be read.
  """
  if seconds <= 0:
    raise UserError(f"seconds is {seconds}; expected more than 0.")
  with tempfile.TemporaryDirectory() as folder:
    if photographs:
      _note(f"Writing {photographs} JPEGs ...")
      pipeline_speed.write_photographs(folder, photographs)
      config = config.copy_and_resolve_references()
      with config.unlocked():
        config.data.update(name="folder", path=folder, num_examples=0)
    results = run(config, seconds=seconds, reference=reference)
  print(json.dumps(results, indent=2) if as_json else as_text(results))


def run(
  config: Any, *, seconds: float = 5.0, reference: bool = False
) -> dict[str, Any]:
  """Returns what `data.benchmark.run` does, and the device's half.

  Args:
    config: A recipe.
    seconds: How long each measurement lasts.
    reference: Whether to measure PIL, too.

  Returns:
    The host's figures by name, "batch_size", "view_sizes", "interpolation",
    "device" and "augment_ms_per_image": milliseconds of the device for all
    views of an image.
  """
  experiment.check(config)
  batch_size = min(config.batch_size, _MAX_BATCH)
  total = seconds * (6 + 2 * reference)
  _note(f"Measuring, about {total:.0f} s ...")
  results = {
    "batch_size": batch_size,
    "view_sizes": [config.views.view1.size] * experiment.NUM_GLOBAL
    + [config.views.local.size] * config.views.num_local,
    "interpolation": config.data.interpolation,
  }
  results |= pipeline_speed.run(
    config.data,
    config.views,
    batch_size=batch_size,
    seconds=seconds,
    reference=reference,
  )
  results["device"] = jax.devices()[0].device_kind
  results["augment_ms_per_image"] = _augment_ms(config, batch_size, seconds)
  return results


def _augment_ms(config: Any, batch_size: int, seconds: float) -> float:
  """Milliseconds of one device for one image's views; median of calls."""
  rng = np.random.default_rng(0)
  batch = experiment.abstract_batch(config)
  batch = jax.tree.map(
    lambda x: rng.integers(0, 256, (batch_size, *x.shape[1:])).astype(x.dtype),
    batch,
  )
  batch = jax.device_put(batch, jax.devices()[0])
  recipes = experiment.augmentation(config)
  augment = jax.jit(
    lambda key, batch: augment_lib.augment_views(recipes, key, batch)
  )
  key = jax.random.key(0)
  jax.block_until_ready(augment(key, batch))  # Compiles.
  times, begin = [], time.perf_counter()
  while not times or time.perf_counter() - begin < seconds:
    start = time.perf_counter()
    jax.block_until_ready(augment(key, batch))
    times.append(time.perf_counter() - start)
  return 1e3 * float(np.median(times)) / batch_size


def as_text(results: dict[str, Any]) -> str:
  """Returns the figures of `run` for people."""
  sizes = results["view_sizes"]
  counts = ", ".join(f"{sizes.count(s)} of {s}" for s in dict.fromkeys(sizes))
  lines = [
    f"Views per image (pixels): {counts}; {results['interpolation']};"
    f" {results['threads']} thread(s), batches of {results['batch_size']}",
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
    lines.append("(decoded in memory: a whole batch is cropped at once)")
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
  lines += [
    "",
    _row("augmentation", results["augment_ms_per_image"], ".3f")
    + f" ms per image on one {results['device']}",
  ]
  return "\n".join(lines)


def _row(name: str, value: float, form: str = ",.0f") -> str:
  return f"{name:26}{format(value, form):>10}"


def _note(message: str) -> None:
  print(message, file=sys.stderr, flush=True)
