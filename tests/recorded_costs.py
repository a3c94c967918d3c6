"""Costs of compiled steps, compared with recorded ones by test_recorded_costs.

A step that got slower shows here without a timer. After a change that is meant
to cost more or less, or with another version of JAX, record the figures again:

  python -m tests.recorded_costs write

They are kept for each version of JAX, and for a TPU of its compiler.
"""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from typing import Any

from ml_collections import ConfigDict

from configs import digits, imagenet_r50
from imsvd_jax import models
from imsvd_jax.benchmarks.costs import compiled_step, slices

FILE = pathlib.Path(__file__).with_suffix(".json")
_NUM_EXAMPLES = 1437
# ResNet-50 with one block in place of three to six.
_SHORT = {
  "resnet14": functools.partial(models.ResNet, models.Bottleneck, (1, 1, 1, 1))
}


def _short_resnet() -> ConfigDict:
  config = imagenet_r50.get_config()
  config.model.backbone = "resnet14"
  config.batch_size = 64
  return config


# name: (recipe, where its step is compiled for).
PROGRAMS = {
  "digits, 1 CPU device": (digits.get_config, "cpu:1"),
  "digits, 8 CPU devices": (digits.get_config, "cpu:8"),
  "short ResNet-50, TPU v5e": (_short_resnet, "v5e:1x1"),
}


def versions(topology: str) -> str | None:
  """Returns what compiles for a slice; None if it is not installed."""
  found = f"jax {importlib.metadata.version('jax')}"
  if topology.startswith("cpu"):
    return found
  if importlib.util.find_spec("libtpu") is None:
    return None
  return f"{found}, libtpu {importlib.metadata.version('libtpu')}"


def measure(name: str) -> dict[str, float]:
  """Returns the figures of a program, per device."""
  recipe, topology = PROGRAMS[name]
  slices.compile_only(topology)
  models.BACKBONES.update(_SHORT)
  slice_ = slices.get_slice(topology)
  report = compiled_step.measure(recipe(), slice_, _NUM_EXAMPLES)
  figures = {
    "flops": report.total("flops"),
    "bytes": report.total("hbm_bytes"),
    "temporaries": report.memory.temporaries,
  }
  for one in report.collectives:
    figures[f"{one.kind}, count"] = one.count
    figures[f"{one.kind}, bytes"] = one.bytes
  return figures


def recorded() -> dict[str, Any]:
  """Returns {program: {versions: figures}}."""
  return json.loads(FILE.read_text()) if FILE.exists() else {}


if __name__ == "__main__":
  from tests.test_recorded_costs import measured_alone

  if sys.argv[1] == "write":
    record = recorded()
    for program, (_, where) in PROGRAMS.items():
      if compiler := versions(where):
        figures = measured_alone(program)
        record.setdefault(program, {})[compiler] = figures
        print(program, figures)
        FILE.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
  else:
    print(json.dumps(measure(sys.argv[1])))
