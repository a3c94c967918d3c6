"""`imsvd runs`: the runs in a folder, and how each is doing."""

import json
import os
import socket

import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import listing
from tests.run_command import run_imsvd

CONFIG = {
  "objective": {"name": "imsvd"},
  "data": {"name": "digits"},
  "model": {"backbone": "resnet8"},
  "epochs": 8.0,
}


def make_run(folder, lines=(), config=CONFIG, lock=None):
  folder.mkdir(parents=True)
  (folder / "run.json").write_text('{"id": "1"}')
  (folder / "config.json").write_text(json.dumps(config))
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)
  (folder / "lock").write_text("" if lock is None else json.dumps(lock))


def step_line(step, **numbers):
  return {"step": step, "epoch": step / 10, "loss": 1.0, **numbers}


def test_a_row_for_each_run_the_newest_first(tmp_path):
  host = socket.gethostname()
  collapsed = [
    step_line(60, embedding_std=0.01),
    {"step": 60, "online/knn": 0.5},
  ]
  make_run(tmp_path / "old", collapsed)
  make_run(
    tmp_path / "group" / "new",
    [step_line(40), {"step": 40, "online/knn": 0.5, "final_knn": 0.75}],
    lock={"host": host, "pid": os.getppid()},
  )
  os.utime(tmp_path / "old" / "metrics.jsonl", (1e9, 1e9))
  new, old = listing.list_runs(str(tmp_path))
  assert new[:4] == ("group/new", "imsvd digits resnet8", "40", "4/8")
  assert new[5:] == ("warming up", "75.00%", "", "running")
  assert old.verdict == "collapsing (constant)"
  assert old.knn == "50.00%"
  assert old.running == ""
  assert len(listing.as_text([new, old]).splitlines()) == 3


@pytest.mark.parametrize(
  ("lock", "said"),
  [
    ({"host": "elsewhere", "pid": 1}, "running on elsewhere?"),
    ({"host": socket.gethostname(), "pid": 2**30}, ""),  # Killed.
    ([], ""),
  ],
)
def test_whether_a_run_goes_on_is_what_its_lock_says(tmp_path, lock, said):
  make_run(tmp_path / "a", lock=lock)
  (row,) = listing.list_runs(str(tmp_path))
  assert row.running == said


def test_a_run_with_damaged_files_is_listed(tmp_path):
  make_run(tmp_path / "a")
  (tmp_path / "a" / "config.json").write_text("{")
  (tmp_path / "a" / "metrics.jsonl").write_bytes(b"\xff\xfe{\n")
  make_run(tmp_path / "b", config=[1])
  make_run(tmp_path / "c", config={"epochs": "x", "objective": 3})
  (tmp_path / "c" / "metrics.jsonl").unlink()
  rows = listing.list_runs(str(tmp_path))
  assert {row.name for row in rows} == {"a", "b", "c"}
  assert {row.about for row in rows} == {"?"}


def test_a_run_that_logged_nothing_shows_what_is_saved(tmp_path):
  make_run(tmp_path / "a")
  (tmp_path / "a" / "checkpoints" / "2").mkdir(parents=True)
  (tmp_path / "a" / "checkpoints" / "1").mkdir()
  make_run(tmp_path / "b", [step_line(40)])
  (tmp_path / "b" / "checkpoints" / "20").mkdir(parents=True)
  steps = {row.name: row.step for row in listing.list_runs(str(tmp_path))}
  assert steps == {"a": "2", "b": "40"}


def test_no_runs_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match="No runs in"):
    listing.list_runs(str(tmp_path))
  with pytest.raises(UserError, match="is no folder"):
    listing.list_runs(str(tmp_path / "none"))


def test_the_command(tmp_path):
  make_run(tmp_path / "one", [step_line(40)])
  result = run_imsvd("runs", str(tmp_path))
  assert result.returncode == 0, result.stderr
  head, row = result.stdout.splitlines()
  assert head.startswith("run  objective, data, backbone  step")
  assert row.startswith("one  imsvd digits resnet8       40")
  again = run_imsvd("runs", f"--workdir={tmp_path}").stdout
  assert again.splitlines()[1].split()[:6] == row.split()[:6]
