"""Checkpoints survive kills, full disks and changed devices."""

import errno
import itertools
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
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from imsvd_jax.base import files as workdirs
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import (
  checkpointer,
  resume,
  run_directory,
  verification,
  weights,
)
from tests.runs.checkpoint_child import make_state, place, same
from tests.runs.made_runs import files_of, open_run, save_run

CHILD = pathlib.Path(__file__).with_name("checkpoint_child.py")


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


def mounts_allowed():
  """Returns a command that lets another one mount; skips where none may."""
  command = ["unshare", "--map-root-user", "--mount"]
  found = shutil.which("unshare")
  if not found or subprocess.run([*command, "true"]).returncode:
    pytest.skip("mounting is not allowed on this machine")
  return command


def test_small_disk_and_read_only_disk(tmp_path):
  mounting = mounts_allowed()
  script = (
    f"mount -t tmpfs -o size=4m tmpfs {tmp_path} &&"
    f" exec {sys.executable} {CHILD} small_disk {tmp_path}/run"
  )
  result = subprocess.run(
    [*mounting, "sh", "-c", script],
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


@pytest.mark.parametrize("name", ["exp [a] 1", "what?", "a*b", "back\\slash"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
  workdir = tmp_path / name / "run"
  for attempt in (open_run, workdirs.make):
    with pytest.raises(UserError, match=r"has .* in its path") as error:
      attempt(workdir)
    assert "\n" not in str(error.value)
  assert not (tmp_path / name).exists()


def test_a_run_that_was_moved_to_such_a_path_can_still_be_read(saved, tmp_path):
  moved = shutil.copytree(saved, tmp_path / "run [1]")
  assert weights.load_variables(moved).step == 2


def test_a_run_that_orbax_never_merged_is_rescued(run_copy, tmp_path, caplog):
  root = run_copy / "checkpoints"
  for step in root.iterdir():  # What Orbax leaves below a path with [ ].
    (step / "state" / "manifest.ocdbt").unlink()
    shutil.rmtree(step / "state" / "d")
  with pytest.raises(UserError, match=r"never merged.*copy .* merge"):
    weights.load_variables(run_copy)
  assert "never merged" in caplog.text
  verification.merge(run_copy)
  assert same(weights.load_variables(run_copy).params, make_state(2).params)


DAMAGE_WHILE_SAVING = {
  "manifest": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
  "meta": lambda step: (step / "meta" / "metadata").write_text("{}"),
  "leaves": lambda step: _replace_by_fewer(step / "state"),
  "all": shutil.rmtree,
}


def _replace_by_fewer(state):
  shutil.rmtree(state)
  other = state.parents[3] / "other"
  run = open_run(other)
  run.save(2, {"step": jnp.int32(2)})
  run.close()
  shutil.copytree(other / "checkpoints" / "2" / "state", state)


@pytest.mark.parametrize("what", DAMAGE_WHILE_SAVING)
def test_a_step_counts_once_it_was_found_whole(tmp_path, what):
  workdir = tmp_path / "run"
  run = open_run(workdir, keep_last=1)
  run.save(1, make_state(1))
  run.save(2, make_state(2))
  run._manager.wait_until_finished()
  DAMAGE_WHILE_SAVING[what](workdir / "checkpoints" / "2")
  with pytest.raises(UserError, match="Step 2 was not saved whole") as error:
    run.wait()
  assert "\n" not in str(error.value)
  run.close()
  run = open_run(workdir, keep_last=1)
  assert run.restore(make_state(0))[1] == 1
  run.close()


def test_a_step_under_another_ones_name_is_damage(run_copy, caplog):
  root = run_copy / "checkpoints"
  shutil.copytree(root / "1", root / "7")
  run = open_run(run_copy)
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))
  assert "checkpoint 7: it is a copy of step 1" in caplog.text
  for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
    (root / old).rename(root / new)
  before = files_of(run_copy)
  run = open_run(run_copy)
  with pytest.raises(UserError, match=r"\[2, 1\] damaged.*a copy of step 1"):
    run.restore(make_state(0))
  run.close()
  assert files_of(run_copy) == before


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_of_another_run_is_refused(run_copy, tmp_path, step):
  save_run(tmp_path / "other", [step])
  shutil.copytree(
    tmp_path / "other" / "checkpoints" / str(step),
    run_copy / "checkpoints" / str(step),
  )
  before = files_of(run_copy)
  run = open_run(run_copy)
  with pytest.raises(
    UserError, match=f"/{step} is a checkpoint of another run"
  ):
    run.restore(make_state(0))
  run.close()
  with pytest.raises(UserError, match="of another run"):
    weights.load_variables(run_copy / "checkpoints" / str(step))
  assert files_of(run_copy) == before


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"id": 1'])
def test_a_lost_id_is_found_in_the_steps(run_copy, content):
  path = run_copy / run_directory.RUN_FILE
  before = path.read_text()
  path.unlink()
  if content is not None:
    path.write_text(content)
  run = open_run(run_copy)
  assert run.restore(make_state(0))[1] == 2
  run.close()
  assert path.read_text() == before


@pytest.mark.parametrize(
  "error",
  [
    MemoryError(),
    TimeoutError(),
    PermissionError(errno.EACCES, "Permission denied"),
    *(
      OSError(number, os.strerror(number))
      for number in (errno.EMFILE, errno.ESTALE, errno.EIO, errno.EAGAIN)
    ),
    ValueError("UNAVAILABLE: the service is busy"),
    ValueError("Error reading local file: Input/output error"),
    RuntimeError("can't start new thread"),
  ],
  ids=str,
)
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("handler", ["Standard", "Json", "PyTree"])
def test_an_error_that_may_pass_is_not_damage(
  run_copy, monkeypatch, error, lasting, handler
):
  monkeypatch.setattr(verification, "_PAUSE_SECONDS", 0)
  run = open_run(run_copy)
  before = files_of(run_copy)
  owner = getattr(ocp, f"{handler}CheckpointHandler")
  restore = owner.restore
  errors = itertools.repeat(error) if lasting else iter([error])

  def restore_or_fail(*args, **kwargs):
    for one in errors:
      raise one
    return restore(*args, **kwargs)

  monkeypatch.setattr(owner, "restore", restore_or_fail)
  read = lambda: run.restore(make_state(0))[1]
  if handler == "PyTree":
    read = lambda: weights.load_variables(run_copy).step
  if lasting:
    with pytest.raises(UserError, match="It may be good") as caught:
      read()
    assert "\n" not in str(caught.value)
  else:
    assert read() == 2
  assert files_of(run_copy) == before
  run.close()


def test_what_may_not_be_seen_is_not_missing(run_copy, monkeypatch):
  """Without a permission os.path.exists says no, and so does Orbax."""
  hidden = str(run_copy / "checkpoints" / "2" / "meta" / "metadata")
  exists, os_open = os.path.exists, os.open

  def refuse(path, *args, **kwargs):
    if os.fspath(path) == hidden:
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return os_open(path, *args, **kwargs)

  monkeypatch.setattr(verification, "_PAUSE_SECONDS", 0)
  monkeypatch.setattr(os, "open", refuse)
  monkeypatch.setattr(
    os.path, "exists", lambda path: os.fspath(path) != hidden and exists(path)
  )
  before = files_of(run_copy)
  run = open_run(run_copy)
  for read in (
    lambda: run.restore(make_state(0)),
    lambda: weights.load_variables(run_copy),
  ):
    with pytest.raises(UserError, match=r"Permission denied.*may be good"):
      read()
  run.close()
  assert files_of(run_copy) == before


def test_a_listing_that_fails_does_not_begin_a_run_again(run_copy, monkeypatch):
  def fail(path):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(run_directory, "_PAUSE_SECONDS", 0)
  monkeypatch.setattr(os, "listdir", fail)
  with pytest.raises(UserError, match="Input/output error"):
    open_run(run_copy)
  with pytest.raises(UserError, match="Input/output error"):
    weights.load_variables(run_copy)


def test_a_reader_takes_the_next_step_when_the_run_deletes_one(
  run_copy, monkeypatch
):
  """With keep_last=1 every save deletes the step that a reader may read."""
  run = open_run(run_copy, keep_last=1)
  read_meta = verification.read_meta

  def read_too_late(directory):
    if directory.name in ("2", "3"):
      step = int(directory.name) + 1
      if run.latest_step() < step:
        monkeypatch.setattr(verification, "read_meta", read_meta)
        run.save(step, make_state(step))
        run.wait()
        monkeypatch.setattr(verification, "read_meta", read_too_late)
    return read_meta(directory)

  monkeypatch.setattr(verification, "read_meta", read_too_late)
  loaded = weights.load_variables(run_copy)
  assert loaded.step == 4
  assert same(loaded.params, make_state(4).params)
  with pytest.raises(UserError, match=r"no step 3; it holds \[4\]"):
    weights.load_variables(run_copy, 3)
  run.close()


def test_readers_leave_what_a_run_is_writing(run_copy):
  (run_copy / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
  (run_copy / run_directory.RUN_FILE).unlink()
  before = sorted(run_copy.rglob("*"))
  assert weights.load_variables(run_copy).step == 2
  assert resume.load_config(run_copy)
  assert sorted(run_copy.rglob("*")) == before


@pytest.mark.parametrize(
  "name", ["saved.txt", "run.json", "config.json", "write-test.tmp"]
)
@pytest.mark.parametrize("new", [True, False])
def test_a_folder_with_the_name_of_a_file_is_one_line(
  run_copy, tmp_path, name, new
):
  workdir = tmp_path / "new" if new else run_copy
  shutil.rmtree(workdir / name, ignore_errors=True)
  (workdir / name).unlink(missing_ok=True)
  (workdir / name).mkdir(parents=True)
  with pytest.raises(UserError, match=f"{name} is a folder") as error:
    open_run(workdir)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["loop", "dangling", "file"])
def test_what_is_no_step_but_named_like_one_is_set_aside(
  run_copy, what, caplog
):
  path = run_copy / "checkpoints" / "9"
  if what == "file":
    path.write_text("not a step")
  else:
    path.symlink_to("9" if what == "loop" else "nowhere")
  run = open_run(run_copy)
  assert run.restore(make_state(0))[1] == 2
  run.save(9, make_state(9))
  run.close()
  assert run.latest_step() == 9
  assert len(caplog.text.splitlines()) == 2  # Skipping it, and falling back.
  aside = run_copy / "checkpoints" / "damaged-9"
  assert aside.is_file() or aside.is_symlink()


@pytest.mark.proof
def test_a_storage_that_does_not_answer_ends_the_run(tmp_path):
  result = subprocess.run(
    [sys.executable, CHILD, "hang", tmp_path],
    env=environment(),
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert result.returncode == 4
  assert re.search(
    r"^error: Step 2 was not saved in .* within 0.05 minutes", result.stderr
  )
  assert weights.load_variables(tmp_path).step in (1, 2)


def run_pair(name, workdir, prefix=()):
  """Runs a function of the child in two processes; returns what they said."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    port = str(server.getsockname()[1])
  children = [
    subprocess.Popen(
      [*command, sys.executable, CHILD, name, workdir, port, str(index)],
      env=environment(devices=2),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for index, command in enumerate(((), prefix))
  ]
  outputs = [child.communicate(timeout=120) for child in children]
  for child, (_, err) in zip(children, outputs, strict=True):
    assert child.returncode == 0, err[-3000:]
  return [out for out, _ in outputs]


def test_two_processes_agree_on_the_step(tmp_path):
  """A step that one process cannot read is skipped by both, without a hang."""
  for out in run_pair("pair", tmp_path):
    assert "RESTORED 2" in out
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"1", "2", "3", "damaged-3"}


@pytest.mark.proof
def test_an_error_of_one_process_is_one_line_in_both(tmp_path):
  """Orbax alone waits for ever for a process whose save has failed."""
  mounting = mounts_allowed()
  workdir = tmp_path / "run"
  workdir.mkdir()
  script = f'mount --bind {workdir} {workdir} && exec "$@"'
  own = run_pair("failures", workdir, [*mounting, "sh", "-c", script, "sh"])
  reasons = {
    "SEPARATE": "share one --workdir",
    "TRANSIENT": "I/O error",
    "SAVE": "Too many open files",
    "BACKGROUND": "Read-only file system",
    "AT START": "Read-only file system",
  }
  for name, reason in reasons.items():
    for index, out in enumerate(own):
      assert re.search(f"^{name} 2 .*{reason}", out, re.M), (name, index, out)
    assert re.search(f"^{name} 2 .*Process 1: ", own[0], re.M), name
  assert "RESTORED 2" in own[0]
  names = {path.name for path in (workdir / "checkpoints").iterdir()}
  assert names == {"2", "4.orbax-checkpoint-tmp"}
