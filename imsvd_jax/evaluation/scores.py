"""Scores of predictions and their 95% intervals."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imsvd_jax.base.errors import UserError


class Accuracy(NamedTuple):
  """Fractions (0 to 1) of the images."""

  top1: float
  top5: float
  interval: tuple[float, float]  # 95% interval of top1


class Score(NamedTuple):
  """One metric (0 to 1) with its 95% interval."""

  value: float
  interval: tuple[float, float]


def class_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the place of each image's own class among all: 0 is the best.

  Of equal scores the lower class number comes first. NaN ranks behind every
  number, so a diverged classifier is never right. Maps scores [N, C] and labels
  int [N] to int32 [N].
  """
  own = np.take_along_axis(scores, labels[:, None], axis=1)  # [N, 1]
  lower = np.arange(scores.shape[1]) < labels[:, None]
  ahead = ~(scores <= own) | ((scores == own) & lower)
  return ahead.sum(axis=1, dtype=np.int32)


def accuracy(ranks: np.ndarray) -> Accuracy:
  """Returns top-1 and top-5 accuracy from `class_ranks` [N]."""
  right = int((ranks == 0).sum())
  return Accuracy(
    top1=right / len(ranks),
    top5=float((ranks < 5).mean()),
    interval=wilson_interval(right, len(ranks)),
  )


def mean_per_class(right: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean over classes of the accuracy within each.

  `right` is bool [N], `labels` int [N]; classes that do not occur do not count.
  scikit-learn's `balanced_accuracy_score` is the same number, but too slow for
  a bootstrap: 44 ms where this takes 2 (10,000 images, 100 classes).
  """
  total = np.bincount(labels)
  hits = np.bincount(labels, weights=right)
  present = total > 0
  return float((hits[present] / total[present]).mean())


def average_precision_11_point(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns VOC 2007's average precision of one class.

  The mean over recalls r = 0, 0.1, ..., 1 of the best precision at recall r or
  more (0 where no threshold reaches r). Images of equal score are retrieved
  together, so their order does not matter.

  Args:
    scores: [N].
    labels: int [N]: 1 has the class, 0 has not, -1 does not count (VOC's
      "difficult").
  """
  counted = labels >= 0
  scores, positive = scores[counted], labels[counted] > 0
  if not positive.any():
    raise UserError(
      "A class has no image in test, so its average precision is undefined: "
      "leave the class out."
    )
  order = np.argsort(-scores, kind="stable")
  scores, positive = scores[order], positive[order]
  last_of_equals: np.ndarray = np.append(scores[1:] != scores[:-1], True)
  retrieved: np.ndarray = np.flatnonzero(last_of_equals) + 1
  hits = np.cumsum(positive)[last_of_equals]
  # A tenth such as 0.3 is not a float: compare with room for its rounding.
  recall, precision = hits / positive.sum() + 1e-9, hits / retrieved
  best = np.maximum.accumulate(precision[::-1])[::-1]  # at this recall or more
  first = np.searchsorted(recall, np.linspace(0, 1, 11))
  return float(np.append(best, 0.0)[first].mean())


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
  """Returns the mean of `average_precision_11_point` over classes.

  `scores` are [N, C], and `labels` int [N, C] of 1, 0 and -1.
  """
  present = np.flatnonzero((labels > 0).any(axis=0))
  return float(
    np.mean(
      [average_precision_11_point(scores[:, c], labels[:, c]) for c in present]
    )
  )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
  """Returns Wilson's 95% score interval of a proportion of at least 1 trial."""
  from scipy import stats  # It takes a second, which most commands can save.

  interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
  return float(interval.low), float(interval.high)


def bootstrap_interval(
  statistic: Callable[[np.ndarray], float],
  num_images: int,
  *,
  num_resamples: int = 1000,
) -> tuple[float, float]:
  """Returns the 95% percentile interval over resampled test images.

  `statistic` maps the indices of a resample, int [num_images], to its value.
  The numbers are those of `scipy.stats.bootstrap`, which refuses one image.
  """
  generator = np.random.default_rng(0)
  values = [
    statistic(generator.integers(0, num_images, num_images))
    for _ in range(num_resamples)
  ]
  bounds: np.ndarray = np.percentile(values, [2.5, 97.5])
  return float(bounds[0]), float(bounds[1])


def _top1(scores: np.ndarray, labels: np.ndarray) -> Score:
  result = accuracy(class_ranks(scores, labels))
  return Score(result.top1, result.interval)


def _mean_per_class_score(scores: np.ndarray, labels: np.ndarray) -> Score:
  right = class_ranks(scores, labels) == 0
  interval = bootstrap_interval(
    lambda sample: mean_per_class(right[sample], labels[sample]), len(labels)
  )
  return Score(mean_per_class(right, labels), interval)


def _mean_average_precision_score(
  scores: np.ndarray, labels: np.ndarray
) -> Score:
  interval = bootstrap_interval(
    lambda sample: mean_average_precision(scores[sample], labels[sample]),
    len(labels),
    num_resamples=200,  # A resample sorts every class: milliseconds, not 10s.
  )
  return Score(mean_average_precision(scores, labels), interval)


class Metric(NamedTuple):
  """From scores [N, C] and labels to a number, with and without interval."""

  value: Callable[[np.ndarray, np.ndarray], float]
  score: Callable[[np.ndarray, np.ndarray], Score]


METRICS: dict[str, Metric] = {
  "top1": Metric(lambda *args: _top1(*args).value, _top1),
  "mean_per_class": Metric(
    lambda s, labels: mean_per_class(class_ranks(s, labels) == 0, labels),
    _mean_per_class_score,
  ),
  "map_11_point": Metric(mean_average_precision, _mean_average_precision_score),
}


def headline(
  score: Score | Accuracy, best: float | None = None
) -> Iterator[tuple[str, float]]:
  """Yields what a results table shows: "final", "best", "low", "high".

  Of an `Accuracy`, "top1" and "top5" follow.

  Args:
    score: The number to report, with its interval.
    best: The best of what the protocol measured on test (epochs, or values of
      k); the final number if it measured once.
  """
  yield "final", score[0]
  yield "best", score[0] if best is None else best
  yield "low", score.interval[0]
  yield "high", score.interval[1]
  if isinstance(score, Accuracy):
    yield from zip(("top1", "top5"), score[:2], strict=True)


def epochs_headline(
  history: Sequence[np.ndarray], train_loss: float
) -> Iterator[tuple[str, float]]:
  """Yields the headline and more of the ranks [N] after each epoch.

  The best epoch is chosen on test, and therefore optimistic.
  """
  top1 = [float((ranks == 0).mean()) for ranks in history]
  yield from headline(accuracy(history[-1]), max(top1))
  yield "best_epoch", int(np.argmax(top1))
  yield "train_loss", train_loss
