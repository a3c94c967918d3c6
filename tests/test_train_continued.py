"""A run that is started again: by two at once, after its end, otherwise."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from imsvd_jax import train
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import environment, lock, log_lines, metrics
from imsvd_jax.train import train_and_evaluate
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config


def config_of(**overrides):
  """Nine steps of 16 images, three epochs, without evaluation."""
  return small_config(**{"eval.every_epochs": 0.0, **overrides})


@pytest.fixture(scope="module")
def once(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("once")
  train_and_evaluate(config_of(), str(workdir))
  return workdir


@pytest.fixture
def finished(once, tmp_path):
  return pathlib.Path(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def at_six(finished):
  for step in (8, 9):
    shutil.rmtree(finished / "checkpoints" / str(step))
  return finished


def contents(workdir):
  """Of all files but the log of the console, to which every start adds."""
  files = [p for p in workdir.rglob("*") if p.is_file()]
  return {p: p.read_bytes() for p in files if p.name != "train.log"}


def snapshot(workdir):
  return contents(workdir), {
    p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in workdir.rglob("*")
  }


def refused(workdir, match, **overrides):
  with pytest.raises(UserError, match=match) as error:
    train_and_evaluate(config_of(**overrides), str(workdir))
  assert "\n" not in str(error.value)
  return str(error.value)


# --- One owner ---------------------------------------------------------------


def test_a_second_start_is_refused_and_changes_nothing(at_six):
  with lock.owned(str(at_six)):
    before = snapshot(at_six)
    refused(at_six, "is in use by another run, process ")
    assert snapshot(at_six) == before
  assert int(train_and_evaluate(config_of(), str(at_six)).step) == 9


def test_a_run_that_was_taken_over_writes_nothing_more(at_six, monkeypatch):
  """As in a bucket, where nobody can be locked out."""
  add = log_lines.StepLog.add

  def add_and_lose(self, step, *args, **kwargs):
    add(self, step, *args, **kwargs)
    if step == 8:
      text = json.dumps({"pid": 7, "host": "elsewhere", "started": "now"})
      (at_six / lock.LOCK_FILE).write_text(text)

  monkeypatch.setattr(log_lines.StepLog, "add", add_and_lose)
  refused(at_six, "process 7 on elsewhere, started now, has taken over")
  assert not (at_six / "checkpoints" / "8").exists()
  steps = [line["step"] for line in metrics.read_metrics(at_six)]
  assert steps == [1, 2, 3, 4, 5, 6, 7]


# --- A plan that changes -----------------------------------------------------


def test_position_is_counted_in_images(at_six, capsys):
  """96 of 144 images, then one step of 48: the third third of the plan."""
  larger = {"batch_size": 48, "allow_changes": ("batch_size",)}
  state = train_and_evaluate(config_of(**larger), str(at_six))
  assert int(state.step) == 7
  said = capsys.readouterr().err
  assert "Training to step 7 " in said
  assert "The plan changes (batch_size): the learning rate was 0.0" in said
  last = metrics.read_metrics(at_six)[-1]
  assert (last["step"], last["epoch"]) == (7, 3.0)
  planned = 0.4 * 48 / 256 * (0.001 + 0.999 * (1 + np.cos(np.pi * 2 / 3)) / 2)
  assert last["learning_rate"] == pytest.approx(planned, rel=1e-5)
  before = contents(at_six / "checkpoints")
  assert int(train_and_evaluate(config_of(**larger), str(at_six)).step) == 7
  assert "finished at step 7; for more" in capsys.readouterr().err
  assert contents(at_six / "checkpoints") == before


def test_the_images_of_a_changed_batch_size_follow_the_others(
  at_six, monkeypatch
):
  seen = []
  batches_of = train._batches

  def spy(*args):
    for batch in batches_of(*args):
      seen.append(
        {name: np.asarray(batch[name]) for name in ("epoch", "index")}
      )
      yield batch

  monkeypatch.setattr(train, "_batches", spy)
  overrides = {"batch_size": 24, "allow_changes": ("batch_size",)}
  train_and_evaluate(config_of(**overrides), str(at_six))
  first, second = seen[:2]
  assert set(first["epoch"]) == set(second["epoch"]) == {2}
  assert sorted([*first["index"], *second["index"]]) == list(range(48))


def test_a_target_behind_the_position_is_refused(finished, monkeypatch):
  monkeypatch.setattr(step_lib, "jit_train_step", None)
  before = contents(finished / "checkpoints")
  allow = {"allow_changes": ("epochs", "batch_size")}
  message = "is at image 144 of 96 planned .step 9, epochs=2.: the plan ends"
  refused(finished, message, epochs=2.0, **allow)
  refused(finished, message, epochs=2.0, batch_size=48, **allow)
  assert contents(finished / "checkpoints") == before


@pytest.mark.parametrize(
  ("schedule", "expected"),
  [
    ("cosine", [0.0036832, 0.0016980, 0.00045046]),  # Steps 9 to 11 of 12.
    ("constant", [0.00077810] * 3),
    ("restart", [0.025, 0.01876, 0.006269]),  # A run of three steps.
  ],
)
def test_a_finished_run_is_extended_as_the_schedule_says(
  schedule, expected, finished, capsys
):
  config = config_of(
    **{
      "epochs": 4.0,
      "optimizer.schedule": schedule,
      "allow_changes": ("epochs", "optimizer.schedule"),
    }
  )
  train_and_evaluate(config, str(finished))
  said = capsys.readouterr().err
  line = f"the learning rate was 0.0007781 and is {expected[0]:.4g} from here"
  assert line in said
  assert f"by optimizer.schedule={schedule!r}" in said
  lines = metrics.read_metrics(finished)
  assert [line["step"] for line in lines] == list(range(1, 13))
  rates = [line["learning_rate"] for line in lines[9:]]
  np.testing.assert_allclose(rates, expected, rtol=1e-3)
  # Stopped in the middle of the extension, it continues as it began.
  whole = (finished / metrics.METRICS_FILE).read_text()
  shutil.rmtree(finished / "checkpoints" / "12")
  train_and_evaluate(config, str(finished))
  assert (finished / metrics.METRICS_FILE).read_text() == whole
  assert "The plan changes" not in capsys.readouterr().err


def test_an_unknown_schedule_is_one_clear_line(tmp_path):
  message = "optimizer.schedule='linear'; expected one of cosine, constant, re"
  refused(tmp_path / "run", message, **{"optimizer.schedule": "linear"})
  assert not (tmp_path / "run").exists()


# --- A run that has ended ----------------------------------------------------


def test_a_finished_run_says_so_and_does_nothing(
  finished, monkeypatch, capsys, caplog
):
  jax.clear_caches()
  for name in ("jit_train_step", "train_step"):
    monkeypatch.setattr(step_lib, name, None)
  monkeypatch.setattr(train, "Evaluation", None)
  before = contents(finished)
  with jax.log_compiles():
    state = train_and_evaluate(config_of(), str(finished))
  assert "Compiling" not in caplog.text
  assert int(state.step) == 9
  said = capsys.readouterr().err
  assert said.endswith(
    f"{finished}: finished at step 9; for more: --config.epochs=6"
    " --config.allow_changes=\"('epochs',)\".\n"
  )
  assert contents(finished) == before


def test_a_final_evaluation_that_was_killed_is_done_once(
  finished, monkeypatch, capsys
):
  config = config_of(**{"eval.final": True, "eval.baselines": False})
  train_and_evaluate(config, str(finished))
  assert "final_knn" in metrics.read_metrics(finished)[-1]
  before = (finished / metrics.METRICS_FILE).read_text()
  assert len(before.splitlines()) == 11  # The last but one: the verdict.
  monkeypatch.setattr(train, "Evaluation", None)
  train_and_evaluate(config, str(finished))
  assert (finished / metrics.METRICS_FILE).read_text() == before


def test_damaged_metrics_of_a_finished_run_are_reported(finished, capsys):
  path = finished / metrics.METRICS_FILE
  lines = path.read_text().splitlines(keepends=True)
  path.write_text("".join(lines[:3]))
  train_and_evaluate(config_of(), str(finished))
  said = capsys.readouterr().err
  assert "of the 10 lines up to step 9, 7 are missing" in said
  assert (finished / "metrics.jsonl.damaged-1").exists()


# --- The environment ---------------------------------------------------------


def test_another_environment_is_refused_and_named(at_six, monkeypatch, caplog):
  settings = environment.settings()
  assert settings["JAX_DEFAULT_PRNG_IMPL"] == "threefry2x32"
  assert settings["JAX_ENABLE_X64"] is False
  changed = settings | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
  monkeypatch.setattr(environment, "settings", lambda: changed)
  monkeypatch.setattr(environment, "versions", lambda: {"jax": "99"})
  name = "environment.JAX_DEFAULT_MATMUL_PRECISION"
  message = refused(at_six, f'{name}: null -> "highest"')
  assert "JAX_ENABLE_X64" not in message
  # A version that does not know an option, or knows another one.
  fewer = settings | {"JAX_NEW": 1}
  del fewer["JAX_DISABLE_JIT"]
  monkeypatch.setattr(environment, "settings", lambda: fewer)
  train_and_evaluate(config_of(), str(at_six))
  assert '-> "99" (allowed)' in caplog.text


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("jax_enable_x64", True),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_numpy_rank_promotion", "raise"),
  ],
)
def test_what_no_run_can_have_is_refused_at_the_start(name, value, tmp_path):
  before = environment._plain(getattr(jax.config, name))
  jax.config.update(name, value)
  try:
    refused(tmp_path / "run", f"^{name.upper()} is {value}; training needs")
  finally:
    jax.config.update(name, before)
  assert not (tmp_path / "run").exists()
