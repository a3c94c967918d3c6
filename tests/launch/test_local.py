"""launch/local.sh with a stand-in for Python: processes, prefixes, signals.

tests/test_train_processes.py runs it for real.
"""

import os
import pathlib
import shlex
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "local.sh"

# `python -c ...` answers with a port; `python -m imsvd_jax.main ...` runs BODY.
STAND_IN = """#!/usr/bin/env bash
[ "$1" = -c ] && { echo 4242; exit; }
for argument; do
  case $argument in --process_id=*) process=${argument#*=} ;; esac
done
echo "$process runs: $*"
echo "$process warns" >&2
BODY
"""


@pytest.fixture
def launch(tmp_path):
  """Returns a function that starts the launcher with processes that do BODY."""
  started = []

  def start(body: str, *arguments: str, **environment: str):
    python = tmp_path / "python"
    python.write_text(STAND_IN.replace("BODY", body))
    python.chmod(0o755)
    environment = {
      **os.environ,
      "PYTHON": str(python),
      "JAX_PLATFORMS": "cpu",
      **environment,
    }
    process = subprocess.Popen(
      [str(SCRIPT), *arguments],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    return process

  yield start
  for process in started:
    if process.poll() is None:
      process.kill()
    process.communicate()


def test_every_process_runs_with_its_number(launch):
  process = launch("exit 0", "3", "configs/digits.py", "--config.seed=1")
  stdout, stderr = process.communicate(timeout=20)
  assert process.returncode == 0, stderr
  lines = sorted(stdout.splitlines())
  for number, line in enumerate(lines):
    assert line == (
      f"[{number}] {number} runs: -m imsvd_jax.main"
      " --config=configs/digits.py --coordinator_address=127.0.0.1:4242"
      f" --num_processes=3 --process_id={number} --config.seed=1"
    )
  assert sorted(stderr.splitlines()) == [f"[{i}] {i} warns" for i in range(3)]


def test_a_dry_run_prints_every_process_and_starts_none(launch):
  process = launch("exit 3", "--dry-run", "2", "configs/a b.py", "--x=1")
  stdout, stderr = process.communicate(timeout=60)
  assert process.returncode == 0, stderr
  lines = stdout.splitlines()
  assert len(lines) == 2
  for number, line in enumerate(lines):
    words = shlex.split(line.removeprefix("+ "))
    assert words[words.index("-m") :] == [
      "-m",
      "imsvd_jax.main",
      "--config=configs/a b.py",
      "--coordinator_address=127.0.0.1:4242",
      "--num_processes=2",
      f"--process_id={number}",
      "--x=1",
    ]


def test_one_that_fails_ends_the_others(launch):
  body = '[ "$process" = 1 ] && exit 3; exec sleep 60'
  start = time.monotonic()
  process = launch(body, "3", "configs/digits.py")
  _, stderr = process.communicate(timeout=20)
  assert process.returncode == 3
  assert "ended with code 3; ending all" in stderr
  assert time.monotonic() - start < 10


def test_one_that_does_not_listen_is_killed(launch):
  body = """
[ "$process" = 1 ] && { sleep 0.5; exit 3; }
trap '' TERM
for i in $(seq 300); do sleep 0.1; done
"""
  start = time.monotonic()
  process = launch(body, "2", "configs/digits.py")
  process.communicate(timeout=40)
  assert process.returncode == 3
  assert 4 < time.monotonic() - start < 20


def test_a_signal_reaches_every_process_which_may_take_its_time(launch):
  body = """
trap 'sleep 0.5; echo "$process saved"; exit 75' TERM
echo "$process ready"
for i in $(seq 300); do sleep 0.1; done
"""
  process = launch(body, "2", "configs/digits.py")
  seen = []
  while sum("ready" in line for line in seen) < 2:
    seen.append(process.stdout.readline())
  process.send_signal(signal.SIGTERM)
  stdout, _ = process.communicate(timeout=20)
  assert process.returncode == 75
  assert sorted(stdout.splitlines()) == ["[0] 0 saved", "[1] 1 saved"]


def test_gpus_are_shared_out(launch, tmp_path):
  smi = tmp_path / "nvidia-smi"
  smi.write_text("#!/bin/sh\necho GPU 0: A\necho GPU 1: B\n")
  smi.chmod(0o755)
  path = f"{tmp_path}:{os.environ['PATH']}"
  body = 'echo "$process sees ${CUDA_VISIBLE_DEVICES-all}"'
  for count, expected in [("2", {"0", "1"}), ("3", {"all"})]:
    process = launch(body, count, "c.py", PATH=path, JAX_PLATFORMS="")
    stdout, _ = process.communicate(timeout=20)
    sees = [x.split()[-1] for x in stdout.splitlines() if " sees " in x]
    assert set(sees) == expected


@pytest.mark.parametrize("arguments", [(), ("2",), ("two", "c.py"), ("0", "c")])
def test_wrong_arguments_say_what_was_expected(launch, arguments):
  process = launch("exit 0", *arguments)
  _, stderr = process.communicate(timeout=20)
  assert process.returncode == 2
  assert (
    "local.sh [--dry-run] N CONFIG" in stderr or "number of processes" in stderr
  )
