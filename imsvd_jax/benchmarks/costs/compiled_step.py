"""Compiles the real train step of a config for a slice and reads its costs."""

import collections
import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.devices import (
  batch_sharded,
  make_mesh,
  replicated,
)
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks.costs import hlo
from imsvd_jax.benchmarks.costs.chips import links_per_chip
from imsvd_jax.benchmarks.costs.slices import Slice
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

# Scopes that the step and the model give to their parts.
PARTS = (
  "augment",
  "backbone",
  "projector",
  "objective",
  "optimizer",
  "diagnostics",
)
OTHER = "other"
# The search ends when the smallest batch known not to fit is within this share
# of the largest known to.
_TOLERANCE = 1 / 32
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass
class Memory:
  """Memory of one chip, bytes."""

  # Weights and running statistics, with those of an EMA target.
  parameters: float
  optimizer: float  # Optimizer state.
  batch: float  # The chip's part of the batch.
  # Activations, gradients and buffers. None if not compiled.
  temporaries: float | None = None
  program: float | None = None  # The compiled program. None if not compiled.
  peak: float = 0.0  # All together, with the padding that the layouts need.
  # The part of the chip's memory that the compiler may use; None for the CPU.
  available: float | None = None

  @property
  def fits(self) -> bool:
    """Whether the step runs at all."""
    return self.available is None or self.peak <= self.available


@dataclasses.dataclass
class CollectiveSum:
  """All collectives of one kind in one step."""

  kind: str  # "all-reduce", ...
  count: int = 0  # How many run.
  bytes: float = 0.0  # Their payload on each chip.
  sent_bytes: float = 0.0  # The least that each chip must send for them.


@dataclasses.dataclass
class Part:
  """What one part of the step costs on one chip."""

  flops: float = 0.0  # Of matrix products and convolutions.
  # The same times the passes that their precision takes.
  passes_flops: float = 0.0
  hbm_bytes: float = 0.0  # Traffic of main memory.
  sent_bytes: float = 0.0  # Sent to other chips.


@dataclasses.dataclass(frozen=True)
class Bound:
  """The least time of a step by each resource, in seconds."""

  compute: float
  memory: float
  network: float

  @property
  def seconds(self) -> float:
    """The least time of a step, with all resources working at once."""
    return max(self.compute, self.memory, self.network)

  @property
  def limited_by(self) -> str:
    """The resource that sets the bound."""
    times = dataclasses.asdict(self)
    return max(times, key=lambda name: times[name])


@dataclasses.dataclass
class Report:
  """Costs of one train step, per chip."""

  topology: str  # The slice's name.
  num_chips: int  # Its size.
  batch_size: int  # Images per step over all chips.
  state_sharding: str  # See `training.sharding`.
  compile_seconds: float  # How long the compilation took.
  memory: Memory  # See Memory.
  # By name, see PARTS. Empty if the step does not fit, like what follows.
  parts: dict[str, Part] = dataclasses.field(default_factory=dict)
  # By kind.
  collectives: list[CollectiveSum] = dataclasses.field(default_factory=list)
  # Loops whose trip count is unknown, counted as one trip.
  unknown_loops: int = 0
  # None without published numbers of the chip, as for the CPU.
  bound: Bound | None = None

  def total(self, field: str) -> float:
    """Returns the sum of a field of Part over the parts."""
    return sum(getattr(part, field) for part in self.parts.values())

  @property
  def intensity(self) -> float:
    """FLOP per byte of main memory traffic."""
    return self.total("flops") / max(self.total("hbm_bytes"), 1.0)


def measure(config: ConfigDict, slice_: Slice, num_examples: int) -> Report:
  """Compiles the train step of a config and returns what it costs.

  Its batch_size is the batch over all chips. Only the schedule depends on
  `num_examples`, the images per epoch.

  Raises:
    UserError: The config contradicts itself, or its batch does not divide.
  """
  num_chips = len(slice_.devices)
  experiment_lib.check_batch(config, num_chips)
  experiment = experiment_lib.build(config, num_examples)
  mesh = make_mesh(slice_.devices)
  state = step_lib.abstract_state(experiment, replicated(mesh))
  batch = experiment_lib.abstract_batch(config, batch_sharded(mesh))
  lowered = step_lib.jit_train_step(experiment, replicated(mesh)).lower(
    state, batch
  )
  start = time.monotonic()
  memory = Memory(
    parameters=_bytes((state.params, state.batch_stats, state.target)),
    optimizer=_bytes(state.opt_state),
    batch=_bytes(batch),
  )
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    compiled = None
    memory.peak, memory.available = _out_of_memory(error)
  report = Report(
    topology=slice_.name,
    num_chips=num_chips,
    batch_size=config.batch_size,
    state_sharding=experiment.state_sharding,
    compile_seconds=time.monotonic() - start,
    memory=memory,
  )
  if compiled:
    _set_costs(report, compiled, slice_)
  return report


def _set_costs(report: Report, compiled: Any, slice_: Slice) -> None:
  stats, memory = compiled.memory_analysis(), report.memory
  memory.temporaries = stats.temp_size_in_bytes
  memory.program = stats.generated_code_size_in_bytes
  memory.peak = (
    stats.argument_size_in_bytes
    + stats.output_size_in_bytes
    - stats.alias_size_in_bytes
    + stats.temp_size_in_bytes
    + stats.generated_code_size_in_bytes
  )
  memory.available = _available_memory(slice_)
  program = hlo.Program(compiled.as_text())
  report.parts, report.collectives = _sums(program)
  report.unknown_loops = program.unknown_loops
  report.bound = _bound(report, slice_)


def _sums(program: hlo.Program) -> tuple[dict[str, Part], list[CollectiveSum]]:
  """Adds up a program's work by part, and its collectives by kind."""
  parts: dict[str, Part] = collections.defaultdict(Part)
  for work in program.work():
    part = parts[part_of(work.op_name)]
    part.flops += work.flops
    part.passes_flops += work.passes_flops
    part.hbm_bytes += work.bytes
  kinds: dict[str, CollectiveSum] = {}
  for one in program.collectives():
    sent = one.runs * one.sent_bytes
    parts[part_of(one.op_name)].sent_bytes += sent
    total = kinds.setdefault(one.kind, CollectiveSum(one.kind))
    total.count += one.runs
    total.bytes += one.runs * one.bytes
    total.sent_bytes += sent
  order = [*PARTS, OTHER]
  parts = {name: parts[name] for name in order if name in parts}
  return parts, [kinds[kind] for kind in sorted(kinds)]


def part_of(op_name: str) -> str:
  """Returns the part of the step that an operation belongs to."""
  match = re.search(rf"\b({'|'.join(PARTS)})\b", op_name)
  return match[1] if match else OTHER


def _bound(report: Report, slice_: Slice) -> Bound | None:
  chip = slice_.chip
  if chip is None:
    return None
  links = links_per_chip(chip, slice_.shape)
  sent = sum(c.sent_bytes for c in report.collectives)
  return Bound(
    compute=report.total("passes_flops") / chip.flops,
    memory=report.total("hbm_bytes") / chip.hbm_bandwidth,
    network=sent / (links * chip.link_bandwidth) if links else 0.0,
  )


# --- Memory ------------------------------------------------------------------


def _bytes(tree: Any) -> float:
  """Returns the bytes of each chip's parts of the leaves."""
  return float(
    sum(
      np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(tree)
      if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
  )


def _available_memory(slice_: Slice) -> float | None:
  """Returns the bytes of a chip that its compiler lets programs use.

  Asked of the compiler itself, with an array that cannot fit.
  """
  if slice_.chip is None:
    return None
  one = jax.sharding.SingleDeviceSharding(slice_.devices[0])
  rows = round(slice_.chip.hbm_bytes / 2**20)  # Of 4 MiB.
  huge = jax.ShapeDtypeStruct((rows, 2**20), np.float32, sharding=one)
  try:
    jax.jit(lambda x: x + 1).lower(huge).compile()
  except jax.errors.JaxRuntimeError as error:
    return _out_of_memory(error)[1]
  return slice_.chip.hbm_bytes


def _out_of_memory(error: Exception) -> tuple[float, float]:
  """Returns the (needed, available) bytes that a compiler's error names.

  Raises:
    Exception: The error itself, if it is about something else.
  """
  text = str(error)
  size = r"([\d.]+)([KMGT]?)"
  found = re.search(rf"\({size}\) exceeds available \w+ \({size}\)", text)
  found = found or re.search(rf"Used {size} of {size}", text)
  if not found:
    raise error
  needed, available = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
  return needed, available


# --- The largest batch -------------------------------------------------------


def largest_batch(
  measure_batch: Callable[[int], Memory], *, start: int, unit: int
) -> int:
  """Returns the largest batch that fits, to within _TOLERANCE.

  Memory grows about linearly with the batch, so a few compilations find it.

  Args:
    measure_batch: From a batch size to the memory that it needs of a chip.
    start: The batch to begin with.
    unit: Batches are multiples of it.

  Raises:
    UserError: Not even one unit fits.
  """
  fits, too_large = 0, None
  needs: dict[int, float] = {}
  batch = max(unit, start // unit * unit)
  while True:
    memory = measure_batch(batch)
    assert memory.available is not None  # It is a chip's.
    needs[batch] = memory.peak
    if memory.fits:
      fits = batch
    else:
      too_large = batch
    if too_large is not None and too_large <= unit:
      raise UserError(
        f"Not even a batch of {unit} fits: it needs"
        f" {memory.peak / 2**30:.2f} GiB of {memory.available / 2**30:.2f}."
      )
    if too_large is not None and too_large - fits <= max(
      unit, _TOLERANCE * fits
    ):
      return fits
    fixed = memory.parameters + memory.optimizer
    guess = _predict(needs, memory.available, fixed) // unit * unit
    low = fits + unit
    high = 4 * fits if too_large is None else too_large - unit
    batch = min(max(guess, low), high)


def _predict(needs: dict[int, float], available: float, fixed: float) -> int:
  """Returns the batch at which a line through two measurements needs it all."""
  nearest = sorted(needs, key=lambda b: abs(needs[b] - available))[:2]
  if len(nearest) == 1:
    slope = (needs[nearest[0]] - fixed) / nearest[0]
  else:
    a, b = nearest
    slope = (needs[b] - needs[a]) / (b - a)
  if slope <= 0:
    return 2 * max(needs)
  return int(nearest[0] + (available - needs[nearest[0]]) / slope)
