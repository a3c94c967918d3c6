"""Lines on the console: messages, progress, durations.

Results go to standard output, everything else to standard error. On a terminal
the progress is one line with a bar that changes in place, and a verdict has a
color. A run keeps a copy of all lines in its log, and its details only there.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO

import jax

_BAR = 20  # Characters.
_ERASE = "\r\x1b[K"
_COLORS = {"red": "\x1b[31m", "green": "\x1b[32m", "": ""}


class _Console:
  """What is open: a run's log, and a line that the next one replaces."""

  log: IO[str] | None = None
  has_status = False
  reword: Callable[[str], str] | None = None


def print_line(line: str, color: str = "") -> None:
  """Writes a line to standard error; standard output is for results."""
  _erase_status()
  if _Console.reword is not None:
    line = _Console.reword(line)
  shown = f"{_COLORS[color]}{line}\x1b[0m" if color and _has_color() else line
  print(shown, file=sys.stderr, flush=True)
  _keep(line)


def print_result(text: str) -> None:
  """Writes a result to standard output, from process 0 only."""
  if jax.process_index() == 0:
    _erase_status()
    print(text, flush=True)
    _keep(text)


def print_detail(text: str) -> None:
  """Writes to the log alone; to standard error where no log is open."""
  if _Console.log is not None:
    _keep(text)
  else:
    say(text)


def print_progress(line: str, share: float, brief: str) -> None:
  """Writes how far a run is: a line; on a terminal a bar and what is brief."""
  if jax.process_index() != 0:
    return
  if not _is_terminal():
    print_line(line)
    return
  full = round(_BAR * min(max(share, 0.0), 1.0))
  text = f"[{'#' * full}{'.' * (_BAR - full)}] {brief}"
  print(
    f"{_ERASE}{text[: _columns() - 1]}", end="", file=sys.stderr, flush=True
  )
  _Console.has_status = True
  _keep(line)


@contextlib.contextmanager
def reworded(reword: Callable[[str], str]) -> Iterator[None]:
  """Passes every line through a function before it is written."""
  before, _Console.reword = _Console.reword, reword
  try:
    yield
  finally:
    _Console.reword = before


@contextlib.contextmanager
def log_in(path: str | os.PathLike) -> Iterator[None]:
  """Keeps a copy of all lines of process 0 in a file, which it appends to."""
  try:
    log = open(path, "a") if jax.process_index() == 0 else None  # noqa: SIM115
  except OSError as error:
    print_line(f"No log: {path} cannot be written ({error.strerror}).")
    log = None
  _Console.log = log
  try:
    yield
  finally:
    _erase_status(keep=True)
    _Console.log = None
    if log is not None:
      log.close()


def _keep(line: str) -> None:
  if _Console.log is not None:
    with contextlib.suppress(
      OSError
    ):  # The next save says that a disk is full.
      print(line, file=_Console.log, flush=True)


def _erase_status(*, keep: bool = False) -> None:
  if _Console.has_status:
    end = "\n" if keep else ""
    print("" if keep else _ERASE, end=end, file=sys.stderr, flush=True)
    _Console.has_status = False


def _columns() -> int:
  return os.get_terminal_size(sys.stderr.fileno()).columns or 80


def _is_terminal() -> bool:
  return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _has_color() -> bool:
  return _is_terminal() and "NO_COLOR" not in os.environ


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


def say(message: str, color: str = "") -> None:
  """Prints a message to the console, from process 0 only."""
  if jax.process_index() == 0:
    print_line(message, color)


def duration(seconds: float) -> str:
  """Returns "1:02:03" or "2:03"."""
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"
