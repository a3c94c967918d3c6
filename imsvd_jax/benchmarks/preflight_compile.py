"""Compiles a config's step for a slice of TPUs, and reports what it costs."""

import contextlib
import threading
import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import preflight_report
from imsvd_jax.benchmarks.costs import compiled_step, slices
from imsvd_jax.benchmarks.text import Findings

# Sources that make data.num_examples images; others know their own number.
_MAKE_NUM_EXAMPLES = ("shapes", "synthetic")
_IMAGES_PER_CHIP = 8  # The step of --find_batch.


def measure(
  config: ConfigDict,
  *,
  name: str,
  topology: str,
  num_examples: int | None = None,
  find_batch: bool = False,
) -> Findings:
  """Returns the costs of a step of the recipe called `name` on a slice.

  Args:
    config: The recipe.
    name: Its name, for the text.
    topology: Name of the slice, such as "v5e:4x4".
    num_examples: Images in the train split; by default data.num_examples of
      the recipe if its source makes that many.
    find_batch: Whether to search the largest batch that fits, and report it.

  Raises:
    UserError: There is no such slice, or the config does not fit it.
  """
  slices.compile_only(topology)
  slice_ = slices.get_slice(topology)
  config = config.copy_and_resolve_references()
  if num_examples is None and config.data.name in _MAKE_NUM_EXAMPLES:
    num_examples = config.data.num_examples
  if find_batch:
    config.batch_size = _largest_batch(config, slice_, num_examples)
  report = _compile(config, slice_, num_examples)
  text = preflight_report.as_text(report, slice_, num_examples)
  return Findings(
    f"{name} on {slice_.name}\n\n{text}",
    preflight_report.as_dict(report, slice_, num_examples),
  )


def _compile(
  config: ConfigDict, slice_: slices.Slice, num_examples: int | None
) -> compiled_step.Report:
  # The schedule needs some number; no cost depends on which.
  images = num_examples or 1000 * config.batch_size
  with _ticking(f"Compiling batch {config.batch_size} for {slice_.name}"):
    return compiled_step.measure(config, slice_, images)


def _largest_batch(
  config: ConfigDict, slice_: slices.Slice, num_examples: int | None
) -> int:
  """Searches the largest batch that fits, and reports each attempt."""
  if slice_.chip is None:
    raise UserError("--find_batch needs the memory of a chip; try v5e:4x4.")

  def measure_batch(batch_size: int) -> compiled_step.Memory:
    config.batch_size = batch_size
    memory = _compile(config, slice_, num_examples).memory
    verdict = preflight_report.verdict(memory)
    console.print_line(f"  batch {batch_size}: {verdict}")
    return memory

  return compiled_step.largest_batch(
    measure_batch,
    start=config.batch_size,
    unit=_IMAGES_PER_CHIP * len(slice_.devices),
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
