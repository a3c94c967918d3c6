"""Runs side by side: one row per configuration, its seeds as one number."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from imsvd_jax.base.config import HARMLESS_KEYS, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.results import TRAINED

# Keys of a config that do not change what is learned, except by chance.
_IGNORED = ("seed", *HARMLESS_KEYS)


class Run(NamedTuple):
  """A run and its measurements."""

  config: Mapping[str, Any]  # Nested.
  results: Sequence[Mapping[str, Any]]  # Entries of results.json.
  name: str = ""  # Of its row; by default what its config says.


def seed_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
  """Returns the mean over seeds and Student's 95% interval of it.

  mean +- t(0.975, n - 1) s / sqrt(n),   n two or more
  """
  if len(values) < 2:
    raise UserError("An interval over seeds of one run; expected two or more.")
  numbers = np.asarray(values, np.float64)
  mean = float(numbers.mean())
  quantile = float(special.stdtrit(len(values) - 1, 0.975))
  half_width = quantile * float(numbers.std(ddof=1)) / math.sqrt(len(values))
  return mean, (mean - half_width, mean + half_width)


def markdown_table(
  runs: Iterable[Run], *, more: Mapping[str, Mapping[str, str]] | None = None
) -> str:
  """Returns a Markdown table: a row per configuration, a column per protocol.

  Runs that differ in their seed alone are one row. A cell is the mean in
  percent and its 95% interval: over seeds (Student's t) where there are two or
  more, over the test images where there is one. Of a run one set of weights
  counts: of the newest step measured, and there what was measured last.

  Baselines that runs measured beside themselves are rows above the others.
  Their cells are ranges: runs with one network and seed have them in common.

  Args:
    more: Further columns: from their header to a cell per name of a row.

  Raises:
    UserError: There is nothing to show.
  """
  runs = list(runs)
  baselines = _baselines(runs)
  runs = [run._replace(results=_newest(run.results)) for run in runs]
  names = dict.fromkeys(e["protocol"] for run in runs for e in run.results)
  if not names:
    raise UserError(
      "No run has a number to compare; measure some first, for example with"
      " --protocol=knn/imsvd."
    )
  groups = _groups(runs)
  rows = [
    [name, _data_names(found), "", *(_range_cell(found, p) for p in names)]
    for name, found in baselines.items()
  ]
  for name, group in groups.items():
    data = _data_names([e for run in group for e in run.results])
    cells = [_cell(group, protocol) for protocol in names]
    rows.append([name, data, str(len(group)), *cells])
  header = ["run", "data", "seeds", *names]
  for column, by_name in (more or {}).items():
    header.append(column)
    for row in rows:
      row.append(by_name.get(row[0], ""))
  return as_markdown(header, rows)


def as_markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table; all columns but the first two are aligned right."""
  align = ["---"] * 2 + ["---:"] * (len(header) - 2)
  lines = [f"| {' | '.join(row)} |" for row in (header, *rows)]
  return "\n".join([lines[0], f"|{'|'.join(align)}|", *lines[1:]])


def _groups(runs: Iterable[Run]) -> dict[str, list[Run]]:
  """Returns the runs by the name of their row."""
  groups: dict[str, list[Run]] = {}
  for run in runs:
    key = run.name or json.dumps(_identity(run.config), sort_keys=True)
    groups.setdefault(key, []).append(run)
  names = _names([group[0].config for group in groups.values()])
  return {
    group[0].name or name: group
    for name, group in zip(names, groups.values(), strict=True)
  }


def _baselines(runs: Iterable[Run]) -> dict[str, list[Mapping[str, Any]]]:
  """Returns the entries of encoders that are not trained, by their name."""
  found: dict[str, list[Mapping[str, Any]]] = {}
  for entry in (entry for run in runs for entry in run.results):
    if entry.get("encoder", TRAINED) != TRAINED:
      found.setdefault(entry["encoder"], []).append(entry)
  return found


def _data_names(entries: Iterable[Mapping[str, Any]]) -> str:
  return ", ".join(dict.fromkeys(str(e["data"]["name"]) for e in entries))


def _newest(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
  """Leaves out what has no number, baselines and former weights."""
  entries = [
    e
    for e in entries
    if e.get("final") is not None and e.get("encoder", TRAINED) == TRAINED
  ]
  if not entries:
    return []
  # Of what was written in one second, the last in the file.
  newest = max(
    reversed(entries), key=lambda e: (e["step"] or 0, e.get("written", ""))
  )
  weights = lambda entry: (entry["step"], entry.get("weights"))
  return [e for e in entries if weights(e) == weights(newest)]


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
  value, interval = values[0], entries[0]["interval"]
  if len(values) > 1:
    value, interval = seed_interval(values)
  missing = f" ({len(values)} seeds)" if len(values) != len(group) else ""
  if interval is None:
    return f"{_percent(value)}{missing}"
  # Student's interval may reach beyond the ends of a proportion.
  low, high = (_percent(min(max(end, 0.0), 1.0)) for end in interval)
  return f"{_percent(value)} ({low} to {high}){missing}"


def _range_cell(entries: Iterable[Mapping[str, Any]], protocol: str) -> str:
  """Returns "96.7", or "93.1 to 94.0" where runs differ."""
  values = [e["final"] for e in entries if e["protocol"] == protocol]
  if not values:
    return ""
  ends = dict.fromkeys(_percent(v) for v in (min(values), max(values)))
  return " to ".join(ends)


def _percent(value: float) -> str:
  return f"{100 * value:.1f}"


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
