"""results.json, which also says how each number was made; console tables."""

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import imsvd_jax
from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.features import reason_of

SCHEMA = 1
FILE_NAME = "results.json"
TRAINED, RANDOM_INIT, RAW_PIXELS = "trained", "random init", "raw pixels"
_HEADLINE = ("final", "best", "low", "high")


@dataclasses.dataclass(frozen=True)
class Result:
  """One protocol on one checkpoint."""

  protocol: str  # Its name: in `PROTOCOLS`, or that of `online` or `final`.
  evaluator: str  # Its name in `registry.EVALUATORS`.
  hyperparameters: Mapping[str, Any]  # Every one of them.
  data: Mapping[str, Any]  # Name and splits, and how images were prepared.
  step: int | None  # Training steps behind the weights; None for raw pixels.
  seed: int  # Of the evaluation.
  final: float | None = None  # To be reported, as the protocol defines it.
  best: float | None = None  # Chosen on test, and therefore optimistic.
  interval: tuple[float, float] | None = None  # 95% interval of `final`.
  num_images: int | None = None  # Test images.
  # Every number that the evaluator gave.
  values: Mapping[str, float] = dataclasses.field(default_factory=dict)
  seconds: float | None = None  # How long it took.
  online: bool = False  # Whether a training run measured it on its way.
  skipped: str | None = None  # Why there are no numbers; None if there are.
  # Why single numbers are missing, by their names.
  failed: Mapping[str, str] = dataclasses.field(default_factory=dict)
  version: str = imsvd_jax.__version__  # Of this package.
  encoder: str = TRAINED  # Or a baseline: RANDOM_INIT or RAW_PIXELS.
  weights: str | None = None  # The checksum of them; None for raw pixels.


def with_values(
  planned: Result, found: Mapping[str, float | Exception], **fields: Any
) -> Result:
  """Returns a result with an evaluator's numbers and other fields.

  `found` holds numbers, or why there is none (see `Evaluator.run`), among them
  "final", "best", "low" and "high" if there is a headline.
  """
  values, failed = {}, {}
  for name, value in found.items():
    if isinstance(value, Exception):
      failed[name] = reason_of(value)
    else:
      values[name] = float(value)
  final, best, low, high = (values.pop(name, None) for name in _HEADLINE)
  interval = None if low is None or high is None else (low, high)
  return dataclasses.replace(
    planned,
    final=final,
    best=best,
    interval=interval,
    values=values,
    failed=failed,
    **fields,
  )


def write_results(path: Path, new: Iterable[Result]) -> None:
  """Adds results to `results.json`; a repeated measurement replaces its last.

  Raises:
    UserError: The file is there but is not one of ours.
  """
  known = {_key(entry): entry for entry in read_results(path)}
  now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
  for result in new:
    known[_key(as_entry(result))] = {**as_entry(result), "written": now}
  text = json.dumps(
    {"schema": SCHEMA, "results": list(known.values())}, indent=1
  )
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_whole(path, f"{text}\n".encode())


def read_results(path: Path) -> list[dict[str, Any]]:
  """Returns the entries of `results.json`; none if there is no file.

  Raises:
    UserError: The file is not one of ours, or cannot be read.
  """
  try:
    text = files.read_if_there(path)
  except OSError as error:
    raise UserError(f"Cannot read {path}: {error.strerror}.") from error
  if text is None:
    return []
  try:
    content = json.loads(text)
    entries, schema = content["results"], content["schema"]
    for entry in entries:
      _key(entry)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f"{path} is not a results file ({type(error).__name__}); expected one "
      "that this program wrote: move it away."
    ) from error
  if schema != SCHEMA:
    raise UserError(
      f"{path} has schema {schema}; expected {SCHEMA}: move it away, or use "
      "the version of imsvd_jax that wrote it."
    )
  return entries


def as_entry(result: Result) -> dict[str, Any]:
  """Returns a result as `read_results` does."""
  entry = _plain(dataclasses.asdict(result))
  if not entry["failed"]:
    del entry["failed"]
  return entry


def find(
  entries: Iterable[Mapping[str, Any]], planned: Result
) -> Result | None:
  """Returns the result of a planned measurement that an entry has, if any."""
  key = _key(as_entry(planned))
  for entry in entries:
    same = _key(entry) == key and entry.get("version") == planned.version
    if same and not entry["skipped"] and not entry.get("failed"):
      fields = {f.name for f in dataclasses.fields(Result)}
      return Result(**{k: v for k, v in entry.items() if k in fields})
  return None


def scalars(result: Result) -> dict[str, float]:
  """Returns the numbers of a result by tag, for TensorBoard."""
  found = {"final": result.final, "best": result.best, **shown(result)}
  return {
    f"{result.protocol}/{name}": value
    for name, value in found.items()
    if value is not None
  }


def shown(result: Result) -> dict[str, float]:
  """Returns the values without the very many, for results.json alone."""
  return {k: v for k, v in result.values.items() if "/variable/" not in k}


def table(results: Iterable[Result]) -> str:
  """Returns results as lines of a table for the console; numbers in percent."""
  rows = [("protocol", "data", "final", "95% interval", "best", "images", "s")]
  notes = []
  for result in results:
    name = result.protocol + (" (online)" if result.online else "")
    data = str(result.data.get("name", ""))
    if result.skipped:
      rows.append((name, data, "skipped", "", "", "", ""))
      notes.append(result.skipped)
      continue
    ends = [_percent(end) for end in result.interval or ()]
    rows.append(
      (
        name,
        data,
        _percent(result.final),
        " to ".join(ends),
        _percent(result.best),
        "" if result.num_images is None else str(result.num_images),
        "" if result.seconds is None else f"{result.seconds:.1f}",
      )
    )
    if result.final is None:
      notes.extend(
        f"{name} {k} {'none' if v is None else format(v, '.4g')}"
        for k, v in shown(result).items()
      )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return "\n".join([*lines, *notes])


def _percent(value: float | None) -> str:
  return "" if value is None else f"{100 * value:.2f}"


def _key(entry: Mapping[str, Any]) -> str:
  names = ("protocol", "hyperparameters", "data", "step", "seed", "online")
  # As it is read back: tuples are lists in JSON. A step has two sets of weights
  # where there is a target network, and others after a new run.
  values = [*(entry[name] for name in names), entry.get("weights")]
  return json.dumps(values, sort_keys=True)


def _plain(value: Any) -> Any:
  """Returns `value` as JSON stores it: lists, and null for NaN and infinity."""
  if isinstance(value, Mapping):
    return {str(key): _plain(entry) for key, entry in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(entry) for entry in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value
