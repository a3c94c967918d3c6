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


def test_results_go_to_stdout_and_all_else_to_stderr(capsys):
  console.say("on the way")
  console.print_result("| a table |")
  console.print_progress("step 1/2", 0.5, "1/2")
  said = capsys.readouterr()
  assert said.out == "| a table |\n"
  assert said.err == "on the way\nstep 1/2\n"  # No bar, no color: no terminal.


def test_the_log_has_every_line_and_the_details(tmp_path, capsys):
  path = tmp_path / "train.log"
  for round_ in (1, 2):  # A resumed run appends.
    with console.log_in(path):
      console.say(f"round {round_}", "red")
      console.print_detail("a long table")
      console.print_result("a result")
  assert path.read_text() == "".join(
    f"round {n}\na long table\na result\n" for n in (1, 2)
  )
  assert "a long table" not in capsys.readouterr().err
  console.print_detail("a long table")  # Nowhere else to go.
  assert "a long table" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_one_line(tmp_path, capsys):
  with console.log_in(tmp_path):
    console.print_detail("a detail")
  said = capsys.readouterr().err
  assert said.startswith("No log: ")
  assert "a detail" in said


def test_on_a_terminal_progress_is_one_line_with_a_bar(monkeypatch, capsys):
  monkeypatch.setattr(console, "_is_terminal", lambda: True)
  monkeypatch.setattr(console, "_columns", lambda: 80)
  monkeypatch.delenv("NO_COLOR", raising=False)
  console.print_progress("a long line", 0.5, "step 5/10  left 0:30")
  console.print_progress("a long line", 0.6, "step 6/10  left 0:20")
  console.say("collapsing", "red")
  said = capsys.readouterr().err
  bar = "[##########..........] step 5/10  left 0:30"
  assert said.startswith(f"\r\x1b[K{bar}\r\x1b[K[############")
  assert said.endswith("\r\x1b[K\x1b[31mcollapsing\x1b[0m\n")
  monkeypatch.setenv("NO_COLOR", "1")
  console.say("collapsing", "red")
  assert capsys.readouterr().err == "collapsing\n"
