"""Is it time again? One answer for logging, evaluating and saving."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


class Every:
  """Says at which steps to do something: by steps, by minutes, or both.

  Args:
    steps: At its multiples; 0: never.
    minutes: When so many have passed since the last time; None: never.
    clock_steps: Read the clock at the multiples of this only. With several
      processes, process 0's clock decides, and all wait for its answer.
  """

  def __init__(
    self, *, steps: int = 0, minutes: float | None = None, clock_steps: int = 1
  ) -> None:
    self._steps = steps
    self._minutes = minutes
    self._clock_steps = clock_steps
    self.restart()

  def due(self, step: int) -> bool:
    """Returns whether it is time; call it in every process."""
    if self._steps and step % self._steps == 0:
      return True
    if self._minutes is None or step % self._clock_steps:
      return False
    passed = np.bool_(time.monotonic() - self._last >= 60 * self._minutes)
    if jax.process_count() > 1:
      passed = multihost_utils.broadcast_one_to_all(passed)
    return bool(passed)

  def restart(self) -> None:
    """Starts the minutes again."""
    self._last = time.monotonic()
