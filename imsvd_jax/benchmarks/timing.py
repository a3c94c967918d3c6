"""Runs contenders in turn and times them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from imsvd_jax.base import console

# A sample on an accelerator lasts at least this long; a shorter one would
# measure how fast Python starts the work.
_SAMPLE_SECONDS = 0.02
_MAX_CALLS = 1000
_PROGRESS_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Spread:
  """Median, smallest and largest of many numbers."""

  median: float
  min: float
  max: float

  @classmethod
  def of(cls, values: Sequence[float]) -> "Spread":
    """Returns the spread of at least one number."""
    return cls(statistics.median(values), min(values), max(values))


class Times(NamedTuple):
  """The time of each round, per call."""

  seconds: list[float]  # By the clock.
  # Of all threads of this process; more reliable than the clock if other
  # programs share the cores.
  cpu_seconds: list[float]

  def scaled(self, factor: float) -> "Times":
    """Returns the times of `factor` times the work."""
    return Times(*([factor * seconds for seconds in each] for each in self))

  def minus(self, other: "Times") -> "Times":
    """Returns the differences from another's times, round by round."""
    pairs = zip(self, other, strict=True)
    return Times(
      *([a - b for a, b in zip(x, y, strict=True)] for x, y in pairs)
    )

  def ratio(self, other: "Times", *, cpu: bool = False) -> Spread:
    """Returns the times (or CPU times) over another's, round by round."""
    pairs = zip(self[cpu], other[cpu], strict=True)
    return Spread.of([a / b for a, b in pairs])


def race(
  runs: Mapping[str, Callable[[], Any]], *, rounds: int
) -> dict[str, Times]:
  """Times contenders by name round by round, each once per round.

  They start the work and return its arrays, for which the race waits.
  """
  calls = {name: _warm_up(run) for name, run in runs.items()}
  times = {name: Times([], []) for name in runs}
  start = last = time.monotonic()
  for number in range(1, rounds + 1):
    for name, run in runs.items():
      seconds, cpu_seconds = _sample(run, calls[name])
      times[name].seconds.append(seconds)
      times[name].cpu_seconds.append(cpu_seconds)
    now = time.monotonic()
    if now - last >= _PROGRESS_SECONDS and number < rounds:
      last, per_round = now, (now - start) / number
      console.print_line(
        f"round {number}/{rounds}, {per_round:.2g} s each,"
        f" {per_round * (rounds - number):.0f} s left"
      )
  return times


def _warm_up(run: Callable[[], Any]) -> int:
  """Compiles; returns the number of calls in a sample."""
  jax.block_until_ready(run())
  # The first call may have compiled; only the second tells how long the work
  # takes.
  seconds, _ = _sample(run, 1)
  if seconds >= _SAMPLE_SECONDS:
    return 1
  return min(_MAX_CALLS, int(_SAMPLE_SECONDS / max(seconds, 1e-9)) + 1)


def _sample(run: Callable[[], Any], calls: int) -> tuple[float, float]:
  start, cpu_start = time.perf_counter(), time.process_time()
  result = None
  for _ in range(calls):
    result = run()
  jax.block_until_ready(result)
  return (
    (time.perf_counter() - start) / calls,
    (time.process_time() - cpu_start) / calls,
  )
