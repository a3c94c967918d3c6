"""Where a step's time goes, by the profile that JAX records of it.

A profile names each operation that a device ran and how long it took. The
compiled program's text tells which part of the step an operation belongs to.
"""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks.costs import compiled_step

STEPS = 3  # That a profile holds.
_SHOWN = 20  # Operations in the report.
_OP_NAME = re.compile(
  r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE
)
_NUMBER = re.compile(r"(\.\d+)+$")
_NO_IDENTIFIER = re.compile(r"\W")


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the program, or one that the text does not name."""

  name: str  # As in the compiled program: "loop_add_fusion.12".
  part: str  # Of the step, see `compiled_step.PARTS`; "other" if unknown.
  backward: bool  # Whether it belongs to the backward pass.
  where: str  # The end of its place in the Python program.
  seconds: float  # Per step, on all devices together.
  share: float  # Of the time of all operations.


def record(step: Callable[[], Any], text: str, folder: str) -> list[Operation]:
  """Profiles a few steps; returns the operations, the longest first.

  Args:
    step: Starts a step and returns its arrays.
    text: The compiled program's.
    folder: Where the profile goes; the program's text goes beside it.

  Raises:
    UserError: The folder cannot be written.
  """
  console.print_line(f"Recording {STEPS} steps into {folder}.")
  path = pathlib.Path(folder)
  try:
    path.mkdir(parents=True, exist_ok=True)
    with gzip.open(path / "step.hlo.txt.gz", "wt") as file:
      file.write(text)
    with jax.profiler.trace(folder):
      for _ in range(STEPS):
        result = step()
      jax.block_until_ready(result)
  except OSError as error:
    raise UserError(
      f"--profile={folder} cannot be written: {error.strerror}."
    ) from error
  traces = sorted(
    path.rglob("*.trace.json.gz"), key=lambda p: p.stat().st_mtime
  )
  if not traces:
    console.print_line("JAX wrote no trace of the steps.")
    return []
  with gzip.open(traces[-1], "rt") as file:
    return summarize(json.load(file), text)


def summarize(trace: dict[str, Any], text: str) -> list[Operation]:
  """Returns the operations of a trace in Chrome's format, the longest first."""
  names = dict(_OP_NAME.findall(text))
  # A kernel's name is its operation's with "_" for what C does not allow.
  kernels = {_NO_IDENTIFIER.sub("_", name): name for name in names}
  seconds: dict[str, float] = collections.defaultdict(float)
  for operation, kernel, duration in _durations(trace):
    name = operation if operation in names else kernels.get(kernel, kernel)
    seconds[name] += duration / 1e6 / STEPS
  total = sum(seconds.values()) or 1.0
  operations = []
  for name, one in sorted(seconds.items(), key=lambda item: -item[1]):
    where = names.get(name, "")
    operations.append(
      Operation(
        name=name,
        part=compiled_step.part_of(where),
        backward="transpose(" in where,
        where="/".join(where.split("/")[-3:]),
        seconds=one,
        share=one / total,
      )
    )
  return operations


def _durations(trace: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
  """Yields (operation, kernel, microseconds) of each execution on a device.

  The profiler marks them by the operation of the program that they belong to:
  on a GPU each kernel, on a CPU each call of the program's runtime. Kernels of
  a GPU that start together as a graph are all marked by the graph's name.
  """
  events = trace.get("traceEvents", [])
  # Other rows of a GPU are summaries of what its streams show.
  streams = {
    (event["pid"], event["tid"])
    for event in events
    if event.get("name") == "thread_name"
    and event["args"].get("name", "").startswith("Stream")
  }
  gpus = {pid for pid, _ in streams}
  for event in events:
    operation = event.get("args", {}).get("hlo_op", "")
    if "dur" not in event:
      continue
    if (event["pid"], event["tid"]) in streams or (
      operation and event["pid"] not in gpus
    ):
      yield operation, event["name"], float(event["dur"])


def by_part(operations: list[Operation]) -> dict[str, float]:
  """Returns the share of each part, the largest first."""
  shares: dict[str, float] = collections.defaultdict(float)
  for one in operations:
    shares["backward " * one.backward + one.part] += one.share
  return dict(sorted(shares.items(), key=lambda item: -item[1]))


def by_kind(operations: list[Operation]) -> dict[str, float]:
  """Returns the share of each kind of operation, the largest first.

  A kind is a name without its number: "loop_add_fusion".
  """
  shares: dict[str, float] = collections.defaultdict(float)
  for one in operations:
    shares[_NUMBER.sub("", one.name)] += one.share
  return dict(sorted(shares.items(), key=lambda item: -item[1]))


def as_lines(operations: list[Operation]) -> list[str]:
  """Returns the report for people."""
  total = sum(one.seconds for one in operations)
  join = lambda shares: ", ".join(
    f"{name} {share:.1%}" for name, share in list(shares.items())[:8]
  )
  lines = [
    f"Profile: {total:.4g} s of operations per step",
    f"  by part: {join(by_part(operations))}",
    f"  by kind: {join(by_kind(operations))}",
  ]
  for one in operations[:_SHOWN]:
    lines.append(
      f"  {one.seconds:>9.3g} s {one.share:>6.1%} {one.name:<34.34}"
      f" {one.part:10} {one.where}"
    )
  return lines
