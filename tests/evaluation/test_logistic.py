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
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.protocols import Lbfgs


@pytest.fixture(scope="module")
def digits():
  features, labels = load_digits(return_X_y=True)
  features = (features / 16).astype(np.float32)
  train, test = subsets.split_classes(labels, 0.2, seed=0)
  return [Features(features[rows], labels[rows]) for rows in (train, test)]


@pytest.fixture(scope="module")
def result(digits):
  return logistic.logistic_regression(*digits, Lbfgs())


def test_equals_scikit_learn_at_the_chosen_penalty(digits, result):
  (train, train_labels), (test, test_labels) = digits
  scaler = StandardScaler().fit(train)
  # Pixels that are black in all of train teach nothing: zero on both sides.
  alive = train.std(axis=0) > 0
  train, test = (scaler.transform(x)[:, alive] for x in (train, test))
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
  train, test = digits
  best = max(result.held_out.values())
  assert result.held_out[result.inverse_penalty] == best
  assert len(result.held_out) == 5
  # Test labels that say the opposite change the score and nothing else.
  wrong = test._replace(labels=test.labels[::-1])
  shuffled = logistic.logistic_regression(train, wrong, Lbfgs())
  assert shuffled.inverse_penalty == result.inverse_penalty
  np.testing.assert_array_equal(shuffled.scores, result.scores)
  assert shuffled.score.value < 0.3


def test_it_is_fast_enough_to_run_after_every_training(digits):
  # 192 features of 1437 images: 1-2 s on two cores, with room for busy ones.
  weights = np.random.default_rng(0).normal(size=(64, 192)).astype(np.float32)
  start = time.monotonic()
  more = (Features(np.maximum(x @ weights, 0), y) for x, y in digits)
  logistic.logistic_regression(*more, Lbfgs())
  assert time.monotonic() - start < 10


def test_two_classes_and_a_gap_in_their_numbers(digits):
  train, test = (
    Features(x[y % 7 == 1], y[y % 7 == 1])  # 1 and 8
    for x, y in digits
  )
  result = logistic.logistic_regression(
    train, test, Lbfgs((0.1,), "mean_per_class")
  )
  assert result.held_out == {}
  assert result.scores.shape == (len(test.labels), 9)
  assert result.score.value > 0.9
  assert result.accuracy.top5 == 1.0


def test_several_labels_per_image_are_problems_of_their_own(digits):
  (train, train_labels), (test, test_labels) = digits
  # Even digits, and digits with a hole; some "difficult" ones do not count.
  facts = np.stack(
    [np.arange(10) % 2 == 0, np.isin(np.arange(10), (0, 6, 8, 9))], axis=1
  ).astype(np.int32)
  several, test_several = facts[train_labels], facts[test_labels]
  several[::50, 1] = -1
  result = logistic.logistic_regression(
    Features(train, several),
    Features(test, test_several),
    Lbfgs((0.01, 0.1), "map_11_point"),
  )
  assert result.accuracy is None
  known = several[:, 1] >= 0
  alone = logistic.logistic_regression(
    Features(train[known], several[known, 1]),
    Features(test, test_several[:, 1]),
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
  plain = logistic.logistic_regression(*digits, Lbfgs((0.1,)))
  more = (
    Features(np.pad(x, [(0, 0), (0, 1)], constant_values=constant), y)
    for (x, y), constant in zip(digits, (0.3, 99.0), strict=True)
  )
  more = logistic.logistic_regression(*more, Lbfgs((0.1,)))
  np.testing.assert_allclose(more.scores, plain.scores, atol=1e-3)


ONE, SEVERAL = Lbfgs(), Lbfgs(metric="map_11_point")


def labels(*shape, value=0):
  return {"labels": np.full(shape, value)}


@pytest.mark.parametrize(
  ("protocol", "train", "test", "message"),
  [
    (SEVERAL, {}, {}, "found one label per image"),
    (ONE, {"labels": None}, {}, "train images have no labels"),
    (ONE, labels(1438), {}, "never occur in train"),
    (ONE, labels(1438), labels(359), "All of train has one class"),
    (ONE, labels(1438, 2), {}, "needs one label per image"),
    (SEVERAL, labels(1438, 2), labels(359, 2), "Class 0 needs train images wi"),
    (SEVERAL, labels(1438, 2, value=3), labels(359, 2), "expected [N, C] of 1"),
    (ONE, {}, {"features": np.full((359, 64), np.inf)}, "hold NaN or infinity"),
  ],
)
def test_a_mistake_is_one_clear_line(digits, protocol, train, test, message):
  splits = digits[0]._replace(**train), digits[1]._replace(**test)
  with pytest.raises(UserError) as error:
    logistic.logistic_regression(*splits, protocol)
  assert message in str(error.value)
  assert "\n" not in str(error.value)
