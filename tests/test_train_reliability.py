"""A run survives kills, signals, NaN, bad disks and dead peers."""

import contextlib
import dataclasses
import errno
import gc
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from imsvd_jax import data
from imsvd_jax.base import devices, errors
from imsvd_jax.base.config import HARMLESS_KEYS, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import (
  checkpointer,
  log_lines,
  metrics,
  verification,
  weights,
)
from imsvd_jax.train import train_and_evaluate
from imsvd_jax.training import step as step_lib
from tests import breaking_objective
from tests.runs import fake_bucket
from tests.train_child import small_config

ROOT = pathlib.Path(__file__).parents[1]
CHILD = ROOT / "tests" / "train_child.py"
SECONDS = 900  # A busy machine compiles slowly; each wait ends long before.


@pytest.fixture(scope="module", autouse=True)
def no_abandoned_writes_left():
  """Lets the last of them complain here, where the filter holds."""
  yield
  time.sleep(0.2)
  gc.collect()


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  """Lets all runs here, in this process and others, compile only once."""
  folder = str(tmp_path_factory.mktemp("xla"))
  settings = {
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="module", autouse=True)
def traced_once():
  """Lets the runs of this process that compute the same share their step."""
  jit_train_step, steps = step_lib.jit_train_step, {}

  def shared(experiment, sharding):
    config = {
      name: value
      for name, value in flatten(experiment.config).items()
      if name.partition(".")[0] not in HARMLESS_KEYS
    }
    key = (repr(sorted(config.items())), experiment.objective, sharding)
    if key not in steps:
      steps[key] = jit_train_step(experiment, sharding)
    return steps[key]

  with mock.patch.object(step_lib, "jit_train_step", shared):
    yield


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("never_stopped")
  train_and_evaluate(small_config(), str(workdir))
  return workdir


@pytest.fixture
def finished(never_stopped, tmp_path):
  """A copy of a run to damage, to continue, or to continue otherwise."""
  return pathlib.Path(shutil.copytree(never_stopped, tmp_path / "finished"))


def leaves_of(workdir, step=None):
  variables = weights.load_variables(workdir, step)
  return jax.tree.leaves((variables.params, variables.batch_stats))


def checksums_of(workdir):
  """Of every leaf of the newest state: optimizer, key and counts too."""
  newest = workdir / "checkpoints" / str(steps_of(workdir)[-1])
  return verification.read_meta(newest)["leaves"]


def assert_same_run(left, right):
  for a, b in zip(leaves_of(left), leaves_of(right), strict=True):
    np.testing.assert_array_equal(a, b)
  assert checksums_of(left) == checksums_of(right)
  read = lambda path: (path / metrics.METRICS_FILE).read_text()
  assert read(left) == read(right)


def steps_of(workdir):
  folder = workdir / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def files_of(workdir):
  return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def at_step(monkeypatch, step, action):
  """Does something, once, while a run is at a step."""
  call = log_lines.StepLog.add
  actions = [action]

  def call_and_act(self, now, *args, **kwargs):
    call(self, now, *args, **kwargs)
    if now == step and actions:
      actions.pop()()

  monkeypatch.setattr(log_lines.StepLog, "add", call_and_act)


# --- Exact resume ------------------------------------------------------------


@pytest.mark.proof
def test_a_run_killed_twice_ends_as_if_never_stopped(
  never_stopped, compiled, tmp_path
):
  """In the middle of an epoch, during a save, and to the end."""
  for moment in ("step:5", "saving:8", "never"):
    result = subprocess.run(
      [sys.executable, str(CHILD), str(tmp_path), moment],
      cwd=ROOT,
      env={**os.environ, **compiled, "PYTHONPATH": str(ROOT)},
      capture_output=True,
      text=True,
      timeout=SECONDS,
      check=False,
    )
    expected = 0 if moment == "never" else -signal.SIGKILL
    assert result.returncode == expected, result.stderr
    assert moment != "saving:8" or steps_of(tmp_path)[-1] == 6
  assert "Continuing from the checkpoint of step 6" in result.stderr
  assert_same_run(never_stopped, tmp_path)


def test_an_interrupt_stops_after_the_step_and_the_run_goes_on(
  never_stopped, tmp_path, monkeypatch, capsys
):
  at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
  with pytest.raises(errors.Stopped) as stopped:
    train_and_evaluate(small_config(), str(tmp_path))
  assert stopped.value.code == 75
  saved = steps_of(tmp_path)[-1]
  assert 3 <= saved < 9  # A thread hears it, soon.
  said = capsys.readouterr().err
  assert "SIGINT: saving after the step under way" in said
  assert f"step {saved} is saved. The same command resumes." in said
  train_and_evaluate(small_config(), str(tmp_path))
  assert f"from the checkpoint of step {saved}." in capsys.readouterr().err
  assert_same_run(never_stopped, tmp_path)


@pytest.mark.proof
@pytest.mark.parametrize(
  ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)]
)
def test_a_command_ends_at_the_first_signal_before_its_first_step(
  tmp_path, number, code
):
  words = ["--config=configs/digits.py:debug", f"--workdir={tmp_path / 'run'}"]
  with subprocess.Popen(
    [sys.executable, "-m", "imsvd_jax.main", *words],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    # Compiles the first weights from here on.
    while not process.stderr.readline().startswith("A new run"):
      assert process.poll() is None
    process.send_signal(number)
    _, said = process.communicate(timeout=SECONDS)
  assert process.returncode == code
  assert f"{number.name} before the first step: nothing to save" in said
  assert "Traceback" not in said


@pytest.mark.proof
def test_a_run_in_a_bucket_is_stopped_and_goes_on(
  never_stopped, tmp_path, monkeypatch
):
  fake_bucket.install(monkeypatch, tmp_path / "buckets")
  workdir = "gs://bucket/some/run"
  at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
  with pytest.raises(errors.Stopped):
    train_and_evaluate(small_config(), workdir)
  train_and_evaluate(small_config(), workdir)
  assert_same_run(never_stopped, tmp_path / "buckets" / "bucket/some/run")


@pytest.mark.proof
def test_fewer_devices_change_nothing_but_the_rounding(
  never_stopped, finished, monkeypatch, capsys
):
  for step in (8, 9):
    shutil.rmtree(finished / "checkpoints" / str(step))
  make_mesh = devices.make_mesh
  monkeypatch.setattr(
    devices, "make_mesh", lambda d=None: make_mesh((d or jax.devices())[:4])
  )
  train_and_evaluate(small_config(), str(finished))
  said = capsys.readouterr().err
  assert "Devices: 4 x cpu" in said
  assert "Continuing from the checkpoint of step 6." in said
  for a, b in zip(leaves_of(finished), leaves_of(never_stopped), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  here, there = (
    metrics.read_metrics(str(w)) for w in (finished, never_stopped)
  )
  assert [line["step"] for line in here] == [line["step"] for line in there]
  for a, b in zip(here, there, strict=True):
    assert a == pytest.approx(b, rel=1e-3, abs=0.1 if "knn" in a else 1e-4)


@pytest.mark.proof
def test_a_run_starts_from_what_fits_of_another_ones_weights(
  never_stopped, tmp_path, capsys
):
  """Another objective and another width: the log says what stayed behind."""
  config = small_config(
    **{
      "init_from": str(never_stopped),
      "objective.name": "vicreg",
      "model.projector": (32, 48),
      "epochs": 1 / 3,
      "optimizer.base_learning_rate": 0.0,
      "eval.every_epochs": 0.0,
    }
  )
  state = train_and_evaluate(config, str(tmp_path))
  said = capsys.readouterr().err
  theirs = weights.load_variables(never_stopped)
  jax.tree.map(
    np.testing.assert_array_equal,
    state.params["backbone"],
    theirs.params["backbone"],
  )
  assert int(state.step) == 1
  backbone = len(jax.tree.leaves(theirs.params["backbone"]))
  loaded = re.search(r"step 9: (\d+) leaves loaded; (\d+) left as init", said)
  assert loaded, said
  assert int(loaded[1]) > backbone
  assert int(loaded[2]) > 0
  pattern = r"left as initialized: params/projector/\S+ (.*), there (.*)"
  assert ("[32, 48]", "[32, 64]") in re.findall(pattern, said)
  train_and_evaluate(config, str(tmp_path))
  assert "init_from is ignored" in capsys.readouterr().err


def test_weights_of_nothing_are_one_clear_line(tmp_path):
  config = small_config(init_from=str(tmp_path / "absent"))
  with pytest.raises(UserError, match="absent: found nothing"):
    train_and_evaluate(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_a_changed_config_is_refused_unless_allowed(finished, capsys):
  with pytest.raises(UserError, match="seed: 0 -> 1"):
    train_and_evaluate(small_config(seed=1), str(finished))
  state = train_and_evaluate(
    small_config(seed=1, allow_changes=("seed",)), str(finished)
  )
  assert int(state.step) == 9
  wide = {"model.projector": (32, 48), "objective.imsvd.num_bins": 6}
  before = files_of(finished / "checkpoints")
  with pytest.raises(UserError, match=r"does not fit.*\[32, 64\].*\[32, 48\]"):
    train_and_evaluate(
      small_config(**wide, allow_changes=("*",)), str(finished)
    )
  assert files_of(finished / "checkpoints") == before


def test_other_images_are_refused_unless_allowed(finished, monkeypatch):
  """An image more, and every epoch would have another order."""
  make_source = data.make_source
  monkeypatch.setattr(
    data,
    "make_source",
    lambda *args: dataclasses.replace(make_source(*args), num_examples=40),
  )
  with pytest.raises(UserError, match="images_found: 48 -> 40"):
    train_and_evaluate(small_config(), str(finished))
  state = train_and_evaluate(
    small_config(allow_changes=("images_found",)), str(finished)
  )
  assert int(state.step) == 9


# --- Checkpoints -------------------------------------------------------------


def test_damage_costs_steps_and_never_the_run(
  never_stopped, finished, tmp_path, caplog
):
  steps = [finished / "checkpoints" / str(step) for step in (6, 8, 9)]
  (steps[2] / "state" / "manifest.ocdbt").write_bytes(b"damaged")
  train_and_evaluate(small_config(), str(finished))
  assert "SKIPPING damaged checkpoint 9" in caplog.text
  assert "FALLING BACK to step 8" in caplog.text
  assert_same_run(never_stopped, finished)
  for step in steps:
    (step / "meta" / "metadata").unlink()
  before = files_of(finished)
  with pytest.raises(UserError, match=r"No usable .*\[9, 8, 6\] damaged"):
    train_and_evaluate(small_config(), str(finished))
  assert files_of(finished) == before


def test_minutes_count_too_and_no_other_step_waits_for_the_host(
  tmp_path, monkeypatch
):
  """Between logs and saves, nothing that a step returned is looked at."""
  jit_train_step = step_lib.jit_train_step

  class Untouchable:
    def __getattr__(self, name):
      raise AssertionError(f"the host asked for {name}")

  def returns_untouchables(*args):
    step, states = jit_train_step(*args), {}

    def train_step(state, batch):
      state, values = step(states.pop("newest", state), batch)
      states["newest"] = state
      if int(state.step) % 3:
        return Untouchable(), Untouchable()
      return state, values

    return train_step

  monkeypatch.setattr(step_lib, "jit_train_step", returns_untouchables)
  # The console's lines are by the clock.
  monkeypatch.setattr(log_lines.StepLog, "_print_is_due", lambda self: False)
  config = small_config(
    **{
      "log.every_steps": 3,
      "checkpoint.every_steps": 100,
      "checkpoint.every_minutes": 0.0,
      "eval.every_epochs": 0.0,
    }
  )
  train_and_evaluate(config, str(tmp_path))
  assert steps_of(tmp_path) == [3, 6, 9]


# --- Numbers that go wrong ---------------------------------------------------


@pytest.mark.proof
def test_stop_stops_and_skip_goes_on_from_there(tmp_path, monkeypatch, capsys):
  config = breaking_objective.config(monkeypatch)
  config.not_finite.policy = "stop"
  with pytest.raises(errors.Stopped) as stopped:
    train_and_evaluate(config, str(tmp_path))
  assert stopped.value.code == 3
  error = capsys.readouterr().err
  assert re.search(r"between steps 5 and [56]\b", error), error
  assert "not finite: gradient_norm, loss, variance" in error
  assert steps_of(tmp_path) == [2, 4]
  # Two in a row is one too many here, and the log names them.
  config.not_finite.policy = "skip"
  config.not_finite.max_in_a_row = 1
  with pytest.raises(errors.Stopped) as stopped:
    train_and_evaluate(config, str(tmp_path))
  assert stopped.value.code == 3
  error = capsys.readouterr().err
  assert "2 in a row, not_finite.max_in_a_row=1" in error
  assert steps_of(tmp_path) == [2, 4]
  config.not_finite.max_in_a_row = 2
  state = train_and_evaluate(config, str(tmp_path))
  assert int(state.skips.total) == 3
  assert all(np.isfinite(leaf).all() for leaf in leaves_of(tmp_path))
  lines = metrics.read_metrics(str(tmp_path))
  assert [line["skipped"] for line in lines] == [0, 0, 0, 0, 1, 2, 2, 3, 3]
  assert "WARNING: 1 update(s) were not finite" in capsys.readouterr().err


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch, capsys):
  """What the checks of the step miss, the check of the save does not."""
  jit_train_step = step_lib.jit_train_step

  def overflows(*args):
    step = jit_train_step(*args)

    def train_step(state, batch):
      state, values = step(state, batch)
      if int(state.step) == 4:  # A finite gradient, and a step too long.
        params = jax.tree.map(lambda leaf: leaf + jnp.inf, state.params)
        state = state.replace(params=params)
      return state, values

    return train_step

  monkeypatch.setattr(step_lib, "jit_train_step", overflows)
  with pytest.raises(errors.Stopped) as stopped:
    train_and_evaluate(small_config(), str(tmp_path))
  assert stopped.value.code == 3
  assert "step 4 is not finite and was not saved" in capsys.readouterr().err
  assert steps_of(tmp_path) == [2]


# --- Disks -------------------------------------------------------------------


def mount(*arguments):
  result = subprocess.run(
    ["mount", *arguments], capture_output=True, check=False
  )
  if result.returncode:
    pytest.skip(f"this machine forbids mount: {result.stderr.decode()}")


@pytest.fixture
def small_disk(tmp_path):
  mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path))
  yield tmp_path
  subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fails_with_one_line(workdir, **overrides):
  with pytest.raises(UserError) as error:
    train_and_evaluate(small_config(**overrides), str(workdir))
  assert "\n" not in str(error.value)
  return str(error.value)


def fill(path):
  """Leaves no room on the disk."""
  with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
    while file.write(bytes(4096)):
      pass


@pytest.mark.proof
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(
  never_stopped, small_disk, monkeypatch
):
  """A disk of eight megabytes, which somebody else fills."""
  filler = small_disk / "filler"
  at_step(monkeypatch, 5, lambda: fill(filler))
  assert "No space left on device" in fails_with_one_line(small_disk / "run")
  saved = steps_of(small_disk / "run")
  assert saved[-1] in (2, 4)  # That of step 4 was perhaps being written.
  assert leaves_of(small_disk / "run")
  filler.unlink()
  train_and_evaluate(small_config(), str(small_disk / "run"))
  assert_same_run(never_stopped, small_disk / "run")


@pytest.mark.proof
def test_an_error_of_the_disk_ends_the_run_and_it_goes_on(
  never_stopped, tmp_path, monkeypatch
):
  """The same, injected: a machine may forbid the mount that comes before."""
  save = checkpointer.Checkpointer.save

  def full_at_6(self, step, *args):
    if step == 6:
      error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      monkeypatch.setattr(self._manager, "save", mock.Mock(side_effect=error))
    return save(self, step, *args)

  monkeypatch.setattr(checkpointer.Checkpointer, "save", full_at_6)
  assert "No space left on device" in fails_with_one_line(tmp_path)
  assert steps_of(tmp_path) == [2, 4]
  monkeypatch.undo()
  train_and_evaluate(small_config(), str(tmp_path))
  assert_same_run(never_stopped, tmp_path)


def test_checkpoints_that_become_read_only_end_the_run(small_disk, monkeypatch):
  workdir = small_disk / "run"
  folder = str(workdir / "checkpoints")

  def make_read_only():
    mount("--bind", folder, folder)  # A disk with open files cannot become so.
    mount("-o", "remount,bind,ro", folder)

  at_step(monkeypatch, 5, make_read_only)
  assert "Read-only file system" in fails_with_one_line(workdir)
  # The next time it is seen before anything is compiled.
  monkeypatch.setattr(step_lib, "init_state", None)
  assert "Read-only file system" in fails_with_one_line(workdir)
  assert steps_of(workdir)[-1] in (2, 4)  # The latter was being written.
  assert leaves_of(workdir)


def test_metrics_that_cannot_be_written_end_the_run(tmp_path, monkeypatch):
  write = metrics.MetricWriter.write

  def fill_the_disk(self, step, *args, **kwargs):
    if step == 5:
      self._lines.file.close()
      self._lines.file = open("/dev/full", "w")  # noqa: SIM115
    write(self, step, *args, **kwargs)

  monkeypatch.setattr(metrics.MetricWriter, "write", fill_the_disk)
  message = fails_with_one_line(tmp_path)
  assert message.startswith("Cannot write the metrics in")
  assert "No space left on device" in message
  assert steps_of(tmp_path) == [2, 4]


def test_a_removed_workdir_ends_the_run(tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  at_step(monkeypatch, 5, lambda: shutil.rmtree(workdir, True))
  assert "was removed while" in fails_with_one_line(workdir)


# --- Signals and peers: the real command -------------------------------------


ONE_DEVICE = {
  "XLA_FLAGS": "--xla_force_host_platform_device_count=1"
  " --xla_backend_optimization_level=0"
}


@pytest.fixture
def start(compiled, tmp_path):
  """start(*flags) starts a run of ever so many steps in tmp_path / "run"."""
  processes = []

  def start(*flags):
    log = tmp_path / f"{len(processes)}.log"
    with log.open("w") as file:
      process = subprocess.Popen(
        [
          sys.executable,
          "-m",
          "imsvd_jax.main",
          "--config=tests/train_child.py",
          f"--workdir={tmp_path / 'run'}",
          *flags,
        ],
        cwd=ROOT,
        env={**os.environ, **compiled, **ONE_DEVICE},
        stderr=file,
      )
    process.log = log
    processes.append(process)
    return process

  yield start
  for process in processes:
    process.kill()
    process.wait()


@pytest.fixture
def start_pair(start):
  """Starts two processes of one run."""

  def start_pair():
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    flags = (f"--coordinator_address=127.0.0.1:{port}", "--num_processes=2")
    return [start(*flags, f"--process_id={i}") for i in range(2)]

  return start_pair


def wait_for_checkpoint(workdir, *processes, after=0):
  """Waits until the run has saved a step, later than `after`."""
  deadline = time.monotonic() + SECONDS
  while time.monotonic() < deadline:
    for process in processes:
      assert process.poll() is None, process.log.read_text()
    if (workdir / "checkpoints").exists() and max(
      steps_of(workdir), default=0
    ) > after:
      return
    time.sleep(0.1)
  raise AssertionError(f"nothing saved: {said(processes)}")


def last_saved_is_last_written(workdir):
  """Whether nothing that was done was lost."""
  return steps_of(workdir)[-1] == metrics.read_metrics(str(workdir))[-1]["step"]


@pytest.mark.proof
def test_a_signal_saves_and_a_second_interrupt_ends_at_once(start, tmp_path):
  process = start()
  wait_for_checkpoint(tmp_path / "run", process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(SECONDS) == 75, process.log.read_text()
  assert last_saved_is_last_written(tmp_path / "run")
  saved = steps_of(tmp_path / "run")[-1]
  said = process.log.read_text()
  assert f"step {saved} is saved. The same command resumes." in said
  process = start()
  wait_for_checkpoint(tmp_path / "run", process, after=saved)
  assert f"checkpoint of step {saved}." in process.log.read_text()
  # A save takes far longer than the pause; two at once might count as one.
  while process.poll() is None:
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
  assert process.returncode == 130, process.log.read_text()
  assert "nothing saved" in process.log.read_text()


def ended(processes) -> float:
  begin = time.monotonic()
  for process in processes:
    process.wait(SECONDS)
  return time.monotonic() - begin


def said(processes) -> str:
  return "\n".join(p.log.read_text()[-3000:] for p in processes)


@pytest.mark.proof
@pytest.mark.parametrize(
  ("victim", "number", "stop"),
  [
    pytest.param(1, signal.SIGKILL, signal.SIGTERM, id="worker_killed"),
    pytest.param(
      0,
      signal.SIGKILL,
      signal.SIGINT,
      id="coordinator_killed",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      1,
      signal.SIGSTOP,
      signal.SIGTERM,
      id="worker_stopped",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      0,
      signal.SIGSTOP,
      signal.SIGTERM,
      id="coordinator_stopped",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_lost_peer_ends_the_others_and_all_resume(
  victim, number, stop, start_pair, tmp_path
):
  """And then a signal to one process stops all of them at one step."""
  workdir = tmp_path / "run"
  processes = start_pair()
  wait_for_checkpoint(workdir, *processes)
  processes[victim].send_signal(number)
  survivor = processes[1 - victim]
  seconds = ended([survivor])
  processes[victim].kill()
  assert seconds < 30
  assert survivor.returncode != 0
  assert re.search("(?i)peer|heartbeat|unavailable", survivor.log.read_text())
  print(
    f"{number.name} to process {victim}: the other ended after {seconds:.1f} s"
    f" with code {survivor.returncode}"
  )
  saved = steps_of(workdir)[-1]
  assert leaves_of(workdir)
  processes = start_pair()
  wait_for_checkpoint(workdir, *processes, after=saved)
  resumed = f"from the checkpoint of step {saved}."
  assert resumed in processes[0].log.read_text()
  processes[1].send_signal(stop)
  seconds = ended(processes)
  assert [p.returncode for p in processes] == [75, 75], said(processes)
  assert last_saved_is_last_written(workdir)
  print(f"{stop.name} to process 1: both saved and ended in {seconds:.1f} s")
