"""When it is time again."""

import time

from imsvd_jax.base.every import Every


def due(period, last=6):
  return [step for step in range(1, last + 1) if period.due(step)]


def test_steps_are_multiples_and_none_is_never():
  assert due(Every(steps=2)) == [2, 4, 6]
  assert due(Every()) == []


def test_minutes_count_at_the_steps_of_the_clock_only(monkeypatch):
  now = 0.0
  monkeypatch.setattr(time, "monotonic", lambda: now)
  period = Every(minutes=1.0, clock_steps=3)
  assert due(period) == []
  now = 61.0
  assert due(period) == [3, 6]
  period.restart()
  assert due(period) == []
  assert due(Every(steps=4, minutes=0.0, clock_steps=3)) == [3, 4, 6]
