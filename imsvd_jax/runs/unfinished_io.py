"""Silence about reads and writes that Orbax abandons.

When one leaf of a state cannot be read or written, Orbax abandons the others.
They end later, in a thread or when Python collects them, and would print a
traceback each, beside the one line that says what is wrong.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any


def ignore() -> None:
  """Shows no error of an abandoned operation from now on."""
  if not isinstance(sys.unraisablehook, _Filter):
    sys.unraisablehook = _Filter(sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited")


class _Filter:
  """Shows what Python cannot raise, but for what Orbax left behind."""

  def __init__(self, show: Callable[[Any], Any]) -> None:
    self._show = show

  def __call__(self, unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # Of a coroutine.
    abandoned = code is not None and "orbax" in code.co_filename
    if not abandoned and "Event loop is closed" not in str(
      unraisable.exc_value
    ):
      self._show(unraisable)
