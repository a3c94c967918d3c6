"""The online numbers of a run: what they are, and that they cost no label."""

import dataclasses

import jax
import numpy as np
import pytest

from imsvd_jax import data
from imsvd_jax.base import console, hashing
from imsvd_jax.base.agreement import LostPeerError
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import (
  augmented_views,
  binder,
  collapse,
  probe,
  results,
)
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.online import Evaluation
from imsvd_jax.evaluation.protocols import PROTOCOLS
from imsvd_jax.runs.encoder import LoadedEncoder
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config


class Written:
  """Stands in for the metric writer."""

  def __init__(self, workdir):
    self.workdir = str(workdir)
    self.lines = {}
    self.looked_at = {}

  def write(self, step, values, *, timing=False):
    (self.looked_at if timing else self.lines)[step] = values


@pytest.fixture(scope="module")
def digits():
  """An experiment on digits, its train source and its first state."""
  config = small_config(
    **{
      "data.name": "digits",
      "data.num_examples": 0,
      "eval.batch_size": 256,
      "eval.linear_epochs": 3,
      "eval.bank_examples": 400,
    }
  )
  source = data.make_source(config.data, "train")
  experiment = experiment_lib.build(config, source.num_examples)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  return experiment, source, state


@pytest.fixture
def said(monkeypatch):
  lines = []
  monkeypatch.setattr(console, "say", lines.append)
  monkeypatch.setattr(console, "print_result", lines.append)
  return lines


@pytest.fixture
def evaluation_of(digits, tmp_path):
  """Makes an evaluation, with other settings of `eval`, and its writer."""
  experiment, default_source, _ = digits

  def make(source=default_source, **settings):
    config = experiment.config.copy_and_resolve_references()
    config.eval.update(settings)
    evaluation = Evaluation(experiment._replace(config=config), source)
    return evaluation, Written(tmp_path)

  return make


def test_the_online_head_is_the_probe_on_the_banks_features(
  digits, said, tmp_path, evaluation_of
):
  experiment, source, state = digits
  evaluation, written = evaluation_of()
  evaluation.online(5, state, written)
  found = written.lines[5]
  assert set(found) == {"online/knn", "online/linear"}
  bank = augmented_views.some_images(source, 400, seed=0)
  test = data.make_source(experiment.config.data, "eval")
  encoder = LoadedEncoder(
    experiment.config,
    {"params": state.params, "batch_stats": state.batch_stats},
    5,
    model=experiment.model,
  )
  train, test = (
    Features(encoder.features(s.images), s.labels) for s in (bank, test)
  )
  assert len(train.features) == 400
  protocol = dataclasses.replace(PROTOCOLS["linear/online"], epochs=3)
  expected = probe.linear_probe(train, test, protocol)
  assert found["online/linear"] == expected.accuracy.top1
  assert found["online/linear"] > 0.5
  (line,) = said
  assert line.startswith("step 5  online: k-NN ")
  assert ", linear " in line
  rows = results.read_results(tmp_path / "results.json")
  assert [(r["protocol"], r["step"], r["online"]) for r in rows] == [
    ("knn/online", 5, True),
    ("linear/online", 5, True),
  ]
  assert rows[1]["final"] == expected.accuracy.top1
  assert rows[0]["weights"] == hashing.checksum(encoder.variables)


@pytest.mark.parametrize("questions", [0, 1, 2])
def test_a_signal_leaves_an_evaluation_out(
  digits, said, evaluation_of, questions
):
  """Asked before each measurement and each batch of images."""
  evaluation, written = evaluation_of()
  answers = iter([False] * questions + [True])
  evaluation.online(5, digits[2], written, lambda: next(answers))
  assert not written.lines
  assert not written.looked_at
  assert said == ["The evaluation of step 5 is left out."]
  assert next(answers, None) is None
  evaluation.online(6, digits[2], written)  # And the next one is not.
  assert set(written.lines[6]) == {"online/knn", "online/linear"}


def test_images_without_labels_are_measured_too(
  digits, said, tmp_path, evaluation_of
):
  _, source, state = digits
  source = dataclasses.replace(source, labels=None, num_classes=0)
  evaluation, written = evaluation_of(source, collapse_images=24)
  evaluation.online(0, state, written)
  found = written.lines[0]
  assert {name.split("/")[1] for name in found} == {"collapse"}
  assert found["online/collapse/codes/entropy_limit"] == pytest.approx(
    np.log(8)
  )
  assert "No k-NN or linear evaluation: the images have no labels." in said
  assert said[-1].startswith("step 0  online (random init): RankMe ")
  (row,) = results.read_results(tmp_path / "results.json")
  assert row["values"]["lidar"] == found["online/collapse/lidar"]
  assert not any("variable" in name for name in row["values"])


def test_a_number_that_fails_does_not_take_the_others(
  digits, said, evaluation_of
):
  evaluation, written = evaluation_of(num_neighbors=401, collapse_images=24)
  evaluation.online(9, digits[2], written)
  assert "online/knn" not in written.lines[9]
  assert "online/collapse/lidar" in written.lines[9]
  assert any("WARNING at step 9: no online evaluation" in line for line in said)


def test_an_evaluation_part_without_labels_is_said_once(
  digits, said, evaluation_of
):
  _, source, state = digits
  flat = dataclasses.replace(source, name="val", labels=None, num_classes=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "make_source", lambda *_: flat)
    evaluation, _ = evaluation_of()
  assert said == [
    "No k-NN or linear evaluation: val has no labels, though the train images"
    " have."
  ]
  evaluation.final(state, Written("/nowhere"), "/nowhere")
  assert len(said) == 1


def test_a_final_evaluation_that_fails_does_not_end_the_run(
  digits, said, monkeypatch, tmp_path, evaluation_of
):
  evaluation, written = evaluation_of()

  def fails(*_):
    raise UserError("nothing to compare")

  monkeypatch.setattr(binder.Binding, "measure", fails)
  evaluation.final(digits[2], written, str(tmp_path))
  assert said[-1] == "WARNING: no final evaluation: nothing to compare"
  assert not list(tmp_path.iterdir())


def test_the_closing_table_is_rows_of_results_json(
  digits, said, tmp_path, evaluation_of
):
  evaluation, written = evaluation_of(baselines=True)
  evaluation.final(digits[2].replace(step=9), written, str(tmp_path))
  rows = results.read_results(tmp_path / "results.json")
  assert [(r["encoder"], r["step"], r["protocol"]) for r in rows] == [
    (name, step, protocol)
    for name, step in (("raw pixels", None), ("random init", 0), ("trained", 9))
    for protocol in ("knn/final", "linear/final")
  ]
  trained = {r["protocol"]: r["final"] for r in rows[4:]}
  assert written.lines[9] == {
    "final_knn": trained["knn/final"],
    "final_linear": trained["linear/final"],
  }
  assert rows[0]["weights"] is None
  assert rows[0]["final"] > 0.9  # Of digits, pixels alone tell much.
  assert {r["num_images"] for r in rows} == {360}
  last = f"trained       {rows[4]['final']:9.2%}{rows[5]['final']:9.2%}"
  assert said[-1] == last


def test_results_that_cannot_be_written_do_not_end_the_run(
  digits, said, tmp_path, evaluation_of
):
  evaluation, written = evaluation_of()
  (tmp_path / "results.json").write_text("{")
  evaluation.online(5, digits[2], written)
  assert "online/knn" in written.lines[5]
  assert any("WARNING at step 5" in x and "not a results" in x for x in said)
  assert (tmp_path / "results.json").read_text() == "{"


def test_no_exception_of_a_measurement_ends_the_run(
  digits, said, monkeypatch, evaluation_of
):
  def fails(*_, **__):
    raise np.linalg.LinAlgError("Eigenvalues did not converge")

  monkeypatch.setattr(collapse, "lidar", fails)
  monkeypatch.setattr(probe, "linear_probe", fails)
  evaluation, written = evaluation_of(collapse_images=24)
  for step in (3, 6):
    evaluation.online(step, digits[2], written)
    assert "online/knn" in written.lines[step]
    assert "online/collapse/rank_me/features" in written.lines[step]
    assert "online/collapse/codes/entropy_mean" in written.lines[step]
    assert "online/collapse/lidar" not in written.lines[step]
    assert "online/linear" not in written.lines[step]
  warnings = [line for line in said if line.startswith("WARNING")]
  assert warnings == [
    f"WARNING at step 3: no online evaluation: {name} failed: LinAlgError:"
    " Eigenvalues did not converge"
    for name in ("linear/online", "collapse/online lidar")
  ]
  assert "failed so far: linear/online 2, collapse/online lidar 2" in said[-1]


def test_all_measurements_fail_and_the_run_goes_on(
  digits, said, monkeypatch, evaluation_of
):
  def fails(*_, **__):
    raise MemoryError

  monkeypatch.setattr(binder, "extract", fails)
  evaluation, written = evaluation_of()
  evaluation.online(3, digits[2], written)
  assert not written.lines
  assert "failed so far: knn/online 1, linear/online 1" in said[-1]
  assert any(line.endswith("knn/online failed: MemoryError") for line in said)


@pytest.mark.parametrize(
  "error", [KeyboardInterrupt, SystemExit, LostPeerError]
)
def test_signals_and_lost_peers_pass(
  digits, said, monkeypatch, evaluation_of, error
):
  def fails(*_, **__):
    raise error

  monkeypatch.setattr(binder.Binding, "measure", fails)
  evaluation, written = evaluation_of()
  with pytest.raises(error):
    evaluation.online(3, digits[2], written)
  with pytest.raises(error):
    evaluation.final(digits[2], written, written.workdir)


def test_a_final_number_that_fails_is_a_missing_row(
  digits, said, tmp_path, evaluation_of
):
  evaluation, written = evaluation_of(num_neighbors=1438, baselines=False)
  evaluation.final(digits[2].replace(step=9), written, str(tmp_path))
  (row,) = results.read_results(tmp_path / "results.json")
  assert row["protocol"] == "linear/final"
  assert written.lines[9] == {"final_linear": row["final"]}
  (warning,) = (line for line in said if line.startswith("WARNING"))
  assert warning.startswith("WARNING: no knn/final of trained: k-NN with k")
  assert said[-1] == f"trained       {'-':>9}{row['final']:9.2%}"
