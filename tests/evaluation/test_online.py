"""The online numbers of a run: what they are, and that they cost no label."""

import dataclasses

import jax
import numpy as np
import pytest

from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import PROTOCOLS, augmented_views, probe
from imsvd_jax.evaluation.online import Evaluation
from imsvd_jax.runs import metrics
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config


class Written:
  """Stands in for the metric writer."""

  def __init__(self):
    self.lines = {}

  def write(self, step, values):
    self.lines[step] = values


def subject(**overrides):
  config = small_config(
    **{
      "data.name": "digits",
      "data.num_examples": 0,
      "eval.batch_size": 256,
      "eval.linear_epochs": 3,
      "eval.bank_examples": 400,
      **overrides,
    }
  )
  source = data.make_source(config.data, "train")
  experiment = experiment_lib.build(config, source.num_examples)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  return experiment, source, state


@pytest.fixture(scope="module")
def digits():
  return subject()


@pytest.fixture
def said(monkeypatch):
  lines = []
  monkeypatch.setattr(metrics, "say", lines.append)
  return lines


def test_the_online_head_is_the_probe_on_the_banks_features(digits, said):
  experiment, source, state = digits
  evaluation, written = Evaluation(experiment, source), Written()
  evaluation.online(5, state, written)
  found = written.lines[5]
  assert set(found) == {"online/knn", "online/linear"}
  bank = augmented_views.some_images(source, 400, seed=0)
  train, test = evaluation._extract(evaluation.embed(state), bank)
  assert train.features.shape[0] == 400
  settings = {**vars(PROTOCOLS["linear/online"]), "epochs": 3}
  expected = probe.linear_probe(*train[:2], *test[:2], **settings)
  assert found["online/linear"] == expected.accuracy.top1
  assert found["online/linear"] > 0.5
  (line,) = said
  assert line.startswith("step 5  online: k-NN ")
  assert ", linear " in line


def test_images_without_labels_are_measured_too(digits, said):
  experiment, source, state = digits
  config = experiment.config.copy_and_resolve_references()
  config.eval.collapse_images = 24
  experiment = experiment._replace(config=config)
  source = dataclasses.replace(source, labels=None, num_classes=0)
  evaluation, written = Evaluation(experiment, source), Written()
  evaluation.online(0, state, written)
  found = written.lines[0]
  assert {name.split("/")[1] for name in found} == {"collapse"}
  assert found["online/collapse/codes/entropy_limit"] == pytest.approx(
    np.log(8)
  )
  assert "No k-NN or linear evaluation: the images have no labels." in said
  assert said[-1].startswith("step 0  online (random init): RankMe ")


def test_a_number_that_fails_does_not_take_the_others(digits, said):
  experiment, source, state = digits
  config = experiment.config.copy_and_resolve_references()
  config.eval.num_neighbors = 401
  config.eval.collapse_images = 24
  experiment = experiment._replace(config=config)
  evaluation, written = Evaluation(experiment, source), Written()
  evaluation.online(9, state, written)
  assert "online/knn" not in written.lines[9]
  assert "online/collapse/lidar" in written.lines[9]
  assert any("WARNING at step 9: no online evaluation" in line for line in said)


def test_an_evaluation_part_without_labels_is_said_once(digits, said):
  experiment, source, state = digits
  flat = dataclasses.replace(source, name="val", labels=None, num_classes=0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "make_source", lambda *_: flat)
    evaluation = Evaluation(experiment, source)
  assert said == [
    "No k-NN or linear evaluation: val has no labels, though the train images"
    " have."
  ]
  evaluation.final(state, Written(), "/nowhere")
  assert len(said) == 1


def test_a_final_evaluation_that_fails_does_not_end_the_run(
  digits, said, monkeypatch, tmp_path
):
  experiment, source, state = digits
  evaluation = Evaluation(experiment, source)

  def fails(*_):
    raise UserError("nothing to compare")

  monkeypatch.setattr(evaluation, "_extract", fails)
  evaluation.final(state, Written(), str(tmp_path))
  assert said[-1] == "WARNING: no final evaluation: nothing to compare"
  assert not list(tmp_path.iterdir())
