"""Checkpoints survive kills, full disks and changed devices."""

import errno
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import (
  checkpointer,
  resume,
  run_directory,
)
from tests.runs.checkpoint_child import make_state, place, same
from tests.runs.made_runs import files_of, open_run, save_run

CHILD = pathlib.Path(__file__).with_name("checkpoint_child.py")


# When one array cannot be read, Orbax abandons the reads of the others, and
# they complain to an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.parametrize("target", [False, True])
def test_restores_every_bit_with_its_sharding(tmp_path, target):
  state = place(make_state(7, target=target), jax.devices())
  run = open_run(tmp_path)
  assert run.save(7, state)
  restored, step = run.restore(state)
  run.close()
  assert step == 7
  assert same(restored, state)
  assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(
    lambda leaf: leaf.sharding, state
  )


@pytest.mark.parametrize("count", [1, 4])
def test_restores_on_another_number_of_devices(tmp_path, count):
  run = open_run(tmp_path)
  run.save(7, place(make_state(7), jax.devices()))
  like = place(make_state(0), jax.devices()[:count])
  abstract = jax.tree.map(checkpointer._abstract, like)
  restored, _ = run.restore(abstract)
  run.close()
  assert same(restored, make_state(7))
  kernel = restored.opt_state[0]["trace"]["backbone"]["kernel"]
  assert len(kernel.sharding.device_set) == count


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  overwrite = jax.jit(
    lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0
  )
  run = open_run(tmp_path)
  state = make_state(1, size=8192)
  run.save(1, state)
  overwrite(state.params)
  restored, _ = run.restore(make_state(0, size=8192))
  run.close()
  assert same(restored, make_state(1, size=8192))


def test_workdir_without_checkpoints_restores_none(tmp_path):
  strays = [
    tmp_path / "checkpoints" / f"{step}.orbax-checkpoint-tmp" for step in (5, 9)
  ]
  for stray in strays:
    (stray / "state").mkdir(parents=True)
  run = open_run(tmp_path)
  assert run.restore(make_state(0)) is None
  assert run.latest_step() is None
  assert run.save(5, make_state(5))
  run.close()
  assert run.latest_step() == 5
  assert not any(stray.exists() for stray in strays)


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path):
  for seed in (1, 2):  # Between two starts one may mend the config, too.
    run = open_run(tmp_path, config={"seed": seed})
    assert run.restore(make_state(0)) is None
    run.close()
  assert resume.load_config(tmp_path) == {"seed": 2}


@pytest.mark.parametrize("what", ["removed", "emptied", "damaged"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(run_copy, what):
  root = run_copy / "checkpoints"
  shutil.rmtree(root)
  left = "none"
  if what == "emptied":
    root.mkdir()
  elif what == "damaged":
    (root / "damaged-2").mkdir(parents=True)
    (run_copy / run_directory.SAVED_FILE).unlink()  # A sign of its own.
    left = "only damaged-2"
  before = files_of(run_copy)
  with pytest.raises(UserError, match=f"holds {left}.*Put them back") as error:
    open_run(run_copy)
  assert "\n" not in str(error.value)
  assert files_of(run_copy) == before
  assert root.exists() == (what != "removed")


def test_a_run_is_marked_when_its_first_checkpoint_is_written(tmp_path):
  marker = tmp_path / run_directory.SAVED_FILE
  run = open_run(tmp_path)
  run.save(1, make_state(1))
  assert not marker.exists()
  run.wait()
  assert marker.exists()
  run.close()
  marker.unlink()  # Killed just before it was written.
  open_run(tmp_path).close()
  assert marker.exists()


def test_keeps_the_last_and_every_mth(tmp_path):
  save_run(tmp_path, range(1, 8), keep_last=2, keep_every=3)
  kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"3", "6", "7"}


def test_saving_the_same_step_again_is_no_error(run_copy):
  run = open_run(run_copy)
  assert run.save(2, make_state(2))
  with pytest.raises(UserError, match="newer than the step 1"):
    run.save(1, make_state(1))
  run.close()


def test_restores_a_named_step_and_no_other(run_copy):
  run = open_run(run_copy)
  restored, step = run.restore(make_state(0), step=1)
  assert step == 1
  assert same(restored, make_state(1))
  with pytest.raises(UserError, match=r"no step 3; it holds \[1, 2\]"):
    run.restore(make_state(0), step=3)
  (run_copy / "checkpoints/2/meta/metadata").unlink()
  with pytest.raises(UserError, match=r"\[2\] damaged"):
    run.restore(make_state(0), step=2)
  run.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_state_is_never_written(run_copy, bad, caplog):
  state = make_state(3)
  kernel = state.params["backbone"]["kernel"].at[3, 5].set(bad)
  params = {**state.params, "backbone": {"kernel": kernel}}
  run = open_run(run_copy)
  assert run.save(3, state.replace(params=params)) is False
  assert "NOT saving step 3" in caplog.text
  assert "params/backbone/kernel" in caplog.text
  assert run.latest_step() == 2
  best_so_far = ({"trace": state.params}, (), {"count": jnp.float32(np.inf)})
  assert run.save(3, state.replace(opt_state=best_so_far)) is True
  run.close()


def with_cause(error, cause):
  error.__cause__ = cause
  return error


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device"),
    with_cause(RuntimeError("save"), OSError(errno.ENOSPC, "full")),
  ],
)
def test_full_disk_is_explained(run_copy, monkeypatch, error):
  """The fallback for machines that forbid a mount: the error is injected."""
  run = open_run(run_copy)

  def fail(*args, **kwargs):
    raise error

  monkeypatch.setattr(run._manager, "save", fail)
  with pytest.raises(UserError, match="No space left on device") as caught:
    run.save(3, make_state(3))
  assert "already there are intact" in str(caught.value)
  _, step = run.restore(make_state(0))
  assert step == 2
  run.close()


def test_other_errors_are_not_disguised_as_disk_errors(tmp_path, monkeypatch):
  run = open_run(tmp_path)
  with pytest.raises(AttributeError):
    run.save(1, {"a": "not an array"})
  run.close()


def test_removed_workdir_is_not_made_again(run_copy):
  run = open_run(run_copy)
  shutil.rmtree(run_copy)
  with pytest.raises(UserError, match="was removed while the run"):
    run.save(3, make_state(3))
  run.close()
  assert not run_copy.exists()


def test_workdir_that_is_a_file_is_explained(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match=r"Not a directory|File exists"):
    open_run(tmp_path / "file")


def test_saving_does_not_ask_the_preemption_service(tmp_path, monkeypatch):
  """It would answer for an old step and lose the notice."""
  asked = []
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", asked.append
  )
  save_run(tmp_path, [1, 2])
  assert asked == []


def environment(devices=1):
  flag = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": str(CHILD.parents[2])}


def test_kill_during_a_save_keeps_the_previous(tmp_path):
  command = [sys.executable, CHILD, "save_forever", tmp_path]
  with subprocess.Popen(
    command, env=environment(), stdout=subprocess.PIPE, text=True
  ) as child:
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/4.orbax-checkpoint-tmp")):
      assert child.poll() is None
      assert time.monotonic() < deadline
    child.kill()
  assert list(tmp_path.glob("checkpoints/*.orbax-checkpoint-tmp"))
  run = open_run(tmp_path)
  restored, step = run.restore(make_state(0, size=8192))
  run.close()
  assert step >= 3
  assert same(restored, make_state(step, size=8192))


def test_small_disk_and_read_only_disk(tmp_path):
  may_mount = ["unshare", "--map-root-user", "--mount", "true"]
  if not shutil.which("unshare") or subprocess.run(may_mount).returncode:
    pytest.skip("mounting a small tmpfs is not allowed on this machine")
  script = (
    f"mount -t tmpfs -o size=4m tmpfs {tmp_path} &&"
    f" exec {sys.executable} {CHILD} small_disk {tmp_path}/run"
  )
  result = subprocess.run(
    [*may_mount[:-1], "sh", "-c", script],
    env=environment(),
    capture_output=True,
    text=True,
    timeout=120,
  )
  out = result.stdout
  assert result.returncode == 0, result.stderr[-3000:]
  assert re.search("FULL Cannot write a checkpoint.*No space left", out), out
  assert re.search("RESTORED [1-9]", out), out
  assert re.search("READONLY Cannot .*Read-only file system", out), out
  assert re.search("AT START Cannot .*Read-only file system", out), out
  assert re.search("LOADED [1-9]", out), out


def test_two_processes_agree_on_the_step(tmp_path):
  """A step that one process cannot read is skipped by both, without a hang."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    port = str(server.getsockname()[1])
  children = [
    subprocess.Popen(
      [sys.executable, CHILD, "pair", tmp_path, port, str(index)],
      env=environment(devices=2),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [child.communicate(timeout=120) for child in children]
  for child, (out, err) in zip(children, outputs, strict=True):
    assert child.returncode == 0, err[-3000:]
    assert "RESTORED 2" in out
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2", "3", "damaged-3"}
