"""Logistic regression on frozen features.

The problem is convex and solved to its minimum, so there is nothing to tune but
the strength of the penalty, which is chosen on a held-out part of train.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import input_checks, protocols, subsets
from imsvd_jax.evaluation import scores as metrics
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.input_checks import Splits
from imsvd_jax.evaluation.inputs import Evaluator, Inputs


class LogisticResult(NamedTuple):
  """The score on test, and how the penalty was chosen."""

  score: metrics.Score  # by the metric asked for
  accuracy: metrics.Accuracy | None  # None for several labels per image
  inverse_penalty: float  # C, chosen on the held-out part of train
  held_out: dict[float, float]  # C tried -> metric on the held-out part
  scores: np.ndarray  # float32 [Q, C], log-odds of every class
  converged: bool


def run(
  inputs: Inputs, protocol: protocols.Lbfgs
) -> Iterator[tuple[str, float]]:
  """Yields the score on test, top-5 where defined, and the C chosen."""
  train, test = inputs.need("train", "test")
  result = logistic_regression(train, test, protocol)
  yield from metrics.headline(result.score)
  if result.accuracy is not None:
    yield "top1", result.accuracy.top1
    yield "top5", result.accuracy.top5
  yield "inverse_penalty", result.inverse_penalty
  yield "converged", float(result.converged)


def logistic_regression(
  train: Features, test: Features, protocol: protocols.Lbfgs
) -> LogisticResult:
  """Fits logistic regression with an L2 penalty by L-BFGS.

  Minimizes sum_i cross_entropy_i + |W|^2 / (2 C) over the softmax of all
  classes. With several labels per image (labels [N, C]) each class is a problem
  of its own against the rest. Features are standardized by the mean and
  deviation of train, so that one C means the same for every encoder. C is the
  value with the best metric on a held-out part of train (the smallest of
  equals); the model is then fitted on all of train.

  Args:
    train: Features [N, F] and labels int [N]; or int [N, C] of 1, 0 and -1
      (does not count).
    test: The same of Q images.
    protocol: The values of C to choose from, the metric, the share of each
      class of train that chooses C, and when a fit ends: after `max_iterations`
      steps of L-BFGS, or when no component of the gradient of the mean loss is
      larger than `tolerance`.

  Raises:
    UserError: Features, labels or the metric are unusable.
  """
  measure = metrics.METRICS[protocol.metric]
  several = np.ndim(train.labels) == 2
  check = _check_several if several else _check_one
  x_train, y_train, x_test, y_test, num_classes = check(
    train, test, protocol.metric
  )
  x_train, x_test = standardize(x_train, x_test)

  def fit(
    rows: np.ndarray | slice, penalties: Sequence[float], features: np.ndarray
  ) -> list[tuple[np.ndarray, bool]]:
    path = _path_of_several if several else _path
    x, y = x_train[rows], y_train[rows]
    fits = []
    with _threads_for(x_train.size * num_classes):
      for fitted in path(x, y, penalties, features, num_classes, protocol):
        fits.append(fitted)
        meter.add(1)
    return fits

  penalties = sorted(float(c) for c in protocol.inverse_penalties)
  # Raw pixels of large images take minutes.
  meter = console.Progress(
    "Logistic regression", len(penalties) + 1, unit="fits"
  )
  tried: dict[float, float] = {}
  if len(penalties) > 1:
    strata = np.argmax(y_train, axis=1) if several else y_train
    stay, away = subsets.split_classes(
      strata, protocol.held_out, seed=protocol.seed
    )
    fits = fit(stay, penalties, x_train[away])
    values = [measure.value(s, y_train[away]) for s, _ in fits]
    tried = dict(zip(penalties, values, strict=True))
  chosen = max(tried, key=tried.__getitem__, default=penalties[0])
  scores, converged = fit(slice(None), [chosen], x_test)[0]
  ranks = None if several else metrics.class_ranks(scores, y_test)
  return LogisticResult(
    score=measure.score(scores, y_test),
    accuracy=None if ranks is None else metrics.accuracy(ranks),
    inverse_penalty=chosen,
    held_out=tried,
    scores=scores,
    converged=converged,
  )


def standardize(
  train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns both with train's mean 0 and deviation 1 per feature.

  A feature that is constant on train becomes 0 there and on test: nothing can
  be learned from it, so it must not move a prediction.
  """
  mean = train.mean(axis=0, dtype=np.float64)
  deviation = train.std(axis=0, dtype=np.float64)
  constant = deviation <= 1e-6 * np.maximum(np.abs(mean), 1e-6)
  scale = np.where(constant, 0.0, 1 / np.where(constant, 1.0, deviation))
  mean, scale = mean.astype(np.float32), scale.astype(np.float32)
  return (train - mean) * scale, (test - mean) * scale


def _threads_for(multiplications: int) -> threadpool_limits:
  """Limits the threads of a fit whose products are of the given size.

  Two pools of waiting threads, scikit-learn's and BLAS's, fight over the cores:
  on two of them a fit of digits takes 3 to 10 times as long as with one thread,
  and minutes on a busy machine. Only large products gain from threads, and
  those are BLAS's.
  """
  api = "openmp" if multiplications > 1e9 else None  # None: both pools
  return threadpool_limits(limits=1, user_api=api)


def _check_one(train: Features, test: Features, metric: str) -> Splits:
  """Returns `check_splits` for one label per image."""
  if metric == "map_11_point":
    raise UserError(
      "The metric map_11_point needs labels [N, C] of 1, 0 and -1; found one "
      "label per image: choose top1 or mean_per_class."
    )
  checked = input_checks.check_splits(train, test)
  if len(np.unique(checked[1])) < 2:
    raise UserError(
      "All of train has one class; logistic regression needs at least two: "
      "check the labels and the split."
    )
  return checked


def _check_several(train: Features, test: Features, metric: str) -> Splits:
  """Checks several labels per image; as `_check_one`."""
  x_train, x_test = input_checks.check_pair(train.features, test.features)
  y_train, y_test = np.asarray(train.labels), np.asarray(test.labels)
  num_classes = y_train.shape[1]
  if metric != "map_11_point":
    raise UserError(
      f"The metric {metric} needs one label per image; found "
      f"{num_classes} per image: choose map_11_point."
    )
  if (
    y_train.shape != (len(x_train), num_classes)
    or y_test.shape != (len(x_test), num_classes)
    or not np.isin(y_train, (-1, 0, 1)).all()
    or not np.isin(y_test, (-1, 0, 1)).all()
  ):
    raise UserError(
      f"Labels of shape {y_train.shape} and {y_test.shape} for "
      f"{len(x_train)} and {len(x_test)} images; expected [N, C] of 1, 0 and"
      " -1."
    )
  for c in range(num_classes):
    if not {0, 1} <= set(y_train[:, c].tolist()):
      raise UserError(
        f"Class {c} needs train images with and without it; found one kind."
      )
  return x_train, y_train, x_test, y_test, num_classes


def _path(
  train: np.ndarray,
  labels: np.ndarray,
  penalties: Sequence[float],
  features: np.ndarray,
  num_classes: int,
  protocol: protocols.Lbfgs,
) -> Iterator[tuple[np.ndarray, bool]]:
  """Fits each C, ascending, from the solution of the last: a short way.

  Yields:
    Log-odds float32 [Q, C] of `features` and whether the fit converged; classes
    that train lacks have -infinity.
  """
  model = LogisticRegression(
    max_iter=protocol.max_iterations, tol=protocol.tolerance, warm_start=True
  )
  for penalty in penalties:
    model.set_params(C=penalty)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ConvergenceWarning)  # It is reported.
      model.fit(train, labels)
    odds = np.asarray(model.decision_function(features), np.float32)
    if odds.ndim == 1:  # Of two classes, only the second's odds are given.
      odds = np.stack([-odds, odds], axis=1)
    scores: np.ndarray = np.full(
      (len(features), num_classes), -np.inf, np.float32
    )
    scores[:, model.classes_] = odds
    yield scores, bool(model.n_iter_.max() < protocol.max_iterations)


def _path_of_several(
  train: np.ndarray,
  labels: np.ndarray,
  penalties: Sequence[float],
  features: np.ndarray,
  num_classes: int,
  protocol: protocols.Lbfgs,
) -> Iterator[tuple[np.ndarray, bool]]:
  """As `_path` for labels [N, C]: every class against the rest."""
  paths = []
  for c in range(num_classes):
    known = labels[:, c] >= 0
    x, y = train[known], labels[known, c]
    paths.append(_path(x, y, penalties, features, 2, protocol))
  for fits in zip(*paths, strict=True):
    scores = np.stack([scores[:, 1] for scores, _ in fits], axis=1)
    yield scores, all(converged for _, converged in fits)


EVALUATOR = Evaluator(run, needs=("train", "test"))
