"""Speed of a config's whole training step, and the time of its parts.

The step is the trainer's own, compiled as the trainer compiles it. Its parts
are separate programs, measured in the same rounds: augmentation, forward pass,
forward and backward pass together (the backward pass is the difference), the
objective with its gradient, the optimizer, and the diagnostics that are logged.
The rest is the difference of the step and their sum; it is negative if XLA
saves time by fusing parts.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from imsvd_jax.base import console, cpu_devices
from imsvd_jax.base.devices import (
  make_mesh,
  replicated,
  shard_batch,
)
from imsvd_jax.benchmarks import machine, step_profile, timing
from imsvd_jax.benchmarks.costs import compiled_step, hlo, slices
from imsvd_jax.benchmarks.text import Findings, quantity, size, spread
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import sharding
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.augment import augment_views
from imsvd_jax.training.state import TrainState

PARTS = (
  *("augment", "target", "forward", "objective", "backward"),
  *("optimizer", "diagnostics"),
)
_NUM_EXAMPLES = 1_000_000  # Only the schedule depends on it.
# (side of the square matrices, bytes of the array that is copied): large enough
# for a device's full speed, and on a CPU larger than its caches.
_SIZES = {"cpu": (2048, 2**28), "default": (8192, 2**30)}


@dataclasses.dataclass(frozen=True)
class Result:
  """The costs of a step."""

  batch_size: int  # Images per step over all devices.
  devices: int  # How many.
  dtype: str  # What the model computes in.
  step: timing.Spread  # Seconds of a step.
  images_per_second: float  # At the step's median.
  parts: dict[str, timing.Spread]  # Seconds of each part, if measured.
  # Their medians over the step's; with "rest" they add up to one.
  shares: dict[str, float]
  flops: float  # Per device and step, of matrix products and convolutions.
  flops_by_part: dict[str, float]  # The same, by the part of the program.
  # Traffic of main memory per device and step, from the program, which does not
  # know how much of it caches serve.
  bytes: float
  matmul_ceiling: float  # FLOP/s of products in the model's type, measured.
  memory_ceiling: float  # Bytes/s, measured.
  matmul_share: float  # FLOP/s of the step over the ceiling.
  memory_share: float  # Bytes/s of the step over the ceiling.
  state_bytes: float  # Weights, optimizer, targets, per device.
  temporary_bytes: float  # Activations, gradients and buffers, per device.
  compile_seconds: float  # Of the whole step.
  # From a profile: the operations of a device that take longest.
  profile: list[step_profile.Operation] = dataclasses.field(
    default_factory=list
  )


def benchmark(
  config: ConfigDict,
  *,
  name: str,
  devices: int,
  rounds: int,
  parts: bool,
  profile: str,
) -> Findings:
  """Measures the recipe called `name` on this machine; see `measure`.

  The batch is split over that many devices; 0 takes all.
  """
  if devices:
    cpu_devices.make(devices)
  used = machine.devices(devices or len(jax.devices()))
  about = machine.describe(used)
  result = measure(config, used, rounds=rounds, parts=parts, profile=profile)
  return Findings(as_text(name, result, about), as_dict(name, result, about))


def measure(
  config: ConfigDict,
  used: list[jax.Device],
  *,
  rounds: int,
  parts: bool = True,
  profile: str = "",
) -> Result:
  """Times the config's step on random images.

  Args:
    config: The recipe.
    used: The devices.
    rounds: How often to run each contender.
    parts: Whether to time the step's parts too, each as a program of its own.
    profile: Folder for a profile of three steps; empty for none.

  Raises:
    UserError: The config contradicts itself, or its batch does not divide.
  """
  experiment_lib.check_batch(config, len(used))
  experiment = experiment_lib.build(config, _NUM_EXAMPLES)
  mesh = make_mesh(used)
  state = step_lib.initial_state(experiment, replicated(mesh))
  batch = shard_batch(experiment_lib.random_batch(config), mesh)

  with concurrent.futures.ThreadPoolExecutor() as threads:
    on_gpu = used[0].platform == "gpu"
    # Products on a GPU are calls of libraries, whose FLOP the text hides. The
    # step for the CPU has the same products; it compiles beside the GPU's.
    counting = threads.submit(_flops_on_cpu, config, used) if on_gpu else None
    console.print_line("Compiling the step.")
    start = time.perf_counter()
    train_step = step_lib.jit_train_step(experiment, replicated(mesh))
    compiled = train_step.lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    flops_on_cpu = counting.result() if counting else None
  step = _steps(compiled, state, batch)
  runs: dict[str, Callable[[], Any]] = {"step": step}
  if parts:
    runs |= _parts(experiment, mesh, batch)
  device, dtype = used[0], config.model.dtype
  limits = _ceilings(device, jnp.dtype(dtype))
  runs |= {name: run for name, (run, _) in limits.items()}
  console.print_line(f"Compiling its parts: {', '.join(list(runs)[1:])}.")
  times = timing.race(runs, rounds=rounds)

  best = {n: limits[n][1] / min(times[n].seconds) for n in limits}
  work = hlo.Program(compiled.as_text()).work()
  stats = compiled.memory_analysis()
  result = Result(
    batch_size=config.batch_size,
    devices=len(used),
    dtype=dtype,
    **_speed(times, config.batch_size),
    **_arithmetic(work, flops_on_cpu or _flops(work), times["step"], best),
    state_bytes=stats.alias_size_in_bytes,
    temporary_bytes=stats.temp_size_in_bytes,
    compile_seconds=compile_seconds,
  )
  if profile:
    operations = step_profile.record(step, compiled.as_text(), profile)
    result = dataclasses.replace(result, profile=operations)
  return result


def _speed(times: dict[str, timing.Times], batch_size: int) -> dict[str, Any]:
  """Returns what a `Result` says about the step's and its parts' time."""
  if "both" in times:
    backward = times["both"].minus(times["forward"])
    times = {**times, "backward": backward}
  spreads = {name: timing.Spread.of(t.seconds) for name, t in times.items()}
  whole = spreads["step"]
  measured = {name: spreads[name] for name in PARTS if name in spreads}
  shares = {name: part.median / whole.median for name, part in measured.items()}
  if "both" in times:
    shares["rest"] = 1 - sum(shares.values())
  return {
    "step": whole,
    "images_per_second": batch_size / whole.median,
    "parts": measured,
    "shares": shares,
  }


def _arithmetic(
  work: Sequence[hlo.Work],
  flops: dict[str, float],
  step: timing.Times,
  best: dict[str, float],
) -> dict[str, Any]:
  """Returns what a `Result` says about FLOP, bytes and the best speeds."""
  moved, total = sum(one.bytes for one in work), sum(flops.values())
  median = timing.Spread.of(step.seconds).median
  return {
    "flops": total,
    "flops_by_part": flops,
    "bytes": moved,
    "matmul_ceiling": best["matmul"],
    "memory_ceiling": best["memory"],
    "matmul_share": total / median / best["matmul"],
    "memory_share": moved / median / best["memory"],
  }


def _ceilings(
  device: jax.Device, dtype: Any
) -> dict[str, tuple[Callable[[], Any], float]]:
  """Returns work that reaches the best speed: (its start, its amount).

  "matmul" is a product of two matrices, exact for float32; its amount is FLOP.
  "memory" is a pass over an array, in and out; its amount is bytes.
  """
  side, size = _SIZES.get(device.platform, _SIZES["default"])
  matrix = jax.device_put(jnp.full((side, side), 0.5, dtype), device)
  array = jax.device_put(jnp.zeros(size // 4, jnp.float32), device)
  product = jax.jit(lambda x: jax.lax.dot(x, x, precision="highest"))
  copy = jax.jit(lambda x: x + 1)
  return {
    "matmul": (functools.partial(product, matrix), 2.0 * side**3),
    "memory": (functools.partial(copy, array), 2.0 * size),
  }


def _steps(
  compiled: Callable[..., Any], state: TrainState, batch: Any
) -> Callable[[], Any]:
  """Returns a function that takes the next step; the state is donated."""

  def step() -> Any:
    nonlocal state
    state, metrics = compiled(state, batch)
    return metrics

  return step


def _parts(
  experiment: experiment_lib.Experiment, mesh: Mesh, batch: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
  """Returns the step's parts as programs of their own, on their own state."""
  state = step_lib.initial_state(experiment, replicated(mesh))
  jit = functools.partial(_jit_on, mesh)
  recipes = experiment.augmentation
  augment = jit(lambda rng, b: augment_views(recipes, rng, b))
  views = augment(state.rng, batch)

  def forward(params: Any, batch_stats: Any, views: Any) -> Any:
    params = step_lib.whole_weights(experiment, params)
    return step_lib.embed_views(experiment.model, params, batch_stats, views)

  forward_alone = jit(forward)
  embeddings, _ = forward_alone(state.params, state.batch_stats, views)

  def both(
    params: Any, batch_stats: Any, views: Any, cotangents: Any
  ) -> tuple[Any, Any]:
    _, pull, stats = jax.vjp(
      lambda p: forward(p, batch_stats, views), params, has_aux=True
    )
    return pull(cotangents)[0], stats

  def objective(zs: Any, targets: Any, key: jax.Array) -> Any:
    loss = lambda zs: experiment.objective.loss(
      zs,
      num_global=experiment_lib.NUM_GLOBAL,
      targets=targets,
      key=key,
      **experiment.hyperparameters,
    )
    return jax.value_and_grad(loss, has_aux=True)(zs)

  def optimizer(params: Any, opt_state: Any) -> tuple[Any, Any]:
    # The weights stand for the gradients; values do not matter.
    params = sharding.split(params, experiment.state_sharding)
    updates, opt_state = experiment.optimizer.update(params, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  diagnostics = functools.partial(step_lib.signs_of_collapse, experiment)
  uses_target = experiment.objective.uses_target
  targets = embeddings[: experiment_lib.NUM_GLOBAL] if uses_target else None
  weights, stats = state.params, state.batch_stats
  shardings = step_lib.state_shardings(experiment, replicated(mesh))
  updated = (shardings.params, shardings.opt_state)
  programs = {
    "augment": (augment, (state.rng, batch)),
    "forward": (forward_alone, (weights, stats, views)),
    "both": (jit(both), (weights, stats, views, embeddings)),
    "objective": (jit(objective), (embeddings, targets, state.rng)),
    "optimizer": (jit(optimizer, updated), (weights, state.opt_state)),
    "diagnostics": (jit(diagnostics), (embeddings,)),
  }
  if uses_target:
    programs["target"] = (forward_alone, (weights, stats, views[:1]))
  return {
    name: functools.partial(f, *arguments)
    for name, (f, arguments) in programs.items()
  }


def _jit_on(
  mesh: Mesh, function: Callable[..., Any], out_shardings: Any = None
) -> Callable[..., Any]:
  def traced(*arguments: Any) -> Any:
    # The objective needs the mesh, as in the trainer's step.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(*arguments)

  return jax.jit(traced, out_shardings=out_shardings)


def _flops_on_cpu(
  config: ConfigDict, used: list[jax.Device]
) -> dict[str, float]:
  """Returns the FLOP of each part, from the step compiled for CPUs."""
  cpus = slices.get_slice(f"cpu:{len(used)}")
  report = compiled_step.measure(config, cpus, _NUM_EXAMPLES)
  return {name: part.flops for name, part in report.parts.items()}


def _flops(work: Iterable[hlo.Work]) -> dict[str, float]:
  """Returns the FLOP of each part."""
  flops: dict[str, float] = collections.defaultdict(float)
  for one in work:
    if one.flops:
      flops[compiled_step.part_of(one.op_name)] += one.flops
  return dict(flops)


def as_dict(name: str, result: Result, about: dict[str, Any]) -> dict[str, Any]:
  """Returns everything, for --json; seconds, bytes, FLOP."""
  return {
    "benchmark": "step",
    "config": name,
    "machine": about,
    **dataclasses.asdict(result),
  }


def as_text(name: str, result: Result, about: dict[str, Any]) -> str:
  """Returns the report for people."""
  lines = [
    f"{name}: batch {result.batch_size} on {result.devices} device(s),"
    f" {result.dtype}",
    machine.as_text(about),
    "",
    f"{result.images_per_second:,.0f} images/s; a step takes"
    f" {spread(result.step)} s",
  ]
  if result.shares:
    lines += [
      "",
      f"{'':13}{'seconds: median [min, max]':>32}{'of the step':>13}",
    ]
  for part, share in result.shares.items():
    seconds = spread(result.parts.get(part))
    lines.append(f"  {part:11}{seconds:>32}{share:>13.1%}")
  by_part = ", ".join(
    f"{part} {quantity(flops)}" for part, flops in result.flops_by_part.items()
  )
  lines += [
    "",
    f"{quantity(result.flops, 'FLOP')} per device ({by_part})",
    f"  {quantity(result.flops / result.step.median, 'FLOP/s')},"
    f" {result.matmul_share:.0%} of"
    f" {quantity(result.matmul_ceiling, 'FLOP/s')} measured for"
    f" {result.dtype} products",
    f"  {size(result.bytes / result.step.median)}/s,"
    f" {result.memory_share:.0%} of {size(result.memory_ceiling)}/s measured"
    " for a pass over an array",
    f"Memory per device: {size(result.state_bytes)} of state,"
    f" {size(result.temporary_bytes)} of temporaries; compiled in"
    f" {result.compile_seconds:.0f} s",
  ]
  if result.shares:
    lines += [
      "",
      "Each part is a separate program. backward: forward and backward minus"
      " forward; rest: the step minus its parts.",
    ]
  if result.profile:
    lines += ["", *step_profile.as_lines(result.profile)]
  return "\n".join(lines)
