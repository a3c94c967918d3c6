"""Runs side by side: one row per configuration, its seeds as one number."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from imsvd_jax.base.config import HARMLESS_KEYS, flatten
from imsvd_jax.base.errors import UserError

# Keys of a config that do not change what is learned, but for chance.
_IGNORED = ("seed", *HARMLESS_KEYS)


class Run(NamedTuple):
  """A run and what was measured of it."""

  config: Mapping[str, Any]  # nested
  results: Sequence[Mapping[str, Any]]  # entries of results.json


def seed_interval(
  values: Sequence[float],
) -> tuple[float, tuple[float, float]]:
  """Returns the mean over seeds and Student's 95% interval of it.

    mean +- t(0.975, n - 1) s / sqrt(n)

  Args:
    values: One number per seed, two or more.
  """
  values = np.asarray(values, np.float64)
  if len(values) < 2:
    raise UserError("An interval over seeds of one run; expected two or more.")
  mean = float(values.mean())
  quantile = float(special.stdtrit(len(values) - 1, 0.975))
  half_width = quantile * float(values.std(ddof=1)) / math.sqrt(len(values))
  return mean, (mean - half_width, mean + half_width)


def markdown_table(
  runs: Iterable[Run], protocols: Sequence[str] | None = None
) -> str:
  """Returns a Markdown table: a row per configuration, a column per protocol.

  Runs that differ in their seed alone are one row. A cell is the mean in
  percent and its 95% interval: over seeds (Student's t) where there are two or
  more, over the test images where there is one. Of a run one set of weights
  counts: of the newest step measured, and there what was measured last.

  Args:
    runs: The runs.
    protocols: The columns; all protocols with a number by default.

  Raises:
    UserError: There is nothing to show.
  """
  runs = [Run(run.config, _newest(run.results)) for run in runs]
  if protocols is None:
    found = (e["protocol"] for run in runs for e in run.results)
    protocols = list(dict.fromkeys(found))
  if not protocols:
    raise UserError(
      "No run has a number to compare; measure some first, for example with"
      " --protocol=knn/imsvd."
    )
  groups: dict[str, list[Run]] = {}
  for run in runs:
    key = json.dumps(_identity(run.config), sort_keys=True)
    groups.setdefault(key, []).append(run)
  names = _names([group[0].config for group in groups.values()])
  lines = [
    "| " + " | ".join(["run", "data", "seeds", *protocols]) + " |",
    "|---|---|---:|" + "---:|" * len(protocols),
  ]
  for name, group in zip(names, groups.values(), strict=True):
    cells = [_cell(group, protocol) for protocol in protocols]
    data = ", ".join(
      dict.fromkeys(str(e["data"]["name"]) for r in group for e in r.results)
    )
    row = [name, data, str(len(group)), *cells]
    lines.append("| " + " | ".join(row) + " |")
  return "\n".join(lines)


def _newest(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Leaves out what has no number, and all weights but the newest measured."""
  entries = [e for e in entries if e.get("final") is not None]
  if not entries:
    return []
  # Of what was written in one second, the last in the file.
  newest = max(
    reversed(entries), key=lambda e: (e["step"] or 0, e.get("written", ""))
  )
  return [e for e in entries if _weights(e) == _weights(newest)]


def _weights(entry: Mapping[str, Any]) -> tuple[int | None, str | None]:
  return entry["step"], entry.get("weights")


def _cell(group: Sequence[Run], protocol: str) -> str:
  found = [
    [e for e in run.results if e["protocol"] == protocol] for run in group
  ]
  if any(len(entries) > 1 for entries in found):
    raise UserError(
      f"A run has several results of {protocol}, with other hyper-parameters"
      " or data; compare one at a time."
    )
  entries = [entries[0] for entries in found if entries]
  settings = {json.dumps(e["hyperparameters"], sort_keys=True) for e in entries}
  if len(settings) > 1:
    raise UserError(
      f"{protocol} was measured with different hyper-parameters; measure all"
      " runs alike."
    )
  if not entries:
    return ""
  values = [entry["final"] for entry in entries]
  if len(values) > 1:
    value, interval = seed_interval(values)
  else:
    value, interval = values[0], entries[0]["interval"]
  missing = f" ({len(values)} seeds)" if len(values) != len(group) else ""
  return f"{_percent(value)}{_range(interval)}{missing}"


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


def _range(interval: Sequence[float] | None) -> str:
  if interval is None:
    return ""
  # Student's interval knows nothing of the ends of a proportion.
  low, high = max(0.0, interval[0]), min(1.0, interval[1])
  return f" ({_percent(low)} to {_percent(high)})"


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """What was trained: the config without the seed, as one level."""
  kept = {k: v for k, v in config.items() if k not in _IGNORED}
  flat = flatten(kept)
  name = flat.get("objective.name", "")
  # The hyper-parameters of the other objectives are not used.
  return {
    key: value
    for key, value in flat.items()
    if key.count(".") < 2
    or not key.startswith("objective.")
    or key.startswith(f"objective.{name}.")
  }


def _names(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """Names rows by their objective, and by what tells equal ones apart."""
  flats = [_identity(config) for config in configs]
  bases = [str(flat.get("objective.name") or "weights") for flat in flats]
  names = []
  for flat, base in zip(flats, bases, strict=True):
    alike = [f for f, b in zip(flats, bases, strict=True) if b == base]
    differing = sorted(
      key
      for key in {k for f in alike for k in f}
      if len({json.dumps(f.get(key)) for f in alike}) > 1
    )
    # Data sets have a column of their own, and drag many keys along.
    if len({f.get("data.name") for f in alike}) == len(alike):
      differing = []
    values = ", ".join(f"{key}={flat.get(key)}" for key in differing)
    names.append(f"{base} ({values})" if values else base)
  return names
