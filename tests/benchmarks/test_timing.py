"""The race between contenders."""

import time

from imsvd_jax.benchmarks import timing


def test_contenders_take_turns():
  calls = []
  runs = {
    name: lambda name=name: (calls.append(name), time.sleep(0.03))
    for name in ("a", "b")
  }
  times = timing.race(runs, rounds=3)
  # Warm-up, the sample that finds how long a call lasts, three rounds.
  assert calls[-6:] == ["a", "b"] * 3
  assert len(times["a"].seconds) == len(times["b"].cpu_seconds) == 3
  assert min(times["a"].seconds) >= 0.03


def test_short_work_is_repeated_within_a_sample(monkeypatch):
  monkeypatch.setattr(timing, "_sample", lambda run, calls: (0.001, 0.001))
  assert timing._warm_up(lambda: None) == 21
  monkeypatch.setattr(timing, "_sample", lambda run, calls: (0.5, 0.5))
  assert timing._warm_up(lambda: None) == 1


def test_ratios_and_differences_are_of_each_round():
  slow = timing.Times([2.0, 40.0, 3.0], [1.0, 1.0, 1.0])
  fast = timing.Times([1.0, 10.0, 1.0], [2.0, 4.0, 8.0])
  assert slow.ratio(fast) == timing.Spread(3.0, 2.0, 4.0)
  assert fast.ratio(slow, cpu=True) == timing.Spread(4.0, 2.0, 8.0)
  assert slow.minus(fast).seconds == [1.0, 30.0, 2.0]
  assert fast.scaled(2.0).cpu_seconds == [4.0, 8.0, 16.0]
  assert timing.Spread.of([3.0, 1.0, 8.0]) == timing.Spread(3.0, 1.0, 8.0)


def test_long_races_say_how_long_they_will_take(monkeypatch):
  monkeypatch.setattr(timing, "_PROGRESS_SECONDS", 0.0)
  lines = []
  monkeypatch.setattr(timing.console, "print_line", lines.append)
  timing.race({"a": lambda: time.sleep(0.02)}, rounds=3)
  assert [line.split(",")[0] for line in lines] == ["round 1/3", "round 2/3"]
  assert "s left" in lines[0]
