"""Trains the small recipes and stores their accuracies for docs/results.md.

  tfds build fashion_mnist
  python docs/results.py --workdir=runs/results
  python docs/results.py --workdir=runs/results --only=digits,shapes

Runs that docs/measurements/results.json does not have yet are trained one after
the other, each in its own folder of --workdir, and added to that file. A second
start goes on where the first one stopped. `--list` prints the runs and trains
none. `python docs/tables.py` then writes the tables.

Digits are stored per minor version of JAX, because rounding differs between two
of them and 300 steps make a different network of it.
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import (  # noqa: E402
  comparison,
  digits,
  digits_convnext,
  digits_vit,
  shapes,
)
from imsvd_jax.base.errors import Stopped  # noqa: E402
from imsvd_jax.train import train_and_evaluate  # noqa: E402
from imsvd_jax.training import step  # noqa: E402

STORED = ROOT / "docs" / "measurements" / "results.json"


class Run(NamedTuple):
  """A recipe with a seed and what else differs from it."""

  group: str
  name: str  # Of the row: what is compared.
  seed: int
  config: ConfigDict

  @property
  def key(self) -> str:
    """Returns the run's name in the file, and its folder's."""
    return f"{self.group}-{self.name}-seed{self.seed}"


GROUPS = ("digits", "shapes", "backbones", "crops", "fashion")
BACKBONES = {
  "resnet": digits,
  "vit": digits_vit,
  "convnext": digits_convnext,
}
# Seeds of the objectives in the order in which they are trained.
SEEDS = {"imsvd": 3, "music": 3}


def runs() -> list[Run]:
  """Returns every run, the first seed of each row before the others."""
  line = ".".join(jax.__version__.split(".")[:2])
  found = [
    Run("digits", f"jax{line}", seed, digits.get_config()) for seed in range(5)
  ]
  found += [Run("shapes", "imsvd", s, shapes.get_config()) for s in range(3)]
  for recipe in BACKBONES:
    for objective in ("imsvd", "mveb", "simclr"):
      config = BACKBONES[recipe].get_config()
      config.objective.name = objective
      config.update_from_flattened_dict(comparison.OBJECTIVES[objective])
      found.append(Run("backbones", f"{recipe}-{objective}", 0, config))
  for seed in range(3):
    found += [Run("crops", name, seed, _multi_crop()) for name in CROPS]
  for seed in range(3):
    for name in comparison.OBJECTIVES:
      if seed < SEEDS.get(name, 1):
        config = comparison.get_config(f"fashion-{name}")
        found.append(Run("fashion", name, seed, config))
  return found


def _multi_crop() -> ConfigDict:
  """Returns MVEB on Fashion-MNIST with six crops of 14 pixels, one epoch."""
  config = comparison.get_config("fashion-mveb")
  config.model.pool_grid = 1
  config.views.resolution_schedule = ()
  config.epochs = 1.0
  config.optimizer.warmup_epochs = 0.25
  config.views.local.update(config.views.view1)
  config.views.local.size = 14
  config.views.local.crop_scale = (0.1, 0.4)
  config.views.num_local = 6
  return config


_embed_views = step.embed_views


def _embed_apart(model: Any, params: Any, batch_stats: Any, views: Any, *rest):
  """As `embed_views`, but each local crop goes through by itself."""
  embeddings = []
  for images in (image for group in views for image in group):
    z, batch_stats = _embed_views(
      model, params, batch_stats, [images[None]], *rest
    )
    embeddings += z
  return embeddings, batch_stats


# How local crops go through BatchNorm, see docs/objectives.md.
CROPS = {"together": _embed_views, "apart": _embed_apart}


def train(run: Run, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains and returns accuracies and minutes.

  A run that ended in `workdir` before is not trained again.
  """
  config = run.config
  config.seed = run.seed
  config.eval.every_epochs = 0.0
  config.eval.baselines &= run.seed == 0 and run.group != "crops"
  step.embed_views = CROPS.get(run.name, _embed_views)
  start, cpu = time.perf_counter(), cpu_seconds()
  train_and_evaluate(config, str(workdir))
  found = {
    "minutes": round((time.perf_counter() - start) / 60, 1),
    "cpu_minutes": round((cpu_seconds() - cpu) / 60, 1),
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[2], 1),
    "jax": jax.__version__,
    "date": datetime.date.today().isoformat(),
  }
  for result in json.loads((workdir / "results.json").read_text())["results"]:
    if not result["online"]:
      part = found.setdefault(result["encoder"], {})
      part[result["evaluator"]] = round(100 * result["final"], 2)
  return found


def cpu_seconds() -> float:
  """Returns the CPU time of this process and of those that it has ended."""
  return sum(os.times()[:4])


def stored() -> dict[str, Any]:
  """Returns the runs in the file."""
  return json.loads(STORED.read_text())["rows"] if STORED.exists() else {}


def store(rows: Mapping[str, Any]) -> None:
  """Replaces the file."""
  head = {
    "command": "python docs/results.py --workdir=runs/results",
    "date": max(row["date"] for row in rows.values()),
  }
  lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
  of_rows = [f"{json.dumps(k)}: {json.dumps(rows[k])}" for k in sorted(rows)]
  lines.append('"rows": {\n' + ",\n".join(of_rows) + "\n}")
  STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
  """Trains, stores or lists what the flags name."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/results")
  parser.add_argument("--only", default=",".join(GROUPS), help="groups")
  parser.add_argument("--list", action="store_true", help="train none")
  flags = parser.parse_args()
  only = flags.only.split(",")
  if unknown := set(only) - set(GROUPS):
    parser.error(f"--only={flags.only}: {unknown} is none of {GROUPS}")
  for run in runs():
    if run.group not in only:
      continue
    if flags.list:
      print(run.key, "stored" if run.key in stored() else "missing")
    elif run.key not in stored():
      print(f"=== {run.key}", file=sys.stderr, flush=True)
      row = train(run, flags.workdir / run.key)
      store({**stored(), run.key: row})  # Others may have added rows.


if __name__ == "__main__":
  try:
    main()
  except Stopped as stopped:
    sys.exit(stopped.code)
