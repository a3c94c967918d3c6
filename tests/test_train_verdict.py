"""What a run says about itself, and what it does because of it."""

import contextlib
import io
import json
import shutil

import pytest

from imsvd_jax.base.errors import EXIT_NOT_FINITE, Stopped
from imsvd_jax.runs import best, metrics, run_directory
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.train import train_and_evaluate
from imsvd_jax.training import verdict
from tests.train_child import small_config


def config_of(**changes):
  return small_config(
    **{
      "epochs": 4.0,  # 12 steps.
      "eval.every_epochs": 1.0,
      "eval.collapse_images": 16,
      "checkpoint.every_steps": 5,
      "checkpoint.keep_last": 1,
      "checkpoint.keep_best": 1,
      **changes,
    }
  )


def steps_in(workdir):
  return run_directory.steps_on_disk(workdir / run_directory.CHECKPOINTS)


def words_of(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [x for x in map(json.loads, lines) if "verdict" in x]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run, what it wrote to standard output, and to standard error."""
  workdir = tmp_path_factory.mktemp("run")
  config = config_of(**{"eval.final": True, "eval.baselines": False})
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    train_and_evaluate(config, str(workdir))
  return workdir, out.getvalue(), err.getvalue()


def test_every_evaluation_has_a_verdict(finished):
  workdir, *_ = finished
  found = words_of(workdir)
  assert [line["step"] for line in found] == [3, 6, 9, 12]
  assert all(line["verdict"] in verdict.STATES for line in found)
  assert all("loss" in line["why"] for line in found)
  numbers = metrics.read_metrics(workdir)
  assert verdict.judge(numbers).name == found[-1]["verdict"]


def test_results_are_on_stdout_and_the_settings_in_the_log(finished):
  workdir, out, err = finished
  judged = "Verdict: too short to judge"
  order = (judged, "Accuracy on", "Next:", "imsvd explain")
  places = [out.index(words) for words in order]
  assert places == sorted(places)
  assert not any(words in err for words in order)
  log = (workdir / "train.log").read_text()
  assert all(words in log for words in order)
  for words in ("optimizer.base_learning_rate = ", "backbone/conv1/kernel"):
    assert words in log
    assert words not in err


def test_the_header_is_short(finished):
  _, _, err = finished
  header = err[: err.index("step 0  online")].splitlines()
  assert len(header) <= 12
  text = "\n".join(header)
  for name in ("Model: resnet8, float32, ", "Objective: imsvd (", "Data: "):
    assert name in text
  for name in ("Devices: 8 x cpu", "Workdir: ", "Training to step 12"):
    assert name in text


def test_tensorboard_has_groups_and_words(finished):
  event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
  )
  workdir, *_ = finished
  events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
  events.Reload()
  tags = set(events.Tags()["tensors"])
  assert {"loss/loss", "terms/diagonal", "code/information"} <= tags
  assert {"speed/learning_rate", "online/knn", "final/final_knn"} <= tags
  assert {"verdict/verdict", "verdict/label_free", "config/config"} <= tags
  assert all("/" in tag for tag in tags)


def test_the_best_checkpoint_is_kept_and_has_a_name(finished):
  workdir, *_ = finished
  lines = metrics.read_metrics(workdir)
  scores = {
    line["step"]: verdict.scores(lines[: i + 1])["label_free"]
    for i, line in enumerate(lines)
    if "online/knn" in line and line["step"] > 0
  }
  expected = best.ranked(scores)[0]
  assert steps_in(workdir) == sorted({expected, 12})
  assert best.find_step(workdir, "best") == expected
  assert load_encoder(workdir, "best").step == expected


@pytest.mark.proof
def test_a_resumed_run_finds_the_same_best_and_says_the_same(tmp_path):
  other, config = tmp_path / "run", config_of(**{"checkpoint.keep_last": 2})
  train_and_evaluate(config, str(other))
  before = (other / "metrics.jsonl").read_text()
  kept = steps_in(other)
  shutil.rmtree(other / "checkpoints" / "12")
  train_and_evaluate(config, str(other))
  assert (other / "metrics.jsonl").read_text() == before
  assert steps_in(other) == kept


def test_a_verdict_ends_the_run_and_it_stays_ended(tmp_path, capsys):
  config = config_of(**{"stop.when": "warming up"})
  assert int(train_and_evaluate(config, str(tmp_path)).step) == 3
  assert steps_in(tmp_path) == [3]
  capsys.readouterr()
  assert int(train_and_evaluate(config, str(tmp_path)).step) == 3
  said = capsys.readouterr().err
  assert 'finished at step 3; for more: --config.stop.when=""' in said
  config.stop.when = ""
  assert int(train_and_evaluate(config, str(tmp_path)).step) == 12


@pytest.mark.proof
def test_a_diverged_run_ends_with_code_3(tmp_path, monkeypatch, capsys):
  real = verdict.judge

  def judge(lines):
    found = real(lines)
    late = found is not None and lines[-1]["step"] >= 7
    return found._replace(state=verdict.DIVERGED) if late else found

  monkeypatch.setattr(verdict, "judge", judge)
  with pytest.raises(Stopped) as stopped:
    train_and_evaluate(config_of(**{"stop.when_diverged": True}), str(tmp_path))
  assert stopped.value.code == EXIT_NOT_FINITE
  assert "The run has diverged at step 7" in capsys.readouterr().err
  assert max(steps_in(tmp_path)) <= 6


@pytest.mark.parametrize(
  ("key", "value"),
  [("stop.when", "conveged"), ("checkpoint.keep_best_by", "knn")],
)
def test_a_name_that_is_unknown_is_refused(tmp_path, key, value):
  with pytest.raises(ValueError, match=rf"{key}='{value}'; expected one of"):
    train_and_evaluate(config_of(**{key: value}), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("by", "key"),
  [
    ("label_free", "eval.collapse_images"),
    ("online/linear", "eval.linear_epochs"),
    ("online/knn", "eval.every_epochs"),
  ],
)
def test_a_score_that_is_never_measured_is_refused(tmp_path, by, key):
  config = config_of(**{"checkpoint.keep_best_by": by, key: 0})
  with pytest.raises(
    ValueError, match=f"needs the score '{by}', and {key} is 0"
  ):
    train_and_evaluate(config, str(tmp_path / "run"))
