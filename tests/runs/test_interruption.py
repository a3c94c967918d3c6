"""Signals, without a run; tests/test_reliability.py has them with one."""

import signal

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
