"""The objective's loss and gradient: time, memory, arithmetic, alternatives."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, cpu_devices
from imsvd_jax.base.devices import batch_sharded, check_batch_size, make_mesh
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.benchmarks import floor, machine, timing, torch_formula
from imsvd_jax.benchmarks.costs import hlo, slices
from imsvd_jax.benchmarks.text import Findings, quantity, size, spread
from imsvd_jax.objectives import imsvd_loss
from imsvd_jax.objectives.joint_entropy import choose_kernel

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
KERNELS = ("auto", "plain", "streamed")
_SPARE = 0.9  # Share of the free memory that a contender may need.
# The loss, and its gradients with respect to both views.
LossAndGradients = tuple[jax.Array, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
  """What to compute."""

  num_images: int  # N, over all devices.
  num_variables: int  # M.
  num_bins: int  # b.
  dtype: str = "float32"  # Of the embeddings; the loss computes in float32.
  kernel: str = "auto"  # "auto", "plain" or "streamed".
  # Of the matrix products, see objectives/joint_entropy.py.
  precision: str = "auto"
  devices: int = 1  # How many.

  @property
  def num_entries(self) -> int:
    """D."""
    return self.num_variables * self.num_bins

  @property
  def chosen(self) -> str:
    """The name of the kernel that runs."""
    if self.kernel != "auto":
      return self.kernel
    return choose_kernel(self.num_images, self.num_entries, self.devices)


@dataclasses.dataclass
class Result:
  """One contender."""

  name: str  # "streamed", "plain", "PyTorch" or "floor".
  # For loss and gradient; None if it was not run.
  seconds: timing.Spread | None = None
  cpu_seconds: timing.Spread | None = None  # Likewise, of all cores.
  ratio: timing.Spread | None = None  # Time over the first contender's.
  cpu_ratio: timing.Spread | None = None  # The same of the CPU seconds.
  floor_share: timing.Spread | None = None  # Time of the floor over its own.
  temporary_bytes: float | None = None  # Per device, from the compiled program.
  flops: float | None = None  # Per device, of matrix products.
  # The same times the passes that their precision takes.
  passes_flops: float | None = None
  memory_bytes: float | None = None  # Traffic of main memory, per device.
  traffic_bytes: float | None = None  # Payload of its collectives, per device.
  largest_collective_bytes: float | None = None  # Of the largest of them.
  loss: float | None = None  # The value.
  loss_error: float | None = None  # Relative to the reference.
  # Largest difference from the reference's gradient, over the largest gradient.
  gradient_error: float | None = None
  note: str = ""  # Why it was not run, or how.


def check(problem: Problem) -> None:
  """Raises UserError for a problem that cannot be computed."""
  limits = {"num_images": 2, "num_variables": 1, "num_bins": 2, "devices": 1}
  for field, least in limits.items():
    value = getattr(problem, field)
    if value < least:
      raise UserError(f"--{field}={value}; expected at least {least}.")
  lookup(DTYPES, problem.dtype, "dtype")
  lookup(dict.fromkeys(KERNELS), problem.kernel, "kernel")
  check_batch_size(problem.num_images, problem.devices, "num_images")


def benchmark(problem: Problem, *, rounds: int, alternatives: bool) -> Findings:
  """Measures on this machine; see `measure`."""
  check(problem)
  cpu_devices.make(problem.devices)
  about = machine.describe(machine.devices(problem.devices))
  results = measure(problem, rounds=rounds, alternatives=alternatives)
  return Findings(
    as_text(problem, results, about), as_dict(problem, results, about)
  )


def benchmark_on(topology: str, problem: Problem) -> Findings:
  """Compiles for a slice of chips; see `compile_for`."""
  slices.compile_only(topology)
  slice_ = slices.get_slice(topology)
  about = machine.describe(list(slice_.devices))
  results = compile_for(problem, slice_)
  return Findings(
    compiled_as_text(problem, slice_, results), as_dict(problem, results, about)
  )


def measure(
  problem: Problem, *, rounds: int, alternatives: bool = True
) -> list[Result]:
  """Races the problem's kernel with the alternatives and the floor.

  The alternatives are the other kernel and PyTorch.

  Returns:
    The problem's own kernel first, the floor last.
  """
  used = machine.devices(problem.devices)
  mesh = make_mesh(used)
  views = _embeddings(problem, mesh)
  names = [problem.chosen]
  if alternatives:
    names += [k for k in ("streamed", "plain") if k != problem.chosen]
  free = machine.available_bytes(used[0])
  if free is not None and used[0].platform == "cpu":
    free /= problem.devices  # They share it.

  results: dict[str, Result] = {}
  runs: dict[str, Callable[[], Any]] = {}
  for name in names:
    results[name], program = _compile(problem, name, mesh)
    results[name].note = _too_large(results[name].temporary_bytes, free)
    if not results[name].note:
      runs[name] = functools.partial(program, *views)
  if alternatives:
    results["PyTorch"], run = _torch(problem, views, used[0], free)
    if run:
      runs["PyTorch"] = run
  _compare(results, {name: run() for name, run in runs.items()})

  # "auto" means this on every device but a TPU, whose "high" is as exact.
  precision = "highest" if problem.precision == "auto" else problem.precision
  run, scale = floor.products(
    problem.num_images, problem.num_entries, mesh, precision
  )
  times = timing.race({**runs, "floor": run}, rounds=rounds)
  times["floor"] = times["floor"].scaled(scale)
  note = "three matrix products, no communication"
  if scale > 1:
    note += f"; 1/{scale:.0f} of them, scaled"
  results["floor"] = Result("floor", note=note)
  for name in times:
    _set_times(results[name], times, names[0])
  return list(results.values())


def compile_for(problem: Problem, slice_: slices.Slice) -> list[Result]:
  """Compiles both kernels for a slice of chips; nothing runs.

  Returns:
    The streamed kernel on one chip, and both kernels on the whole slice, all
    of whose chips are used (`problem.devices` does not count).

  Raises:
    UserError: The problem cannot be computed.
  """
  chips = len(slice_.devices)
  problem = dataclasses.replace(problem, devices=chips)
  check(problem)
  results = []
  for kernel, count in (("streamed", 1), ("streamed", chips), ("plain", chips)):
    console.print_line(f"Compiling the {kernel} kernel for {count} chip(s).")
    mesh = make_mesh(list(slice_.devices[:count]))
    result, _ = _compile(problem, kernel, mesh)
    result.name = f"{kernel}, {count} chip(s)"
    results.append(result)
  return results


def _embeddings(problem: Problem, mesh: Mesh) -> list[jax.Array]:
  """Returns two related views [N, D], as an encoder might give them."""
  rng = np.random.default_rng(0)
  shape = (problem.num_images, problem.num_entries)
  draw = lambda: rng.standard_normal(shape, np.float32)
  common = draw()
  return [
    jax.device_put(
      (2 * common + draw()).astype(DTYPES[problem.dtype]), batch_sharded(mesh)
    )
    for _ in "12"
  ]


def _program(problem: Problem, kernel: str, mesh: Mesh) -> Any:
  """Compiles `(z1, z2) -> (loss, gradients)` of one kernel."""

  def loss(z1: jax.Array, z2: jax.Array) -> jax.Array:
    return imsvd_loss(
      z1,
      z2,
      num_bins=problem.num_bins,
      kernel=kernel,
      precision=problem.precision,
    )[0]

  def run(z1: jax.Array, z2: jax.Array) -> LossAndGradients:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.value_and_grad(loss, argnums=(0, 1))(z1, z2)

  view = jax.ShapeDtypeStruct(
    (problem.num_images, problem.num_entries),
    DTYPES[problem.dtype],
    sharding=batch_sharded(mesh),
  )
  return jax.jit(run).lower(view, view).compile()


def _compile(
  problem: Problem, kernel: str, mesh: Mesh
) -> tuple[Result, Callable[..., LossAndGradients]]:
  """Returns a kernel's costs, and its program."""
  counted = program = _program(problem, kernel, mesh)
  temporary_bytes = program.memory_analysis().temp_size_in_bytes
  if mesh.devices.flat[0].platform == "gpu":
    # On a GPU, products are calls of a library, whose FLOP the text hides.
    cpus = jax.devices("cpu")[: problem.devices]
    if len(cpus) < problem.devices:
      return Result(kernel, temporary_bytes=temporary_bytes), program
    # In full precision, because a CPU does not know all others.
    exact = dataclasses.replace(problem, precision="highest")
    counted = _program(exact, kernel, make_mesh(cpus))
  costs = hlo.Program(counted.as_text())
  moved, work = costs.collectives(), costs.work()
  result = Result(
    kernel,
    temporary_bytes=temporary_bytes,
    flops=sum(one.flops for one in work),
    passes_flops=sum(one.passes_flops for one in work),
    memory_bytes=sum(one.bytes for one in work),
    traffic_bytes=sum(c.runs * c.bytes for c in moved),
    largest_collective_bytes=max((c.bytes for c in moved), default=0.0),
  )
  return result, program


def _torch(
  problem: Problem,
  views: Sequence[jax.Array],
  device: jax.Device,
  free: float | None,
) -> tuple[Result, Callable[[], Any] | None]:
  """Returns PyTorch's result so far, and its run or None."""
  if not torch_formula.is_installed():
    return Result("PyTorch", note="not installed"), None
  need = torch_formula.MATRICES * 4.0 * problem.num_entries**2
  reason = _too_large(need, free and free * problem.devices)
  if reason:
    return Result("PyTorch", note=reason), None
  z1, z2 = (np.asarray(z, np.float32) for z in views)
  run = torch_formula.loss_and_gradients(
    z1, z2, problem.num_bins, on_gpu=device.platform == "gpu"
  )
  return Result("PyTorch", note="eager, one device, D x D in memory"), run


def _too_large(need: float | None, free: float | None) -> str:
  """Returns why a contender is not run, or an empty string."""
  if need is None or free is None or need <= _SPARE * free:
    return ""
  return f"not run: needs {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"


def _compare(results: dict[str, Result], answers: dict[str, Any]) -> None:
  """Adds values and, against the plain formula's, their errors."""
  reference = answers.get("plain")
  for name, (loss, gradients) in answers.items():
    result = results[name]
    result.loss = float(loss)
    if reference is not None and name != "plain":
      value = float(reference[0])
      result.loss_error = abs(result.loss - value) / abs(value)
      if name == "PyTorch":
        gradients = [gradient.cpu() for gradient in gradients]
      result.gradient_error = _gradient_error(gradients, reference[1])


def _gradient_error(gradients: Any, reference: Any) -> float:
  """Returns the largest difference over the largest entry."""
  pairs = [
    (np.asarray(g, np.float64), np.asarray(r, np.float64))
    for g, r in zip(gradients, reference, strict=True)
  ]
  worst = max(float(np.max(np.abs(g - r))) for g, r in pairs)
  return worst / max(float(np.max(np.abs(r))) for _, r in pairs)


def _set_times(
  result: Result, times: dict[str, timing.Times], first: str
) -> None:
  mine = times[result.name]
  result.seconds = timing.Spread.of(mine.seconds)
  result.cpu_seconds = timing.Spread.of(mine.cpu_seconds)
  result.floor_share = times["floor"].ratio(mine)
  if first in times:  # It was run.
    result.ratio = mine.ratio(times[first])
    result.cpu_ratio = mine.ratio(times[first], cpu=True)


def as_dict(
  problem: Problem, results: list[Result], about: dict[str, Any]
) -> dict[str, Any]:
  """Returns everything, for --json; seconds, bytes, FLOP."""
  return {
    "benchmark": "loss",
    "machine": about,
    "problem": dataclasses.asdict(problem) | {"chosen": problem.chosen},
    "results": [dataclasses.asdict(result) for result in results],
  }


def compiled_as_text(
  problem: Problem, slice_: slices.Slice, results: list[Result]
) -> str:
  """Returns what `compile_for` found, for people."""
  lines = [
    f"IMSVD's loss and gradient compiled for {slice_.name}:"
    f" N = {problem.num_images}, M = {problem.num_variables},"
    f" b = {problem.num_bins} (D = {problem.num_entries}),"
    f" {problem.dtype} embeddings, precision {problem.precision}",
    "",
    f"{'per chip':24}{'FLOP':>10}{'as bf16':>10}{'of one':>9}"
    f"{'memory traffic':>16}{'temporaries':>13}{'moved':>10}{'largest':>10}",
  ]
  alone = results[0].flops or 1.0
  for one in results:
    lines.append(
      f"{one.name:24}{quantity(one.flops):>10}{quantity(one.passes_flops):>10}"
      f"{(one.flops or 0.0) / alone:>9.4f}{size(one.memory_bytes):>16}"
      f"{size(one.temporary_bytes):>13}{size(one.traffic_bytes):>10}"
      f"{size(one.largest_collective_bytes):>10}"
    )
  lines += [
    "",
    "of one: FLOP over those of one chip; moved: payload of all collectives;"
    " largest: of the largest; one D x D matrix is"
    f" {size(4.0 * problem.num_entries**2)}.",
  ]
  return "\n".join(lines)


def as_text(
  problem: Problem, results: list[Result], about: dict[str, Any]
) -> str:
  """Returns the report for people."""
  lines = [
    f"IMSVD's loss and gradient: N = {problem.num_images},"
    f" M = {problem.num_variables}, b = {problem.num_bins}"
    f" (D = {problem.num_entries}), {problem.dtype} embeddings,"
    f" {problem.devices} device(s), kernel {problem.kernel}"
    f" = {problem.chosen}, precision {problem.precision}",
    machine.as_text(about),
    "",
    f"{'':10}{'seconds: median [min, max]':>30}{'CPU s':>9}"
    f"{'vs first':>10}{'of floor':>10}{'temporaries':>13}{'FLOP':>9}"
    f"{'moved':>9}",
  ]
  for result in results:
    lines.append(_row(result))
  lines += ["", *(_remark(r) for r in results if r.note or r.loss_error)]
  lines += [
    "",
    "Per device. vs first: time over the first row's, median over the rounds;"
    " of floor: the floor's time over its own.",
  ]
  return "\n".join(lines)


def _row(result: Result) -> str:
  cells = [f"{result.name:10}", f"{spread(result.seconds):>30}"]
  median = lambda s, form: format(s.median, form) if s else "-"
  cells += [
    f"{median(result.cpu_seconds, '.3g'):>9}",
    f"{median(result.ratio, '.2f'):>10}",
    f"{median(result.floor_share, '.0%'):>10}",
    f"{size(result.temporary_bytes):>13}",
    f"{quantity(result.flops):>9}",
    f"{size(result.traffic_bytes):>9}",
  ]
  return "".join(cells)


def _remark(result: Result) -> str:
  parts = [result.note] if result.note else []
  if result.loss_error is not None:
    parts.append(
      f"differs from plain by {result.loss_error:.1e} in the loss and"
      f" {result.gradient_error:.1e} in the gradient"
    )
  return f"{result.name}: {'; '.join(parts)}."
