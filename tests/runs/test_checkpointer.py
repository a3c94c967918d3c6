"""Checkpoints survive damage, kills, full disks and changed devices."""

import errno
import gc
import json
import logging
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
from imsvd_jax.runs import checkpointer
from tests.runs.checkpoint_child import CONFIG, make_state, place, same

CHILD = pathlib.Path(__file__).with_name("checkpoint_child.py")


# When one array cannot be read, Orbax abandons the reads of the others, and
# they complain to an event loop that is closed by then.
pytestmark = pytest.mark.filterwarnings(
  "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module", autouse=True)
def no_abandoned_reads_left():
  """Lets the last of them complain here, where the filter holds."""
  yield
  time.sleep(0.2)
  gc.collect()


def open_run(workdir, **kwargs):
  return checkpointer.Checkpointer(
    workdir, **{"keep_last": 5, "config": CONFIG, **kwargs}
  )


def save_run(workdir, steps, **kwargs):
  run = open_run(workdir, **kwargs)
  for step in steps:
    assert run.save(step, make_state(step))
  run.close()


def files_of(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with steps 1 and 2; copy it before touching it."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  save_run(workdir, [1, 2])
  return workdir


@pytest.fixture
def run_copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


# ----------------------------------------------------------- save and restore


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
  assert checkpointer.load_config(tmp_path) == {"seed": 2}


@pytest.mark.parametrize("what", ["removed", "emptied", "damaged"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(run_copy, what):
  root = run_copy / "checkpoints"
  shutil.rmtree(root)
  left = "none"
  if what == "emptied":
    root.mkdir()
  elif what == "damaged":
    (root / "damaged-2").mkdir(parents=True)
    (run_copy / checkpointer.SAVED_FILE).unlink()  # A sign of its own.
    left = "only damaged-2"
  before = files_of(run_copy)
  with pytest.raises(UserError, match=f"holds {left}.*Put them back") as error:
    open_run(run_copy)
  assert "\n" not in str(error.value)
  assert files_of(run_copy) == before
  assert root.exists() == (what != "removed")


def test_a_run_is_marked_when_its_first_checkpoint_is_written(tmp_path):
  marker = tmp_path / checkpointer.SAVED_FILE
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


@pytest.mark.parametrize("keep", [{"keep_last": 0}, {"keep_every": -1}])
def test_retention_must_make_sense(tmp_path, keep):
  with pytest.raises(UserError, match="at least 1"):
    open_run(tmp_path, **keep)


# ------------------------------------------------------------------ checksums


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]
)
def test_checksum_sees_each_element_and_their_order(dtype):
  values = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
  checksum = int(checkpointer._summary(values)[0])
  for index in np.ndindex(values.shape):
    changed = values.copy()
    changed[index] = not changed[index] if dtype == "bool" else 77
    assert int(checkpointer._summary(changed)[0]) != checksum, index
  swapped = values.copy()
  swapped[0, :2] = swapped[0, 1::-1]
  assert int(checkpointer._summary(swapped)[0]) != checksum


def test_checksum_tells_zero_from_minus_zero_and_nan_from_nan():
  words = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001], np.uint32)
  values = words.view(np.float32)
  assert len({int(checkpointer._summary(v[None])[0]) for v in values}) == 4


def test_checksum_does_not_depend_on_the_devices():
  values = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharded = jax.device_put(values, jax.NamedSharding(mesh, jax.P("data")))
  assert np.array_equal(
    checkpointer._summary(values), checkpointer._summary(sharded)
  )


# --------------------------------------------------------------------- damage


def flip(position):
  def damage(path):
    data = bytearray(path.read_bytes())
    data[min(int(position * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(data)

  return damage


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
  "deleted": pathlib.Path.unlink,
  "truncated": truncate,
  "first byte": flip(0.0),
  "middle byte": flip(0.5),
  "last byte": flip(1.0),
}


def kind_of(path, step_directory):
  """The path without the random part of data files' names."""
  return re.sub("[0-9a-f]{32}", "*", str(path.relative_to(step_directory)))


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_the_newest_step(saved, tmp_path, how):
  """Any file: the state that comes back is right, or it is the older one."""
  newest = saved / "checkpoints" / "2"
  restored_steps = {}
  for number, path in enumerate(files_of(newest)):
    copy = shutil.copytree(saved, tmp_path / str(number))
    name = path.relative_to(saved)
    DAMAGE[how](copy / name)
    run = open_run(copy)
    restored, step = run.restore(make_state(0))
    run.close()
    assert same(restored, make_state(step)), name
    restored_steps.setdefault(kind_of(path, newest), set()).add(step)
    shutil.rmtree(copy)
  # The fallback was really exercised, and not by every harmless file.
  assert restored_steps["meta/metadata"] == {1}
  assert restored_steps["state/manifest.ocdbt"] == {1}
  data = [kind for kind in restored_steps if kind.endswith("/d/*")]
  assert any(1 in restored_steps[kind] for kind in data)


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_all_steps(saved, tmp_path, how):
  """Each kind of file in every step: right, or an error and nothing lost."""
  root = saved / "checkpoints"
  kinds = {kind_of(path, root / "2") for path in files_of(root / "2")}
  refused = set()
  for number, kind in enumerate(sorted(kinds)):
    copy = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
    for step in (copy / "checkpoints").iterdir():
      for path in files_of(step):
        if kind_of(path, step) == kind:
          DAMAGE[how](path)
    before = files_of(copy)
    run = open_run(copy)
    try:
      restored, step = run.restore(make_state(0))
    except UserError as error:
      refused.add(kind)
      message = str(error)
    else:
      assert same(restored, make_state(step)), kind
      continue
    finally:
      run.close()
    assert "No usable checkpoint" in message
    assert files_of(copy) == before
  assert {"meta/metadata", "state/manifest.ocdbt"} <= refused


def test_readable_but_wrong_content_is_damage(run_copy, caplog):
  """Step 1's arrays under step 2's name: only the checksums can tell."""
  root = run_copy / "checkpoints"
  shutil.rmtree(root / "2" / "state")
  shutil.copytree(root / "1" / "state", root / "2" / "state")
  run = open_run(run_copy)
  with caplog.at_level(logging.ERROR):
    restored, step = run.restore(make_state(0))
  run.close()
  assert step == 1
  assert same(restored, make_state(1))
  assert "SKIPPING damaged checkpoint 2: the checksum is wrong" in caplog.text
  assert "params/backbone/kernel" in caplog.text
  assert "FALLING BACK to step 1" in caplog.text


def test_damaged_step_is_set_aside_and_can_be_written_again(run_copy):
  root = run_copy / "checkpoints"
  for already in ("damaged-2", "damaged-2-2"):
    (root / already).mkdir()
  (root / "2" / "state" / "_METADATA").unlink()
  run = open_run(run_copy, keep_last=1)
  _, step = run.restore(make_state(0))
  assert step == run.latest_step() == 1
  assert (root / "damaged-2-3" / "meta" / "metadata").exists()
  assert run.save(2, make_state(2))
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))


def test_steps_without_commit_marker_do_not_start_from_scratch(run_copy):
  for path in run_copy.rglob("commit_success.txt"):
    path.unlink()
  run = open_run(run_copy)
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda state: state.replace(params={"backbone": {"kernel": state.step}}),
      r"params/backbone/kernel is float32\[32, 64\] in the checkpoint,"
      r" int32\[\] here; params/projector/bias is bfloat16\[16\]",
    ),
    (
      lambda state: state.replace(target={"params": state.params}),
      r"target/params/backbone/kernel is absent in the checkpoint, float32",
    ),
  ],
)
def test_another_shape_is_not_damage(run_copy, change, message):
  before = files_of(run_copy)
  run = open_run(run_copy)
  with pytest.raises(UserError, match=message):
    run.restore(change(make_state(0)))
  run.close()
  assert files_of(run_copy) == before


# ----------------------------------------------------------------- non-finite


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


# --------------------------------------------------------------------- config


def test_config_is_stored_with_the_run_and_with_each_step(tmp_path):
  run = open_run(tmp_path, config={"seed": 1, "scale": (0.1, 1.0)})
  expected = {"seed": 1, "scale": [0.1, 1.0]}
  assert checkpointer.load_config(tmp_path) == expected
  run.save(1, make_state(1))
  run.close()
  (tmp_path / "config.json").write_text("{damaged")
  assert checkpointer.load_config(tmp_path) == expected
  assert checkpointer.load_config(tmp_path / "checkpoints/1") == expected
  assert checkpointer.load_variables(tmp_path).config == expected


def test_config_follows_the_newest_step(tmp_path):
  save_run(tmp_path, [1], config={"seed": 1})
  save_run(tmp_path, [2], config={"seed": 2})
  assert checkpointer.load_config(tmp_path) == {"seed": 2}
  assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}
  (tmp_path / "checkpoints/2/meta/metadata").write_text("{}")
  assert checkpointer.load_config(tmp_path) == {"seed": 1}


def test_config_of_something_else_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no run's configuration"):
    checkpointer.load_config(tmp_path)


OLD = {"data": {"seed": 1, "crop": (0.2, 1.0)}, "log_every": 10, "gone": None}
NEW = {"data": {"seed": 2, "crop": [0.2, 1.0]}, "log_every": 50, "new": {}}


def test_changed_keys_are_named_and_refused(caplog):
  with pytest.raises(UserError) as caught:
    checkpointer.check_config(OLD, NEW, harmless=["log_every"])
  message = str(caught.value)
  assert "data.seed: 1 -> 2" in message
  assert "gone: null -> (absent)" in message
  assert "new: (absent) -> {}" in message
  allow = "('data.seed', 'gone', 'new')"
  assert message.endswith(f'--config.allow_changes="{allow}".')
  assert "crop" not in message
  assert "log_every" not in message


@pytest.mark.parametrize("allow", [["data", "gone", "new"], ["*"]])
def test_allowed_and_harmless_changes_are_logged(caplog, allow):
  with caplog.at_level(logging.INFO):
    changed = checkpointer.check_config(
      OLD, NEW, harmless=["log_every"], allow=allow
    )
  assert changed == ["data.seed", "gone", "log_every", "new"]
  assert "log_every: 10 -> 50 (harmless)" in caplog.text
  assert "data.seed: 1 -> 2 (allowed)" in caplog.text


def test_a_prefix_ends_at_a_dot():
  with pytest.raises(UserError, match="data\\.seed"):
    checkpointer.check_config(
      OLD, NEW, allow=["dat", "gone", "new", "log_every"]
    )
  assert checkpointer.check_config(OLD, OLD) == []


# -------------------------------------------------------------------- weights


@pytest.mark.parametrize("target", [False, True])
def test_variables_load_without_the_optimizer(tmp_path, target):
  state = make_state(4, target=target)
  run = open_run(tmp_path)
  run.save(4, place(state, jax.devices()))
  run.close()
  loaded = checkpointer.load_variables(tmp_path)
  assert loaded.step == 4
  assert loaded.config == CONFIG
  assert same(loaded.params, state.params)
  assert same(loaded.batch_stats, state.batch_stats)
  assert same(loaded.target, state.target)
  assert isinstance(loaded.params["backbone"]["kernel"], np.ndarray)


def test_variables_are_verified_and_the_run_is_left_alone(run_copy):
  root = run_copy / "checkpoints"
  shutil.rmtree(root / "2" / "state")
  shutil.copytree(root / "1" / "state", root / "2" / "state")
  before = files_of(run_copy)
  loaded = checkpointer.load_variables(run_copy)
  assert loaded.step == 1
  assert same(loaded.params, make_state(1).params)
  assert files_of(run_copy) == before
  with pytest.raises(UserError, match="No usable checkpoint"):
    checkpointer.load_variables(root / "2")


def test_variables_of_nothing_are_refused(tmp_path):
  with pytest.raises(UserError, match="holds no checkpoints"):
    checkpointer.load_variables(tmp_path / "absent")


def test_init_from_takes_the_weights_and_reports(run_copy):
  state = place(make_state(9), jax.devices())
  new = place(
    make_state(9).replace(
      params={
        "backbone": state.params["backbone"],
        "projector": {"bias": np.ones(3, np.float32), "extra": np.ones(2)},
      }
    ),
    jax.devices(),
  )
  new = new.replace(target={"params": new.params, "batch_stats": None})
  loaded, report = checkpointer.init_from(run_copy, new)
  stored = make_state(2)
  kernel = loaded.params["backbone"]["kernel"]
  assert np.array_equal(kernel, stored.params["backbone"]["kernel"])
  assert kernel.sharding == new.params["backbone"]["kernel"].sharding
  assert same(loaded.batch_stats, stored.batch_stats)
  assert same(loaded.params["projector"], new.params["projector"])
  assert same(loaded.target["params"], loaded.params)
  assert same(loaded.opt_state, new.opt_state)
  assert int(loaded.step) == 9
  assert report.step == 2
  assert report.loaded == [
    "batch_stats/backbone/mean",
    "params/backbone/kernel",
  ]
  assert report.not_loaded == [
    "params/projector/bias [3], there [16]",
    "params/projector/extra [2], there absent",
  ]
  assert str(report).splitlines() == [
    "step 2: 2 leaves loaded; 2 left as initialized; 0 of the other run unused",
    "  left as initialized: params/projector/bias [3], there [16]",
    "  left as initialized: params/projector/extra [2], there absent",
  ]


def test_init_from_reports_what_the_other_run_had_more(run_copy):
  state = make_state(9)
  state = state.replace(params={"backbone": state.params["backbone"]})
  _, report = checkpointer.init_from(run_copy / "checkpoints" / "1", state)
  assert report.step == 1
  assert report.unused == ["params/projector/bias"]
  assert str(report).endswith("\n  unused: params/projector/bias")
  other = state.replace(params={"head": jnp.ones(2)}, batch_stats={})
  with pytest.raises(UserError, match="Nothing in"):
    checkpointer.init_from(run_copy, other)


# ----------------------------------------------------------- disks, processes


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
  path = os.pathsep.join([str(CHILD.parents[1]), str(CHILD.parent)])
  return {**os.environ, "XLA_FLAGS": flag, "PYTHONPATH": path}


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
