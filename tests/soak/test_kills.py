"""Twenty kill -9 at random moments change nothing.

  pytest -m slow tests/soak

About 5 minutes on two idle cores; every wait is bounded.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imsvd_jax import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[2]
KILLS = 20
MOST_STEPS = 60  # Between two kills: 20 times this is less than the run.
SECONDS = 600


def start(workdir, cache):
  environ = {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "imsvd_jax.main",
      "--config=tests/train_child.py:soak",
      f"--workdir={workdir}",
    ],
    cwd=ROOT,
    env={**os.environ, **environ},
    stderr=subprocess.DEVNULL,
  )


def wait_until(condition, process):
  deadline = time.monotonic() + SECONDS
  while not condition():
    assert process.poll() is None, "the run ended before it was killed"
    assert time.monotonic() < deadline
    time.sleep(0.002)


def last_step(workdir):
  lines = metrics.read_metrics(str(workdir))
  return lines[-1]["step"] if lines else 0


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
  rng = random.Random(0)
  workdir = tmp_path / "killed"
  folder = workdir / "checkpoints"
  step = during_saves = 0
  for kill in range(KILLS):
    process = start(workdir, tmp_path / "xla")
    step += rng.randint(1, MOST_STEPS)
    wait_until(lambda: last_step(workdir) >= step, process)  # noqa: B023
    saving = lambda: any(folder.glob("*.orbax-checkpoint-tmp"))
    if kill % 2:
      wait_until(saving, process)
    else:
      time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    during_saves += saving()
    step = max(checkpoint.ocp.utils.checkpoint_steps(folder), default=0)
    print(f"kill {kill + 1}: step {last_step(workdir)}, saved {step}")
  assert during_saves > 0
  for finished in (workdir, tmp_path / "never_killed"):
    assert start(finished, tmp_path / "xla").wait(SECONDS) == 0
  killed, whole = (
    checkpoint.load_variables(w) for w in (workdir, tmp_path / "never_killed")
  )
  jax.tree.map(np.testing.assert_array_equal, killed.params, whole.params)
  jax.tree.map(
    np.testing.assert_array_equal, killed.batch_stats, whole.batch_stats
  )
  read = lambda w: (w / metrics.METRICS_FILE).read_text()
  assert read(workdir) == read(tmp_path / "never_killed")
  print(f"{KILLS} kills, {during_saves} during saves: bit for bit the same.")
