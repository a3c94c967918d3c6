"""Lines on the console."""

from imsvd_jax.base import console


def test_progress_says_how_fast_and_how_long():
  lines = []
  meter = console.Progress("Embedding", 1000, every=0, report=lines.append)
  meter.add(250)
  assert lines[0].startswith("Embedding: 250/1000 images, ")
  assert meter.line(2.0) == "Embedding: 250/1000 images, 125/s, left 0:06"
  assert console.Progress("k-NN", None).line(1) == "k-NN: 0 images, 0/s"


def test_rates_leave_out_what_may_have_compiled(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
  lines = []
  meter = console.Progress("Scan", None, report=lines.append, every=99)
  for now[0] in (10.0, 11.0, 12.0):
    meter.add(5)
  assert meter.rate() == 5.0
  assert meter.line(12.0) == "Scan: 15 images, 5/s"
  meter.finish()
  assert lines == ["Scan: 15 images in 0:12, 5/s"]


def test_pace_is_a_rate_and_the_time_left():
  assert console.pace(50, 10.0, 200) == (5.0, 40.0)
  assert console.pace(0, 0.0, 0) == (0.0, 0.0)


def test_durations():
  shown = {0.4: "0:00", 61: "1:01", 3723: "1:02:03", -1: "0:00"}
  assert {s: console.duration(s) for s in shown} == shown
