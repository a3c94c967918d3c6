"""Logistic regression against scikit-learn and what it must refuse."""

import time

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import logistic, subsets
from imsvd_jax.evaluation import scores as metrics
from imsvd_jax.evaluation.protocols import Lbfgs


@pytest.fixture(scope="module")
def digits():
  features, labels = load_digits(return_X_y=True)
  features = (features / 16).astype(np.float32)
  train, test = subsets.split_classes(labels, 0.2, seed=0)
  return features[train], labels[train], features[test], labels[test]


@pytest.fixture(scope="module")
def result(digits):
  return logistic.logistic_regression(*digits)


def test_equals_scikit_learn_at_the_chosen_penalty(digits, result):
  train, train_labels, test, test_labels = digits
  scaler = StandardScaler().fit(train)
  # Pixels that are black in all of train teach nothing: zero on both sides.
  alive = train.std(axis=0) > 0
  train, test = (
    scaler.transform(train)[:, alive],
    scaler.transform(test)[:, alive],
  )
  model = LogisticRegression(C=result.inverse_penalty, tol=1e-9, max_iter=5000)
  model.fit(train.astype(np.float64), train_labels)
  expected = model.decision_function(test)
  tight = logistic.logistic_regression(
    *digits, Lbfgs((result.inverse_penalty,), tolerance=1e-7)
  )
  np.testing.assert_allclose(tight.scores, expected, atol=0.06)
  np.testing.assert_allclose(result.scores, expected, atol=0.2)
  assert result.accuracy.top1 == pytest.approx(model.score(test, test_labels))
  assert result.score.value == result.accuracy.top1 > 0.95
  assert result.converged


def test_the_penalty_is_chosen_on_train_alone(digits, result):
  train, train_labels, test, test_labels = digits
  best = max(result.held_out.values())
  assert result.held_out[result.inverse_penalty] == best
  assert len(result.held_out) == 5
  # Test labels that say the opposite change the score and nothing else.
  shuffled = logistic.logistic_regression(
    train, train_labels, test, test_labels[::-1]
  )
  assert shuffled.inverse_penalty == result.inverse_penalty
  np.testing.assert_array_equal(shuffled.scores, result.scores)
  assert shuffled.score.value < 0.3


def test_it_is_fast_enough_to_run_after_every_training(digits):
  # 192 features of 1437 images: 1-2 s on two cores, with room for busy ones.
  train, train_labels, test, test_labels = digits
  weights = np.random.default_rng(0).normal(size=(64, 192)).astype(np.float32)
  start = time.monotonic()
  logistic.logistic_regression(
    np.maximum(train @ weights, 0),
    train_labels,
    np.maximum(test @ weights, 0),
    test_labels,
  )
  assert time.monotonic() - start < 10


def test_two_classes_and_a_gap_in_their_numbers(digits):
  train, train_labels, test, test_labels = digits
  train_rows, test_rows = train_labels % 7 == 1, test_labels % 7 == 1  # 1 and 8
  result = logistic.logistic_regression(
    train[train_rows],
    train_labels[train_rows],
    test[test_rows],
    test_labels[test_rows],
    Lbfgs((0.1,), "mean_per_class"),
  )
  assert result.held_out == {}
  assert result.scores.shape == (test_rows.sum(), 9)
  assert result.score.value > 0.9
  assert result.accuracy.top5 == 1.0


def test_several_labels_per_image_are_problems_of_their_own(digits):
  train, train_labels, test, test_labels = digits
  # Even digits, and digits with a hole; some "difficult" ones do not count.
  facts = np.stack(
    [np.arange(10) % 2 == 0, np.isin(np.arange(10), (0, 6, 8, 9))], axis=1
  ).astype(np.int32)
  several, test_several = facts[train_labels], facts[test_labels]
  several[::50, 1] = -1
  result = logistic.logistic_regression(
    train,
    several,
    test,
    test_several,
    Lbfgs((0.01, 0.1), "map_11_point"),
  )
  assert result.accuracy is None
  known = several[:, 1] >= 0
  alone = logistic.logistic_regression(
    train[known],
    several[known, 1],
    test,
    test_several[:, 1],
    Lbfgs((result.inverse_penalty,)),
  )
  order = lambda scores: np.argsort(np.argsort(scores))
  difference = order(alone.scores[:, 1]) - order(result.scores[:, 1])
  assert np.abs(difference).mean() < 5  # standardized over other images
  assert result.score.value == pytest.approx(
    metrics.mean_average_precision(result.scores, test_several)
  )
  assert result.score.value > 0.9


def test_a_constant_feature_moves_no_prediction(digits):
  train, train_labels, test, test_labels = digits
  settings = Lbfgs((0.1,))
  plain = logistic.logistic_regression(*digits, settings)
  more_train = np.concatenate([train, np.full((len(train), 1), 0.3)], axis=1)
  more_test = np.concatenate([test, np.full((len(test), 1), 99.0)], axis=1)
  more = logistic.logistic_regression(
    more_train, train_labels, more_test, test_labels, settings
  )
  np.testing.assert_allclose(more.scores, plain.scores, atol=1e-3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"protocol": Lbfgs(metric="map_11_point")}, "found one label per image"),
    ({"train_labels": None}, "train images have no labels"),
    ({"train_labels": np.zeros(1438, int)}, "never occur in train"),
    (
      {"train_labels": np.zeros(1438, int), "test_labels": np.zeros(359, int)},
      "All of train has one class",
    ),
    ({"train_labels": np.zeros((1438, 2), int)}, "needs one label per image"),
    (
      {
        "train_labels": np.zeros((1438, 2), int),
        "test_labels": np.zeros((359, 2), int),
        "protocol": Lbfgs(metric="map_11_point"),
      },
      "Class 0 needs train images with and without",
    ),
    (
      {
        "train_labels": np.full((1438, 2), 3),
        "test_labels": np.zeros((359, 2), int),
        "protocol": Lbfgs(metric="map_11_point"),
      },
      "expected [N, C] of 1, 0 and -1",
    ),
    ({"test_features": np.full((359, 64), np.inf)}, "hold NaN or infinity"),
  ],
)
def test_a_mistake_is_one_clear_line(digits, change, message):
  names = ("train_features", "train_labels", "test_features", "test_labels")
  assert [len(part) for part in digits] == [1438, 1438, 359, 359]
  with pytest.raises(UserError) as error:
    logistic.logistic_regression(
      **dict(zip(names, digits, strict=True)) | change
    )
  assert message in str(error.value)
  assert "\n" not in str(error.value)
