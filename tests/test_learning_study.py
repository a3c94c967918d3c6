"""The study of label-free scores judges them rightly."""

import math

import pytest

from docs import learning_study
from imsvd_jax.training import verdict

PREFIX = "online/collapse/"


def run_of(accuracies, spread, losses=None):
  """Lines of a run that is evaluated at every tenth step."""
  lines = []
  for i, (accuracy, uniformity) in enumerate(
    zip(accuracies, spread, strict=True)
  ):
    step = 10 * i
    lines.append(
      {
        "step": step,
        "online/knn": accuracy,
        "online/linear": accuracy,
        f"{PREFIX}alignment": 0.5,
        f"{PREFIX}uniformity": -uniformity,
        f"{PREFIX}rank_me/features": 10.0,
        f"{PREFIX}rank_me/embeddings": 10.0,
        f"{PREFIX}lidar": -accuracy,
      }
    )
    loss = losses[i] if losses else -accuracy
    lines.append({"step": step, "loss": loss, "embedding_std": 0.9})
  return lines


@pytest.fixture
def stored():
  accuracies = [0.5, 0.6, 0.9, 0.8, 0.7]
  return {"a": run_of(accuracies, accuracies), "b": run_of(accuracies, [1] * 5)}


def test_a_score_that_knows_accuracy_loses_nothing(stored):
  found = learning_study.report(["a"], stored)
  right, wrong = found["uniformity"], found["LiDAR"]
  assert right["points lost"] == 0
  assert right["within half a point"] == 1
  assert right["k-NN"] == pytest.approx(1)
  assert wrong["points lost"] == pytest.approx(30)  # Of the first after step 0.
  assert wrong["k-NN"] == pytest.approx(-1)


def test_of_equal_scores_the_newest_is_chosen(stored):
  found = learning_study.report(["b"], stored)
  assert found["uniformity"]["points lost"] == pytest.approx(20)
  assert found["the newest"]["points lost"] == pytest.approx(20)


def test_states_with_an_alarm_are_not_chosen(stored):
  losses = [1.0, 1.0, math.nan, 0.9, 0.8]
  run = run_of([0.5, 0.6, 0.9, 0.8, 0.7], [1, 1, 3, 1, 1], losses)
  # The line of the loss comes before the evaluation of its step.
  run = [run[i ^ 1] for i in range(len(run))]
  assert verdict.judge(run[:6]).state == verdict.DIVERGED
  found = learning_study.report(["c"], {"c": run})
  assert found["uniformity"]["points lost"] == pytest.approx(20)  # Not step 20.


def test_halves_are_all_runs_once():
  names = [run.name for run in learning_study.runs()]
  halves = learning_study.halves({name: [] for name in names})
  assert sorted([*halves[0], *halves[1]]) == sorted(names)
  assert len(set(names)) == len(names)
  assert abs(len(halves[0]) - len(halves[1])) <= 1


@pytest.mark.parametrize(
  ("end", "outcome"),
  [(0.87, "failed"), (0.89, "neither"), (0.91, "neither"), (0.93, "good")],
)
def test_outcomes(end, outcome):
  assert learning_study.outcome(0.9, end) == outcome


def test_every_run_is_a_recipe():
  for run in learning_study.runs():
    config = learning_study.config_of(run)
    assert config.eval.every_epochs > 0
