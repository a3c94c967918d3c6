"""Compiles a config's step for a slice of TPUs, and reports what it costs."""

import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks.costs import compiled_step
from imsvd_jax.benchmarks.costs.chips import Chip
from imsvd_jax.benchmarks.costs.compiled_step import Bound, Memory, Part, Report
from imsvd_jax.benchmarks.costs.slices import Slice, compile_only, get_slice
from imsvd_jax.benchmarks.text import Findings, binary_size, quantity
from imsvd_jax.data import DRAWN
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training.sharding import MODES

_IMAGES_PER_CHIP = 8  # The step of --find_batch.
_MILLION = 1_000_000


def measure(
  config: ConfigDict,
  *,
  name: str,
  topology: str,
  num_examples: int | None = None,
  find_batch: bool = False,
  compare_sharding: bool = False,
) -> Findings:
  """Returns the costs of a step of the recipe called `name` on a slice.

  Args:
    topology: Name of the slice, such as "v5e:4x4".
    num_examples: Images in the train split; by default data.num_examples of
      the recipe if its source makes that many.
    find_batch: Whether to search the largest batch that fits, and report it.
    compare_sharding: Whether to report all modes of sharding.state in a table.

  Raises:
    UserError: There is no such slice, or the config does not fit it.
  """
  compile_only(topology)
  slice_ = get_slice(topology)
  config = config.copy_and_resolve_references()
  if num_examples is None and config.data.name in DRAWN:
    num_examples = config.data.num_examples
  if find_batch:
    config.batch_size = _largest_batch(config, slice_, num_examples)
  if compare_sharding:
    reports = _of_all_modes(config, slice_, num_examples)
    return Findings(
      f"{name} on {slice_.name}\n\n{comparison(reports)}",
      {m: as_dict(r, slice_, num_examples) for m, r in reports.items()},
    )
  report = _compile(config, slice_, num_examples)
  text = as_text(report, slice_, num_examples)
  numbers = as_dict(report, slice_, num_examples)
  if report.parts and len(experiment_lib.resolution_schedule(config)) > 1:
    phases, fewer = _scheduled(config, slice_, num_examples, report)
    numbers["resolution_schedule"] = {"phases": phases, "times_fewer": fewer}
    images = "" if num_examples else " (of a million images)"
    text += "\n\n" + "\n".join(_phase_lines(phases, fewer, images))
  return Findings(f"{name} on {slice_.name}\n\n{text}", numbers)


def _scheduled(
  config: ConfigDict, slice_: Slice, num_examples: int | None, report: Report
) -> tuple[list[dict[str, float]], float]:
  """Compiles the other sizes of a schedule; returns what `_phases` does.

  Args:
    report: Of the last size, which `config` has.
  """
  schedule = experiment_lib.resolution_schedule(config)
  steps = (num_examples or _MILLION) / config.batch_size * report.num_chips
  flops = {schedule[-1][1]: steps * report.total("flops")}
  for _, size in schedule[:-1]:
    small = experiment_lib.at_size(config, size)
    costs = _compile(small, slice_, num_examples)
    flops[size] = steps * costs.total("flops")
  return _phases(schedule, flops, config.epochs)


def _phases(
  schedule: list[tuple[float, int]], flops: dict[int, float], epochs: float
) -> tuple[list[dict[str, float]], float]:
  """Returns what each size costs, and how much the schedule saves.

  Args:
    schedule: Pairs (epoch, size).
    flops: FLOP of an epoch on all chips, by size.
    epochs: Length of the run.

  Returns:
    For each size {"from", "to": epochs, "size", "flops_per_epoch"}, and the
    FLOP of a run with the last size throughout over those of the schedule.
  """
  ends = [*(start for start, _ in schedule[1:]), epochs]
  phases = [
    {"from": start, "to": end, "size": size, "flops_per_epoch": flops[size]}
    for (start, size), end in zip(schedule, ends, strict=True)
  ]
  total = sum((p["to"] - p["from"]) * p["flops_per_epoch"] for p in phases)
  return phases, epochs * phases[-1]["flops_per_epoch"] / total


def _phase_lines(
  phases: list[dict[str, float]], fewer: float, images: str
) -> list[str]:
  lines = [f"Resolution schedule: FLOP per epoch{images}, all chips"]
  for phase in phases:
    epochs = f"epochs {phase['from']:g} to {phase['to']:g}"
    flops = quantity(phase["flops_per_epoch"])
    lines.append(f"  {epochs:20}{phase['size']:5} pixels{flops:>11}")
  lines.append(
    f"  The run needs {fewer:.2f} times fewer FLOP than with"
    f" {phases[-1]['size']} pixels throughout."
  )
  return lines


def _compile(
  config: ConfigDict, slice_: Slice, num_examples: int | None
) -> Report:
  # The schedule needs some number; no cost depends on which.
  images = num_examples or 1000 * config.batch_size
  mode = experiment_lib.state_sharding(config)
  with _ticking(
    f"Compiling batch {config.batch_size} for {slice_.name}, state {mode}"
  ):
    return compiled_step.measure(config, slice_, images)


def _of_all_modes(
  config: ConfigDict, slice_: Slice, num_examples: int | None
) -> dict[str, Report]:
  """Compiles the step with each mode of sharding.state."""
  reports = {}
  for mode in MODES:
    with config.unlocked():
      config.sharding = ConfigDict({"state": mode})
    reports[mode] = _compile(config, slice_, num_examples)
  return reports


def _largest_batch(
  config: ConfigDict, slice_: Slice, num_examples: int | None
) -> int:
  """Searches the largest batch that fits, and reports each attempt."""
  if slice_.chip is None:
    raise UserError("--find_batch needs the memory of a chip; try v5e:4x4.")

  def measure_batch(batch_size: int) -> Memory:
    config.batch_size = batch_size
    memory = _compile(config, slice_, num_examples).memory
    console.print_line(f"  batch {batch_size}: {verdict(memory)}")
    return memory

  return compiled_step.largest_batch(
    measure_batch,
    start=config.batch_size,
    unit=math.lcm(_IMAGES_PER_CHIP, experiment_lib.accumulate_steps(config))
    * len(slice_.devices),
  )


@contextlib.contextmanager
def _ticking(what: str) -> Iterator[None]:
  """Prints how long the block has taken, after 3 s and then every 20 s."""
  start = time.monotonic()
  done = threading.Event()

  def tick() -> None:
    wait = 3.0
    while not done.wait(wait):
      console.print_line(f"{what}: {time.monotonic() - start:.0f} s")
      wait = 20.0

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def as_dict(
  report: Report, slice_: Slice, num_examples: int | None
) -> dict[str, Any]:
  """Returns everything in the report, in bytes, FLOP and seconds."""
  result = dataclasses.asdict(report)
  result["memory"]["fits"] = report.memory.fits
  if report.parts:
    result["flops"] = report.total("flops")
    result["hbm_bytes"] = report.total("hbm_bytes")
    result["intensity"] = report.intensity
  if slice_.chip is not None:
    result["chip"] = slice_.chip._asdict()
  if report.bound is not None:
    seconds = report.bound.seconds
    result["bound"]["seconds"] = seconds
    result["bound"]["limited_by"] = report.bound.limited_by
    result["bound"]["images_per_second"] = report.batch_size / seconds
    if num_examples:
      result["num_examples"] = num_examples
      steps = num_examples / report.batch_size
      result["bound"]["seconds_per_epoch"] = steps * seconds
  return result


def as_text(report: Report, slice_: Slice, num_examples: int | None) -> str:
  """Returns the report for people."""
  lines = [
    f"{report.num_chips} chips, batch {report.batch_size}"
    f" ({report.batch_size // report.num_chips} per chip), state"
    f" {report.state_sharding}.",
    f"Compiled in {report.compile_seconds:.0f} s. All numbers are per chip.",
    "",
    *_memory_lines(report.memory),
  ]
  if report.parts:
    lines += ["", *_part_lines(report), "", *_collective_lines(report)]
  if report.bound is not None and slice_.chip is not None:
    lines += ["", *_bound_lines(report, report.bound, slice_.chip)]
    lines.append(_speed(report, report.bound, num_examples))
  elif slice_.chip is None:
    lines += ["", "No bound on the time: a CPU has no published speed."]
  return "\n".join(lines)


def comparison(reports: Mapping[str, Report]) -> str:
  """Returns a table with a column for each mode of sharding.state."""
  first = next(iter(reports.values()))
  kinds = ("all-reduce", "reduce-scatter", "all-gather")
  rows: dict[str, Callable[[Report], str]] = {
    "weights, statistics, targets": lambda r: binary_size(r.memory.parameters),
    "optimizer state": lambda r: binary_size(r.memory.optimizer),
    "activations, gradients, buffers": lambda r: _or_none(
      r.memory.temporaries, binary_size
    ),
    "peak, with padding": lambda r: binary_size(r.memory.peak),
    "the compiler may use": lambda r: _or_none(r.memory.available, binary_size),
    "fits": lambda r: "yes" if r.memory.fits else "NO",
    "sent bytes": lambda r: quantity(r.total("sent_bytes")),
    **{f"  {kind}": functools.partial(_sent, kind) for kind in kinds},
    "HBM bytes": lambda r: quantity(r.total("hbm_bytes")),
    **{
      f"bound: {name}": functools.partial(_milliseconds, name)
      for name in ("compute", "memory", "network")
    },
    "compiled in": lambda r: f"{r.compile_seconds:.0f} s",
  }
  lines = [
    f"{first.num_chips} chips, batch {first.batch_size}"
    f" ({first.batch_size // first.num_chips} per chip). All numbers are per"
    " chip and step.",
    "",
    f"{'sharding.state':34}" + "".join(f"{mode:>14}" for mode in reports),
  ]
  for name, cell in rows.items():
    cells = (cell(report) for report in reports.values())
    lines.append(f"  {name:32}" + "".join(f"{text:>14}" for text in cells))
  return "\n".join(lines)


def _or_none(value: float | None, text: Callable[[float], str]) -> str:
  return "-" if value is None else text(value)


def _sent(kind: str, report: Report) -> str:
  found = [c.sent_bytes for c in report.collectives if c.kind == kind]
  return quantity(sum(found))


def _milliseconds(resource: str, report: Report) -> str:
  bound = report.bound
  return "-" if bound is None else f"{getattr(bound, resource) * 1e3:.2f} ms"


def verdict(memory: Memory) -> str:
  """Returns whether a step fits into the memory, and by how much."""
  if memory.available is None:
    return "fits"
  spare = memory.available - memory.peak
  if memory.fits:
    return f"FITS: {binary_size(spare)} to spare."
  return (
    f"DOES NOT FIT: needs {binary_size(memory.peak)} of"
    f" {binary_size(memory.available)}, {binary_size(-spare)} too much."
  )


def _memory_lines(memory: Memory) -> list[str]:
  rows = {
    "weights, statistics, targets": memory.parameters,
    "optimizer state": memory.optimizer,
    "batch": memory.batch,
    "activations, gradients, buffers": memory.temporaries,
    "program": memory.program,
    "peak, with padding": memory.peak,
    "the compiler may use": memory.available,
  }
  lines = ["Memory"]
  lines += [
    f"  {name:34}{binary_size(value):>12}"
    for name, value in rows.items()
    if value is not None
  ]
  if memory.available is not None:
    lines.append(f"  {verdict(memory)}")
  return lines


def _part_lines(report: Report) -> list[str]:
  total = Part(
    *(report.total(field.name) for field in dataclasses.fields(Part))
  )
  lines = [
    f"{'Part of the step':18}{'FLOP':>11}{'as bf16':>11}{'HBM bytes':>11}"
    f"{'sent bytes':>12}"
  ]
  for name, part in {**report.parts, "all": total}.items():
    flops, passes, moved, sent = map(quantity, dataclasses.astuple(part))
    lines.append(f"  {name:16}{flops:>11}{passes:>11}{moved:>11}{sent:>12}")
  lines.append(
    "  (as bf16: times the passes of the matrix unit, 6 for exact float32)"
  )
  return lines


def _collective_lines(report: Report) -> list[str]:
  if not report.collectives:
    return ["Collectives: none."]
  lines = [
    f"{'Collectives':20}{'count':>9}{'payload bytes':>22}{'sent bytes':>12}"
  ]
  for one in report.collectives:
    lines.append(
      f"  {one.kind:18}{one.count:9d}{quantity(one.bytes):>22}"
      f"{quantity(one.sent_bytes):>12}"
    )
  if report.unknown_loops:
    lines.append(
      f"  ({report.unknown_loops} loops without a known trip count are counted"
      " as one trip)"
    )
  return lines


def _bound_lines(report: Report, bound: Bound, chip: Chip) -> list[str]:
  what = {
    "compute": f"arithmetic at {chip.flops / 1e12:.0f} TFLOP/s (bf16)",
    "memory": f"memory traffic at {chip.hbm_bandwidth / 1e9:.0f} GB/s",
    "network": "collectives over the interconnect",
  }
  lines = [f"A step takes at least (published numbers: {chip.source})"]
  for name, label in what.items():
    mark = "  <- sets the bound" if name == bound.limited_by else ""
    lines.append(f"  {label:38}{getattr(bound, name) * 1e3:9.2f} ms{mark}")
  lines.append(
    f"  Intensity {report.intensity:.0f} FLOP/byte; above"
    f" {chip.ridge:.0f} the {chip.name} is limited by arithmetic."
  )
  return lines


def _speed(report: Report, bound: Bound, num_examples: int | None) -> str:
  images = num_examples or _MILLION
  seconds = images / report.batch_size * bound.seconds
  time = console.duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"
  what = "per million images (--num_examples gives the epoch)"
  if num_examples:
    what = f"per epoch of {images:,} images"
  return (
    f"At best {report.batch_size / bound.seconds:,.0f} images/s, {time} {what}."
  )
