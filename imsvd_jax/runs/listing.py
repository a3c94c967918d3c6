"""The runs in a folder, and how each is doing."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from imsvd_jax.base import console, files
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import lock, metrics, run_directory
from imsvd_jax.training import verdict

_HEAD = (
  "run",
  "objective, data, backbone",
  "step",
  "epoch",
  "age",
  "verdict",
  "k-NN",
  "linear",
  "",
)


class Row(NamedTuple):
  """A run in one line; "" is what it has not, "?" what cannot be read."""

  name: str
  about: str  # Objective, data and backbone.
  step: str
  epoch: str  # Of how many.
  age: str  # Since it last wrote a number.
  verdict: str
  knn: str
  linear: str
  running: str


def list_runs(folder: str) -> list[Row]:
  """Returns the runs in a folder and in its folders, the newest first.

  Raises:
    UserError: There is no such folder, or no run in it.
  """
  root = files.absolute(folder)
  if not root.is_dir():
    raise UserError(f"{root} is no folder; give one that has runs in it.")
  found = [
    path.parent
    for depth in ("", "*/", "*/*/")
    for path in root.glob(f"{depth}{run_directory.RUN_FILE}")
  ]
  if not found:
    raise UserError(
      f"No runs in {root}; expected folders that `imsvd train` has written."
    )
  ages = {run: _age(run) for run in found}
  return [
    _row(run, root, ages[run]) for run in sorted(found, key=ages.__getitem__)
  ]


def as_text(rows: Sequence[Row]) -> str:
  """Returns a table of rows."""
  table = [_HEAD, *rows]
  widths = [max(map(len, column)) for column in zip(*table, strict=True)]
  return "\n".join(
    "  ".join(map(str.ljust, row, widths)).rstrip() for row in table
  )


def _row(run: epath.Path, root: epath.Path, age: float) -> Row:
  config = _config(run)
  lines = metrics.read_metrics(run)
  running = lock.running(run)
  found = verdict.judge(lines)
  if found is not None and not running:
    found = verdict.at_end(found)
  epochs = [line["epoch"] for line in lines if "epoch" in line]
  steps = [*_saved(run), *(round(line["step"]) for line in lines[-1:])]
  total = config.get("epochs", "?")
  name = os.path.relpath(run, root)
  return Row(
    run.name if name == "." else name,
    _about(config),
    str(max(steps)) if steps else "",
    f"{epochs[-1]:.4g}/{total:.4g}" if epochs and config else "",
    console.duration(age) if age < _NEVER else "",
    found.name if found is not None else "",
    _accuracy(lines, "knn"),
    _accuracy(lines, "linear"),
    running,
  )


_NEVER = 1e12  # Seconds.


def _age(run: epath.Path) -> float:
  path = run / metrics.METRICS_FILE
  try:
    return max(0.0, time.time() - path.stat().mtime)
  except (OSError, AttributeError):
    return _NEVER


def _saved(run: epath.Path) -> list[int]:
  """Returns the steps that have a checkpoint; none if that is not known."""
  try:
    return run_directory.steps_on_disk(run / run_directory.CHECKPOINTS)
  except UserError:
    return []


def _config(run: epath.Path) -> dict[str, Any]:
  try:
    found = json.loads((run / run_directory.CONFIG_FILE).read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def _about(config: Mapping[str, Any]) -> str:
  keys = (("objective", "name"), ("data", "name"), ("model", "backbone"))
  try:
    return " ".join(config[part][name] for part, name in keys)
  except (KeyError, TypeError):
    return "?"


def _accuracy(lines: Sequence[Mapping[str, float]], name: str) -> str:
  """Returns the newest accuracy; that of the final evaluation comes last."""
  for line in reversed(lines):
    for key in (f"final_{name}", f"online/{name}"):
      if key in line:
        return f"{line[key]:.2%}"
  return ""
