"""Which number without labels finds the best checkpoint? A study of short runs.

  tfds build fashion_mnist
  python docs/learning_study.py --workdir=runs/study
  python docs/learning_study.py

The first trains and evaluates, the second evaluates what is stored. Runs that
are missing are trained in --workdir, one after the other, and their numbers go
to docs/measurements/learning.json; a second start goes on where the first one
stopped. All scores are reported on a half of the runs, drawn by lot, on which
one is chosen, and on the rest. `python docs/tables.py` writes the tables.
"""

import argparse
import datetime
import functools
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import comparison  # noqa: E402
from imsvd_jax.base.errors import EXIT_NOT_FINITE, Stopped  # noqa: E402
from imsvd_jax.training import verdict  # noqa: E402

STORED = ROOT / "docs" / "measurements" / "learning.json"
STEPS, BATCH, EVERY = 120, 256, 15
# Training images; of Fashion-MNIST a tenth, to keep evaluations short.
IMAGES = {"digits": 1437, "fashion": 6000}
SETTINGS = {
  "digits": {"optimizer.warmup_epochs": 3.0},  # 17 steps.
  "fashion": {
    "optimizer.warmup_epochs": 0.72,
    "model.pool_grid": 1,
    "views.resolution_schedule": (),
    "data.train_split": "train[:6000]",
    "data.eval_split": "test[:2000]",
  },
}

Line = Mapping[str, float]
Lines = Sequence[Line]


class Run(NamedTuple):
  """A recipe of configs/comparison.py and what differs from it."""

  name: str
  mode: str
  changes: dict[str, Any]


_RATES = {
  "imsvd": 0.4,
  "vicreg": 0.02,
  "simclr": 0.4,
  "mveb": 0.4,
  "music": 0.4,
  "barlow_twins": 0.001,
  "superinfo": 0.4,
}
_RATE = "optimizer.base_learning_rate"
_IMSVD = "objective.imsvd."


# IMSVD's terms and sizes; VICReg without the terms that spread.
_VARIANTS = {
  "imsvd-no_entropy": {
    f"{_IMSVD}diagonal_weight": 0.0,
    f"{_IMSVD}off_diagonal_weight": 0.0,
  },
  "vicreg-no_spread": {
    "objective.vicreg.variance_weight": 0.0,
    "objective.vicreg.covariance_weight": 0.0,
  },
  "imsvd-no_off_diagonal": {f"{_IMSVD}off_diagonal_weight": 0.0},
  "imsvd-no_diagonal": {f"{_IMSVD}diagonal_weight": 0.0},
  "imsvd-no_invariance": {f"{_IMSVD}invariance_weight": 0.0},
  "imsvd-bins128": {f"{_IMSVD}num_bins": 128},
  "imsvd-batch8": {"batch_size": 8, "optimizer.warmup_epochs": 0.1},
}


def runs() -> list[Run]:
  """Returns the runs of the study, in turns good and bad ones."""
  parts: list[list[Run]] = [
    [Run(k, f"digits-{k.partition('-')[0]}", v) for k, v in _VARIANTS.items()]
  ]
  for label, factor in (("higher", 300.0), ("low", 0.03), ("high", 30.0)):
    parts.append(
      [
        Run(f"{name}-{label}", f"digits-{name}", {_RATE: factor * rate})
        for name, rate in _RATES.items()
      ]
    )
  for seed in (0, 1):
    parts.insert(
      0,
      [
        Run(f"{name}-seed{seed}", f"digits-{name}", {"seed": seed})
        for name in _RATES
      ],
    )
  on_digits = [run for group in zip(*parts, strict=True) for run in group]
  on_fashion = [
    Run(f"fashion-{name}-{label}", f"fashion-{name}", {_RATE: factor * rate})
    for name, rate in _RATES.items()
    for label, factor in (("good", 1.0), ("higher", 300.0))
  ]
  return on_digits + on_fashion


def config_of(run: Run) -> ConfigDict:
  """Returns the recipe of a run."""
  batch = run.changes.get("batch_size", BATCH)
  data = run.mode.partition("-")[0]
  epoch = IMAGES[data] / batch  # Steps.
  settings = {
    "batch_size": BATCH,
    "epochs": STEPS / epoch,
    "eval.every_epochs": EVERY / epoch,
    "model.width_multiplier": 0.25,
    "eval.collapse_images": 128,
    "eval.linear_epochs": 5,
    "eval.final": False,
    "log.every_steps": 2,
    "checkpoint.every_steps": STEPS,
    "not_finite.max_in_a_row": STEPS,
    **SETTINGS[data],
    **run.changes,
  }
  config = comparison.get_config(run.mode)
  config.update_from_flattened_dict(settings)
  return config


def train(workdir: pathlib.Path) -> None:
  """Trains the runs that are not stored yet, and stores their numbers."""
  from imsvd_jax.train import train_and_evaluate  # Evaluating needs no JAX.

  stored = _stored()
  for run in runs():
    if run.name in stored:
      continue
    print(f"=== {run.name}", file=sys.stderr, flush=True)
    try:
      train_and_evaluate(config_of(run), str(workdir / run.name))
    except Stopped as stopped:
      if stopped.code != EXIT_NOT_FINITE:  # A signal: not done.
        raise
    stored[run.name] = numbers_of(workdir / run.name / "metrics.jsonl")
    STORED.write_text(_as_text(stored))


_KEPT = (
  *("step", "loss", "learning_rate", "online/knn", "online/linear"),
  *("embedding_std", "information", "marginal_entropy_mean", "dead_bins"),
  *(f"online/collapse/rank_me/{part}" for part in ("features", "embeddings")),
  *(f"online/collapse/{n}" for n in ("lidar", "alignment", "uniformity")),
  *(f"online/collapse/codes/{n}" for n in ("kappa", "mutual_information_mean")),
)


def numbers_of(path: pathlib.Path) -> list[dict[str, float | None]]:
  """Returns the numbers of a run's metrics that the study needs."""
  found = []
  for text in path.read_text().splitlines():
    line = json.loads(text)
    if "online/knn" in line or "loss" in line:
      found.append(
        {
          name: float(f"{value:.5g}") if isinstance(value, float) else value
          for name, value in line.items()
          if name in _KEPT
        }
      )
  return found


def _as_text(stored: Mapping[str, Any]) -> str:
  head = {
    "command": "python docs/learning_study.py --workdir=runs/study",
    "date": datetime.date.today().isoformat(),
  }
  lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
  small = functools.partial(json.dumps, separators=(",", ":"))
  rows = [f"{small(k)}: {small(v)}" for k, v in stored.items()]
  lines.append('"rows": {\n' + ",\n".join(rows) + "\n}")
  return "{\n" + ",\n".join(lines) + "\n}\n"


def load() -> dict[str, list[dict[str, float]]]:
  """Returns the stored lines of each run."""
  return {
    name: [
      {k: float("nan") if v is None else v for k, v in line.items()}
      for line in lines
    ]
    for name, lines in _stored().items()
  }


def _stored() -> dict[str, Any]:
  return json.loads(STORED.read_text())["rows"] if STORED.exists() else {}


# --- Evaluation ---------------------------------------------------------------

_PREFIX = "online/collapse/"


def _number(name: str, sign: float = 1.0) -> Callable[[Line, Lines], float]:
  return lambda line, _: sign * line.get(_PREFIX + name, float("nan"))


def _loss(line: Line, before: Lines) -> float:
  """The loss of the last few logged steps, smoothed."""
  losses = [x["loss"] for x in before if "loss" in x][-5:]
  return -statistics.median(losses) if losses else float("nan")


def _spread_and_aligned(line: Line, _: Lines) -> float:
  return -line[_PREFIX + "alignment"] - line[_PREFIX + "uniformity"]


def _mostly_aligned(line: Line, _: Lines) -> float:
  return -2 * line[_PREFIX + "alignment"] - line[_PREFIX + "uniformity"]


def _rank_and_aligned(line: Line, _: Lines) -> float:
  aligned = 1 - line[_PREFIX + "alignment"] / 2
  return line[_PREFIX + "rank_me/features"] * aligned


SCORES: dict[str, Callable[[Line, Lines], float]] = {
  "RankMe of features": _number("rank_me/features"),
  "RankMe of embeddings": _number("rank_me/embeddings"),
  "LiDAR": _number("lidar"),
  "alignment": _number("alignment", -1),
  "uniformity": _number("uniformity", -1),
  "alignment + uniformity": _spread_and_aligned,
  "twice alignment + uniformity": _mostly_aligned,
  "RankMe of features x alignment": _rank_and_aligned,
  "agreement beyond chance": _number("codes/kappa"),
  "information between variables": _number("codes/mutual_information_mean"),
  "loss": _loss,
  "the newest": lambda line, _: line["step"],
}


class Point(NamedTuple):
  """An evaluation after a step, the lines before it, and the verdict on it."""

  line: Line
  before: Lines
  is_bad: bool


def series(lines: Lines) -> list[Point]:
  """Returns each evaluation after a step."""
  found = []
  for i, line in enumerate(lines):
    if "online/knn" in line and line["step"] > 0:
      judged = verdict.judge(lines[: i + 1])
      found.append(Point(line, lines[:i], judged is not None and judged.is_bad))
  return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
  """Returns the rank correlation; 0 where one of the two is constant."""
  x, y = (_ranks(np.asarray(v, float)) for v in (a, b))
  if x.std() == 0 or y.std() == 0:
    return 0.0
  return float(np.corrcoef(x, y)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
  """Returns ranks from 0; equal values have the mean of theirs."""
  below = (values[:, None] > values[None]).sum(1)
  equal = (values[:, None] == values[None]).sum(1)
  return below + (equal - 1) / 2


def report(names: Iterable[str], stored: Mapping[str, Lines]) -> dict[str, Any]:
  """Returns, for each score, how good it is on the named runs."""
  chosen = [series(stored[name]) for name in names]
  return {
    label: found
    for label, score in SCORES.items()
    if (found := _report_of(score, chosen)) is not None
  }


def _report_of(
  score: Callable[[Line, Lines], float],
  runs: Sequence[Sequence[Point]],
) -> dict[str, float] | None:
  lost, knn, linear, last = [], [], [], []
  for points in runs:
    values = np.asarray([score(p.line, p.before) for p in points])
    accuracy = [p.line["online/knn"] for p in points]
    if len(points) < 3 or not np.isfinite(values).any():
      continue
    values = np.where(np.isfinite(values), values, -np.inf)
    # A run keeps no checkpoint of a state that collapses or diverges.
    kept = np.where([p.is_bad for p in points], -np.inf, values)
    best = len(kept) - 1 - int(np.argmax(kept[::-1]))
    lost.append(100 * (max(accuracy) - accuracy[best]))
    knn.append(spearman(values, accuracy))
    heads = [p.line.get("online/linear", float("nan")) for p in points]
    if np.isfinite(heads).all():
      linear.append(spearman(values, heads))
    last.append((values[-1], accuracy[-1]))
  if not lost:
    return None
  return {
    "runs": len(lost),
    "within half a point": float(np.mean(np.asarray(lost) <= 0.5)),
    "within one point": float(np.mean(np.asarray(lost) <= 1.0)),
    "points lost": float(np.mean(lost)),
    "most points lost": max(lost),
    "k-NN": float(np.mean(knn)),
    "linear": float(np.mean(linear)) if linear else float("nan"),
    "over runs": spearman(*zip(*last, strict=True)),
  }


def halves(stored: Mapping[str, Lines]) -> tuple[list[str], list[str]]:
  """Returns the runs to choose on, and those to report on."""
  names = np.random.default_rng(0).permutation([run.name for run in runs()])
  parts = (names[::2], names[1::2])
  first, second = ([n for n in part if n in stored] for part in parts)
  return first, second


# A run fails if it ends so many points of k-NN below its start, which has
# random weights, and it is good if it ends so many above.
CLEARLY = 2.0


def outcome(start: float, end: float) -> str:
  """Returns what became of a run, from its accuracy at the start and end."""
  gain = 100 * (end - start)
  return (
    "failed" if gain < -CLEARLY else "good" if gain > CLEARLY else "neither"
  )


def verdicts(stored: Mapping[str, Lines]) -> dict[str, dict[str, Any]]:
  """Returns, by run, its accuracies, its alarms and when the first came."""
  found: dict[str, dict[str, Any]] = {}
  for name, lines in stored.items():
    bad = [
      (lines[i]["step"], v.name)
      for i in range(len(lines))
      if (v := verdict.judge(lines[: i + 1])) is not None and v.is_bad
    ]
    accuracy = [x["online/knn"] for x in lines if "online/knn" in x]
    last = verdict.judge(lines)
    found[name] = {
      "start": accuracy[0],
      "best": max(accuracy),
      "end": accuracy[-1],
      "alarm": bad[0] if bad else None,
      "verdict": last.name if last is not None else "",
      "outcome": outcome(accuracy[0], accuracy[-1]),
    }
  return found


def main() -> None:
  """Trains if there is a workdir; prints the reports."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workdir", type=pathlib.Path)
  workdir = parser.parse_args().workdir
  if workdir is not None:
    train(workdir.resolve())
  stored = load()
  for title, names in zip(
    ("chosen on", "held out"), halves(stored), strict=True
  ):
    print(f"\n{title}: {len(names)} runs")
    for label, row in report(names, stored).items():
      print(f"{label:32}", *(f"{k} {v:.2f} " for k, v in row.items()))
  print()
  for name, row in verdicts(stored).items():
    accuracy = " ".join(
      f"{100 * row[k]:5.1f}" for k in ("start", "best", "end")
    )
    print(
      f"{name:26} {accuracy}  {row['outcome']:8} {row['alarm']} "
      f" {row['verdict']}"
    )


if __name__ == "__main__":
  main()
