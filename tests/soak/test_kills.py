"""Twenty kill -9 at random moments do not change the result.

  pytest -s -m slow tests/soak/test_kills.py

Starts the real command 22 times; docs/reliability.md has the measured time.
Each kill waits for progress of the run itself, never for a fixed time, and the
test fails after LIMIT_SECONDS.
"""

import collections
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from imsvd_jax.runs import metrics, verification, weights

ROOT = pathlib.Path(__file__).parents[2]
MOMENTS = ["start-up"] * 2 + ["step"] * 9 + ["save"] * 9
# Steps between a start and its kill: 20 times this is half of the run, which
# leaves the other half to machines that react late.
MOST_STEPS = 7
STEPS_PER_EPOCH = 3
LIMIT_SECONDS = 3600
FLAGS = (
  "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
)


class Run:
  """One start of the command on a workdir."""

  def __init__(self, workdir, cache, deadline):
    environ = {
      "JAX_COMPILATION_CACHE_DIR": str(cache),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "XLA_FLAGS": FLAGS,
    }
    self._workdir = workdir
    self._folder = workdir / "checkpoints"
    self._deadline = deadline
    self._log = workdir.with_suffix(".log")
    with self._log.open("w") as file:
      self._process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "imsvd_jax.main",
          "--config=tests/train_child.py:soak",
          f"--workdir={workdir}",
        ],
        cwd=ROOT,
        env={**os.environ, **environ},
        stderr=file,
      )

  def wait_until(self, condition):
    while not condition():
      text = self._log.read_text
      assert self._process.poll() is None, f"ended before its kill: {text()}"
      assert time.monotonic() < self._deadline, f"too slow: {text()}"
      time.sleep(0.001)

  def wait_for_the_first_step(self) -> int:
    """Returns the step that the run continues from."""
    self.wait_until(lambda: "Training to step" in self._log.read_text())
    found = re.search(
      r"Continuing from the checkpoint of step (\d+)", self._log.read_text()
    )
    start = int(found[1]) if found else 0
    self.wait_until(lambda: self.last_step() > start)
    return start

  def last_step(self) -> int:
    """The last step in the metrics; cheap, because it is polled."""
    path = self._workdir / metrics.METRICS_FILE
    if not path.exists():
      return 0
    with path.open("rb") as file:
      file.seek(max(0, path.stat().st_size - 4096))
      lines = file.read().split(b"\n")[:-1]  # The rest is an incomplete line.
    return json.loads(lines[-1])["step"] if lines else 0

  def saving(self) -> bool:
    return any(self._folder.glob("*.orbax-checkpoint-tmp"))

  def last_saved(self) -> int:
    return max(steps_of(self._workdir), default=0)

  def kill(self):
    self._process.send_signal(signal.SIGKILL)
    assert self._process.wait() == -signal.SIGKILL, self._log.read_text()

  def finish(self):
    seconds = max(1.0, self._deadline - time.monotonic())
    assert self._process.wait(seconds) == 0, self._log.read_text()


def kill_at(moment, run, rng):
  """Waits for the moment and a short random time, then kills."""
  if moment == "start-up":
    time.sleep(rng.uniform(0.0, 15.0))
  else:
    start = run.wait_for_the_first_step()
    step = start + rng.randint(1, MOST_STEPS)
    run.wait_until(lambda: run.last_step() >= step)
    if moment == "save":
      run.wait_until(run.saving)
    time.sleep(rng.uniform(0.0, 0.05))
  run.kill()


def steps_of(workdir):
  folder = workdir / "checkpoints"
  return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


def state_of(workdir):
  """The last step, and the checksum of each leaf of the state."""
  step = max(steps_of(workdir))
  meta = verification.read_meta(workdir / "checkpoints" / str(step))
  return step, meta["leaves"]


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
  begin = time.monotonic()
  deadline = begin + LIMIT_SECONDS
  start = lambda name: Run(tmp_path / name, tmp_path / "xla", deadline)
  start("never_killed").finish()
  rng = random.Random(0)
  moments = MOMENTS.copy()
  rng.shuffle(moments)
  seen = collections.Counter()
  lost = []
  for number, moment in enumerate(moments, 1):
    run = start("killed")
    kill_at(moment, run, rng)
    step, saved = run.last_step(), run.last_saved()
    # At a start-up, files of the previous kill may still exist.
    saving = moment != "start-up" and run.saving()
    lost.append(step - saved)
    seen["during a save"] += saving
    seen["in the middle of an epoch"] += bool(step % STEPS_PER_EPOCH)
    print(
      f"kill {number:2} ({moment}): at step {step}, saved {saved},"
      f" {'during a save' if saving else 'between saves'}"
    )
  assert seen["during a save"]
  assert seen["in the middle of an epoch"]
  start("killed").finish()
  killed, whole = tmp_path / "killed", tmp_path / "never_killed"
  assert state_of(killed) == state_of(whole)
  a, b = (weights.load_variables(workdir) for workdir in (killed, whole))
  assert a.target is not None
  for field in ("params", "batch_stats", "target"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(a, field), getattr(b, field)
    )
  read = lambda workdir: (workdir / metrics.METRICS_FILE).read_text()
  assert read(killed) == read(whole)
  what = ", ".join(f"{count} {name}" for name, count in seen.items())
  print(
    f"{len(moments)} kills: {what}; at most {max(lost)} steps repeated;"
    f" bit for bit the same, {time.monotonic() - begin:.0f} s in total."
  )
