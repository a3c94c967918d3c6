"""Metrics against cases computed by hand and against their definitions."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import scores as metrics


def test_class_ranks_by_hand():
  rows = [[0.1, 0.7, 0.2]] * 2 + [[0.5, 0.5, 0.0]] * 2 + [[np.nan] * 3]
  scores = np.array(rows)
  labels = np.array([1, 0, 0, 1, 0])
  # Ties go to the lower class; a score that is no number is never right.
  assert metrics.class_ranks(scores, labels).tolist() == [0, 2, 0, 1, 3]


def test_top1_and_top5_equal_scikit_learn():
  generator = np.random.default_rng(0)
  scores = generator.normal(size=(200, 12))
  labels = generator.integers(0, 12, 200)
  found = metrics.accuracy(metrics.class_ranks(scores, labels))
  every = np.arange(12)
  top1 = top_k_accuracy_score(labels, scores, k=1, labels=every)
  top5 = top_k_accuracy_score(labels, scores, k=5, labels=every)
  assert (found.top1, found.top5) == pytest.approx((top1, top5))


def test_mean_per_class_by_hand():
  labels = np.array([0, 0, 0, 0, 2, 2])
  right = np.array([True, True, True, False, False, True])
  # 3/4 of class 0 and 1/2 of class 2; class 1 does not occur.
  assert metrics.mean_per_class(right, labels) == pytest.approx(0.625)
  predictions = np.where(right, labels, 1)
  with pytest.warns(UserWarning, match="y_pred contains classes"):
    expected = balanced_accuracy_score(labels, predictions)
  assert metrics.mean_per_class(right, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("ranking", "expected"),
  [
    # Precision 1 at recall .5 (6 points), 2/3 at recall 1 (5 points).
    ([1, 0, 1, 0], (6 * 1 + 5 * 2 / 3) / 11),
    # Precision 1/2 at recall .5, but 2/3 further on: the best from there.
    ([0, 1, 1], 2 / 3),
    ([1, 1, 0, 0], 1.0),
    ([0, 0, 0, 1], 1 / 4),
    # One of three at precision 1: recalls 0, .1, .2, .3; then 2/4 and 3/5,
    # and the best from recall 2/3 on is 3/5.
    ([1, 0, 0, 1, 1], (4 * 1 + 7 * 3 / 5) / 11),
    # "Difficult" images do not count.
    ([-1, 1, -1, 1, 0], 1.0),
  ],
)
def test_11_point_average_precision_by_hand(ranking, expected):
  labels = np.array(ranking)
  scores = -np.arange(len(labels), dtype=float)
  found = metrics.average_precision_11_point(scores, labels)
  assert found == pytest.approx(expected)


def test_recall_of_exactly_a_tenth_counts():
  # Ten positives, the first three at precision 1: recall 0.3 is reached.
  labels = np.array([1, 1, 1] + [0] * 89 + [1] * 7 + [0])
  scores = -np.arange(len(labels), dtype=float)
  found = metrics.average_precision_11_point(scores, labels)
  assert found == pytest.approx((4 * 1 + 7 * 10 / 99) / 11)


def test_images_of_equal_score_come_together():
  # Two of four retrieved at once: precision 1/2 at every recall up to 1.
  scores, labels = np.array([1.0, 1, 0, 0]), np.array([1, 0, 1, 0])
  for order in ([0, 1, 2, 3], [1, 0, 3, 2]):
    found = metrics.average_precision_11_point(scores[order], labels[order])
    assert found == pytest.approx(0.5)


def test_mean_average_precision_leaves_out_absent_classes():
  scores = np.array([[3.0, 1, 0], [2, 2, 0], [1, 3, 0]])
  labels = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
  assert metrics.mean_average_precision(scores, labels) == pytest.approx(2 / 3)
  with pytest.raises(UserError, match="no image in test"):
    metrics.average_precision_11_point(scores[:, 2], labels[:, 2])


def test_wilson_interval_by_hand():
  # 8 of 10: the textbook's .490 to .943.
  low, high = metrics.wilson_interval(8, 10)
  assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
  assert metrics.wilson_interval(10, 10)[1] == 1.0
  assert metrics.wilson_interval(0, 10)[0] == 0.0


def test_the_bootstrap_is_scipys():
  generator = np.random.default_rng(2)
  labels, right = generator.integers(0, 7, 90), generator.random(90) < 0.6
  mean = lambda sample: metrics.mean_per_class(right[sample], labels[sample])
  expected = stats.bootstrap(
    (np.arange(90),),
    mean,
    n_resamples=1000,
    vectorized=False,
    method="percentile",
    random_state=np.random.default_rng(0),
  ).confidence_interval
  assert metrics.bootstrap_interval(mean, 90) == tuple(expected)
  assert metrics.bootstrap_interval(lambda _: 1.0, 1) == (1.0, 1.0)


def test_bootstrap_interval_covers_like_wilson():
  right = np.arange(400) < 300
  low, high = metrics.bootstrap_interval(
    lambda sample: float(right[sample].mean()), 400
  )
  assert (low, high) == pytest.approx(
    metrics.wilson_interval(300, 400), abs=0.01
  )


def test_scores_hold_their_own_value():
  generator = np.random.default_rng(1)
  scores = generator.normal(size=(60, 4))
  labels = generator.integers(0, 4, 60)
  for name, some in (
    ("top1", labels),
    ("mean_per_class", labels),
    ("map_11_point", np.eye(4, dtype=int)[labels]),
  ):
    metric = metrics.METRICS[name]
    score = metric.score(scores, some)
    assert score.value == metric.value(scores, some)
    assert score.interval[0] < score.value < score.interval[1]
