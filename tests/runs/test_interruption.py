"""Signals, without a run; tests/test_reliability.py has them with one."""

import os
import signal
import time

import jax
import pytest

from imsvd_jax.runs import interruption


def swallow(*_):
  """What JAX's preemption service does with SIGTERM."""


@pytest.mark.parametrize(
  ("count", "after"), [(2, signal.SIG_DFL), (1, swallow)], ids=["two", "one"]
)
def test_a_signal_after_the_loop_is_not_swallowed(monkeypatch, count, after):
  """By the service, which nobody asks then; alone there is none."""
  before = signal.signal(signal.SIGTERM, swallow)
  monkeypatch.setattr(jax, "process_count", lambda: count)
  try:
    with interruption.StopRequest():
      listens = signal.getsignal(signal.SIGTERM) is not swallow
      assert listens == (count == 1)  # With peers the service does.
    assert signal.getsignal(signal.SIGTERM) is after
  finally:
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("count", [1, 2])
def test_work_between_steps_asks_alone_only(monkeypatch, count):
  """With peers all must stop at the same step."""
  monkeypatch.setattr(jax, "process_count", lambda: count)
  before = signal.signal(signal.SIGTERM, swallow)
  try:
    with interruption.StopRequest() as stop:
      assert not stop.asked
      os.kill(os.getpid(), signal.SIGTERM)
      deadline = time.monotonic() + (10 if count == 1 else 0.2)
      while not stop.asked and time.monotonic() < deadline:
        time.sleep(0.01)
      assert stop.asked == (count == 1)
  finally:
    signal.signal(signal.SIGTERM, before)
