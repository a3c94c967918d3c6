"""A second process for work that may crash, such as compiling with libtpu.

libtpu crashes on some programs, and the user must read a sentence, not a dump.
So the command starts itself again, and the second process compiles.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from imsvd_jax.base.errors import UserError

_IS_CHILD = "IMSVD_JAX_PREFLIGHT_CHILD"  # An environment variable.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def is_own_process() -> bool:
  """Returns whether `in_own_process` has started this process."""
  return _IS_CHILD in os.environ


def in_own_process(arguments: Sequence[str]) -> int:
  """Runs `imsvd ARGUMENTS` again in a process that may crash.

  Returns:
    Its exit status.

  Raises:
    UserError: A signal ended it; the message says what that means.
  """
  requested: list[int] = []

  def stop(number: int, _: Any = None) -> NoReturn:
    sys.exit(128 + number)

  # A signal that comes while the child starts waits until it can be killed.
  for number in _SIGNALS:
    signal.signal(number, lambda number, _: requested.append(number))
  with subprocess.Popen(
    [sys.executable, "-m", "imsvd_jax", *arguments],
    env=os.environ | {_IS_CHILD: "1"},
  ) as child:
    try:
      for number in _SIGNALS:
        signal.signal(number, stop)
      if requested:
        stop(requested[0])
      child.wait()
    except BaseException:
      child.kill()
      raise
  if child.returncode < 0:
    raise UserError(_crash(-child.returncode))
  return child.returncode


def _crash(number: int) -> str:
  """Returns what it means that a signal has ended the compiler."""
  name = signal.Signals(number).name
  if number == signal.SIGKILL:
    return (
      f"Something killed the compiler ({name}). Linux does this when memory is"
      " short; a ResNet-50 needs 5 GB."
    )
  return (
    f"The compiler crashed ({name}): a fault of libtpu or jaxlib. Try another"
    " version (pip install -U libtpu), another slice or another batch."
  )
