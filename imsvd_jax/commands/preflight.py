"""Says what a run would cost on a TPU slice, on a machine without one.

  python -m imsvd_jax preflight --config=configs/imagenet_r50.py \
    --topology=v5e:4x4 --num_examples=1281167

Compiles the real train step for the slice (minutes for a ResNet-50) and reports
per chip: memory and whether it fits, arithmetic, memory traffic, every
collective, and a lower bound on the time of a step and of an epoch. Nothing
runs. `pip install 'imsvd_jax[tpu]'` installs the compiler; --topology=cpu:8
needs nothing.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from ml_collections import config_flags

from imsvd_jax.base import cpu_devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import command_line

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe file, such as configs/digits.py.", lock_config=True
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "What to compile for: v5e:4x4, v4:2x2x4, cpu:8, ..."
)
_NUM_EXAMPLES = flags.DEFINE_integer(
  "num_examples",
  None,
  "Images in the train split, for the time per epoch. Default: the recipe's"
  " data.num_examples where its source makes that many.",
  lower_bound=1,
)
_FIND_BATCH = flags.DEFINE_bool(
  "find_batch", False, "Search the largest batch that fits; a few compilations."
)
flags.DEFINE_alias("find-batch", "find_batch")
_JSON = flags.DEFINE_bool("json", False, "Print the figures as JSON.")

# Sources that make data.num_examples images; others know their own number.
_MAKE_NUM_EXAMPLES = ("shapes", "synthetic")
_IMAGES_PER_CHIP = 8  # The step of --find_batch.
_MILLION = 1_000_000
_IS_CHILD = "IMSVD_JAX_PREFLIGHT_CHILD"  # An environment variable.


def main(argv: list[str]) -> int | None:
  """Prints the report of --config on --topology, from a process of its own.

  libtpu crashes on some programs; who asked should be told so in words.
  """
  del argv
  if _IS_CHILD in os.environ:
    faulthandler.disable()  # absl's; the parent says it shorter.
    return _report()
  # `subprocess.run` takes the child along when it is left by an exception.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  signal.signal(signal.SIGINT, lambda number, _: sys.exit(128 + number))
  child = subprocess.run(
    [sys.executable, "-m", "imsvd_jax", "preflight", *sys.argv[1:]],
    env=os.environ | {_IS_CHILD: "1"},
    check=False,
  )
  if child.returncode < 0:
    raise UserError(_death(-child.returncode))
  return child.returncode


def _death(number: int) -> str:
  """What to say of a compiler that a signal has ended."""
  name = signal.Signals(number).name
  if number == signal.SIGKILL:
    return (
      f"Something killed the compiler ({name}), as Linux does where memory is"
      " short; a ResNet-50 takes 5 GB."
    )
  return (
    f"The compiler crashed ({name}): a fault of libtpu's or of jaxlib's. Try"
    " another version (pip install -U libtpu), another slice or another batch."
  )


def _report() -> None:
  # Imported late, so that --help and a bad flag answer at once.
  import jax

  # Never take the accelerators of this machine: other programs may use them.
  jax.config.update("jax_platforms", "cpu")
  _make_cpu_devices(_TOPOLOGY.value)
  from imsvd_jax.benchmarks.costs import slices

  slice_ = slices.get_slice(_TOPOLOGY.value)
  config = _CONFIG.value.copy_and_resolve_references()
  num_examples = _num_examples(config)
  if _FIND_BATCH.value:
    config.batch_size = _largest_batch(config, slice_, num_examples)
  report = _measure(config, slice_, num_examples)
  if _JSON.value:
    print(json.dumps(as_dict(report, slice_, num_examples), indent=2))
  else:
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    print(f"{name} on {slice_.name}\n")
    print(as_text(report, slice_, num_examples))


def _make_cpu_devices(topology: str) -> None:
  """Makes as many CPU devices as "cpu:N" asks for, before JAX counts them."""
  kind, _, count = topology.partition(":")
  if kind == "cpu" and count.isdecimal() and int(count):
    cpu_devices.make(int(count))


def _num_examples(config: Any) -> int | None:
  if _NUM_EXAMPLES.value:
    return _NUM_EXAMPLES.value
  if config.data.name in _MAKE_NUM_EXAMPLES:
    return config.data.num_examples
  return None


def _measure(config: Any, slice_: Any, num_examples: int | None) -> Any:
  from imsvd_jax.benchmarks.costs import compiled_step

  # Without it the schedule needs some number; no cost depends on which.
  images = num_examples or 1000 * config.batch_size
  with _elapsed(f"Compiling batch {config.batch_size} for {slice_.name}"):
    return compiled_step.measure(config, slice_, images)


def _largest_batch(config: Any, slice_: Any, num_examples: int | None) -> int:
  """Searches the largest batch that fits; says what it tries."""
  from imsvd_jax.benchmarks.costs import compiled_step

  if slice_.chip is None:
    raise UserError("--find_batch needs the memory of a chip; try v5e:4x4.")

  def measure_batch(batch_size):
    config.batch_size = batch_size
    memory = _measure(config, slice_, num_examples).memory
    _note(f"  batch {batch_size}: {_verdict(memory)}")
    return memory

  return compiled_step.largest_batch(
    measure_batch,
    start=config.batch_size,
    unit=_IMAGES_PER_CHIP * len(slice_.devices),
  )


# --- Figures -----------------------------------------------------------------


def as_dict(report: Any, slice_: Any, num_examples: int | None) -> dict:
  """Returns everything the report holds, in bytes, FLOP and seconds."""
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


def as_text(report: Any, slice_: Any, num_examples: int | None) -> str:
  """Returns the report for people."""
  lines = [
    f"{report.num_chips} chips, batch {report.batch_size}"
    f" ({report.batch_size // report.num_chips} per chip)."
    f" Compiled in {report.compile_seconds:.0f} s. All figures are per chip.",
    "",
    *_memory_lines(report.memory),
  ]
  if report.parts:
    lines += ["", *_part_lines(report), "", *_collective_lines(report)]
  if report.bound is not None:
    lines += ["", *_bound_lines(report, slice_, num_examples)]
  elif slice_.chip is None:
    lines += ["", "No bound on the time: a CPU has no public figures."]
  return "\n".join(lines)


def _memory_lines(memory: Any) -> list[str]:
  rows = [
    ("weights, statistics, targets", memory.parameters),
    ("optimizer state", memory.optimizer),
    ("batch", memory.batch),
    ("activations, gradients, buffers", memory.temporaries),
    ("program", memory.program),
    ("peak, with padding", memory.peak),
  ]
  lines = ["Memory"]
  lines += [
    f"  {name:34}{_gib(size):>12}" for name, size in rows if size is not None
  ]
  if memory.available is not None:
    lines.append(f"  {'the compiler may use':34}{_gib(memory.available):>12}")
    lines.append(f"  {_verdict(memory)}")
  return lines


def _verdict(memory: Any) -> str:
  if memory.available is None:
    return "fits"
  spare = memory.available - memory.peak
  if memory.fits:
    return f"FITS: {_gib(spare)} to spare."
  return (
    f"DOES NOT FIT: needs {_gib(memory.peak)} of {_gib(memory.available)},"
    f" {_gib(-spare)} too much."
  )


def _part_lines(report: Any) -> list[str]:
  lines = [
    f"{'Part of the step':18}{'FLOP':>11}{'as bf16':>11}{'HBM bytes':>11}"
    f"{'sent bytes':>12}"
  ]
  total = [0.0] * 4
  for name, part in report.parts.items():
    values = dataclasses.astuple(part)
    total = [a + b for a, b in zip(total, values, strict=True)]
    lines.append(f"  {name:16}{_row(values)}")
  lines.append(f"  {'all':16}{_row(total)}")
  lines.append(
    "  (as bf16: times the passes of the matrix unit, 6 for exact float32)"
  )
  return lines


def _row(values: Any) -> str:
  flops, passes, moved, sent = map(_si, values)
  return f"{flops:>11}{passes:>11}{moved:>11}{sent:>12}"


def _collective_lines(report: Any) -> list[str]:
  if not report.collectives:
    return ["Collectives: none."]
  lines = [
    f"{'Collectives':20}{'count':>9}{'payload bytes':>22}{'sent bytes':>12}"
  ]
  for one in report.collectives:
    lines.append(
      f"  {one.kind:18}{one.count:9d}{_si(one.bytes):>22}"
      f"{_si(one.sent_bytes):>12}"
    )
  if report.unknown_loops:
    lines.append(
      f"  ({report.unknown_loops} loops without a known trip count are counted"
      " as one trip)"
    )
  return lines


def _bound_lines(
  report: Any, slice_: Any, num_examples: int | None
) -> list[str]:
  bound, chip = report.bound, slice_.chip
  what = {
    "compute": f"arithmetic at {chip.flops / 1e12:.0f} TFLOP/s (bf16)",
    "memory": f"memory traffic at {chip.hbm_bandwidth / 1e9:.0f} GB/s",
    "network": "collectives over the interconnect",
  }
  lines = [f"A step takes at least (public figures: {chip.source})"]
  for name, label in what.items():
    mark = "  <- sets the bound" if name == bound.limited_by else ""
    lines.append(f"  {label:38}{getattr(bound, name) * 1e3:9.2f} ms{mark}")
  lines.append(
    f"  Intensity {report.intensity:.0f} FLOP/byte; above"
    f" {chip.ridge:.0f} the {chip.name} is limited by arithmetic."
  )
  lines.append(
    f"At best {report.batch_size / bound.seconds:,.0f} images/s,"
    f" {_epoch(report, num_examples)}."
  )
  return lines


def _epoch(report: Any, num_examples: int | None) -> str:
  images = num_examples or _MILLION
  seconds = images / report.batch_size * report.bound.seconds
  if num_examples:
    return f"{_duration(seconds)} per epoch of {images:,} images"
  return (
    f"{_duration(seconds)} per million images (--num_examples gives the epoch)"
  )


def _si(value: float) -> str:
  """Returns three digits and a prefix: 6.43 T."""
  for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= unit:
      return f"{value / unit:.3g} {prefix}"
  return f"{value:.3g}"


def _gib(size: float) -> str:
  if abs(size) < 0.005 * 2**30:
    return f"{size / 2**20:.2f} MiB"
  return f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
  if seconds < 120:
    return f"{seconds:.1f} s"
  return f"{seconds / 60:.1f} min"


# --- Progress ----------------------------------------------------------------


def _note(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _elapsed(what: str, every: float = 20.0) -> Iterator[None]:
  """Says what takes longer than a moment, and again every so many seconds."""
  start = time.monotonic()
  done = threading.Event()

  def tick():
    wait = 3.0
    while not done.wait(wait):
      _note(f"{what}: {time.monotonic() - start:.0f} s")
      wait = every

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def run() -> None:
  """Runs the command line."""
  command_line.require_config()
  flags.mark_flag_as_required("topology")
  command_line.run(main)
