"""Lines on the console: messages, progress, durations."""

import sys
import time
from collections.abc import Callable

import jax


def print_line(line: str) -> None:
  """Writes a line to standard error; standard output is for results."""
  print(line, file=sys.stderr, flush=True)


class Progress:
  """Reports the progress of a loop, at most once per `every` seconds.

  Work that takes less prints nothing, unless it calls `finish`. Rates leave out
  the units that are done first, because they may wait for a compilation.

  Args:
    what: What the loop does, for the line.
    total: Units in all; None if unknown.
    unit: Name of the units.
    every: Seconds between two lines.
    report: Prints a line.

  Attributes:
    done: Units done so far.
  """

  def __init__(
    self,
    what: str,
    total: int | None,
    *,
    unit: str = "images",
    every: float = 3.0,
    report: Callable[[str], None] = print_line,
  ) -> None:
    self.done = 0
    self._what, self._total, self._unit = what, total, unit
    self._every, self._report = every, report
    self._start = self._last = time.monotonic()
    self._first_done, self._first_seconds = 0, 0.0

  def expect(self, total: int) -> None:
    """Sets the number of units in all, once it is known."""
    self._total = total

  def add(self, count: int) -> None:
    """Counts `count` more units as done and reports if it is time."""
    now = time.monotonic()
    if not self.done:
      self._first_done, self._first_seconds = count, now - self._start
    self.done += count
    if now - self._last >= self._every:
      self._last = now
      self._report(self.line(now - self._start))

  def rate(self) -> float:
    """Returns units per second so far."""
    return self._pace(time.monotonic() - self._start)[0]

  def finish(self) -> None:
    """Reports how much was done, how long it took and how fast it was."""
    seconds = time.monotonic() - self._start
    self._report(
      f"{self._what}: {self.done} {self._unit} in {duration(seconds)},"
      f" {self._pace(seconds)[0]:.0f}/s"
    )

  def line(self, seconds: float) -> str:
    """Returns the line to show after `seconds` of work."""
    rate, seconds_left = self._pace(seconds)
    if not self._total:
      return f"{self._what}: {self.done} {self._unit}, {rate:.0f}/s"
    return (
      f"{self._what}: {self.done}/{self._total} {self._unit}, {rate:.0f}/s,"
      f" left {duration(seconds_left)}"
    )

  def _pace(self, seconds: float) -> tuple[float, float]:
    """Returns the rate per second and the seconds left."""
    left = max((self._total or 0) - self.done, 0)
    if self.done == self._first_done:
      return pace(self.done, seconds, left)
    return pace(
      self.done - self._first_done, seconds - self._first_seconds, left
    )


def pace(done: int, seconds: float, left: int) -> tuple[float, float]:
  """Returns the rate per second, and the seconds that `left` more will take."""
  rate = done / max(seconds, 1e-9)
  return rate, left / max(rate, 1e-9)


def say(message: str) -> None:
  """Prints a message to the console, from process 0 only."""
  if jax.process_index() == 0:
    print_line(message)


def duration(seconds: float) -> str:
  """Returns "1:02:03" or "2:03"."""
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
