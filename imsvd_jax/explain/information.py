"""Entropies, mutual information and their finite-sample floors, in float64.

Everything here is NumPy on the host: it runs once, on sums. Logarithms are
natural, values are nats, and 0 log 0 = 0.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def entropy(p: np.ndarray, axis: int = -1) -> np.ndarray:
  """-sum p log p over `axis`, in nats."""
  p = np.asarray(p, np.float64)
  return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=axis)


def mutual_information(joint: np.ndarray, num_bins: int) -> np.ndarray:
  """Mutual information between soft variables, from their joint matrix.

  I(m1; m2) = sum_{d1, d2} P log (P / (p(m1; d1) p(m2; d2)))

  Args:
    joint: [D, D], D = M * b, each [b, b] block sums to 1.
    num_bins: b.

  Returns:
    [M, M] float64, nats. The diagonal is what a soft variable says about an
    independent draw of itself, which is its entropy only when it is one-hot.
  """
  dimension = joint.shape[0]
  num_variables = dimension // num_bins
  result = np.empty((num_variables, num_variables))
  for m in range(num_variables):  # One row of blocks, to stay out of D^2.
    rows = np.asarray(joint[m * num_bins : (m + 1) * num_bins], np.float64)
    block = rows.reshape(num_bins, num_variables, num_bins)  # [b, M, b]
    p1, p2 = block.sum(2, keepdims=True), block.sum(0, keepdims=True)
    independent = p1 * p2
    positive = (block > 0) & (independent > 0)
    ratio = np.divide(
      block, independent, out=np.ones_like(block), where=positive
    )
    result[m] = np.sum(block * np.log(ratio), axis=(0, 2))
  return result


def effective_freedom(joint: np.ndarray, num_bins: int) -> np.ndarray:
  """Degrees of freedom of each soft variable: sum_d Var(q_d) / p(d).

  The diagonal of the joint matrix is E[q_d^2], so this is
  sum_d P(m, m; d, d) / p(m; d) - 1: occupied bins - 1 for one-hot codes, and
  0 for a variable that says the same of every image.

  Args:
    joint: [D, D].
    num_bins: b.

  Returns:
    [M] float64.
  """
  num_variables = joint.shape[0] // num_bins
  second = np.asarray(np.diagonal(joint), np.float64)  # [D]
  second = second.reshape(num_variables, num_bins)
  marginal = np.stack(
    [
      np.asarray(
        joint[m * num_bins : (m + 1) * num_bins, m * num_bins :][:, :num_bins],
        np.float64,
      ).sum(1)
      for m in range(num_variables)
    ]
  )
  share = np.divide(
    second, marginal, out=np.zeros_like(second), where=marginal > 0
  )
  return np.maximum(share.sum(1) - 1, 0)


def mutual_information_floor(
  joint: np.ndarray, num_bins: int, num_images: int
) -> np.ndarray:
  """What independent variables would show on so few images.

  The plug-in estimate is biased up. To first order (Miller and Madow) by
  f1 f2 / (2 N), with f the degrees of freedom of each variable; for one-hot
  codes that use all bins this is (b - 1)^2 / (2 N).

  Args:
    joint: [D, D].
    num_bins: b.
    num_images: N.

  Returns:
    [M, M] float64, nats.
  """
  freedom = effective_freedom(joint, num_bins)
  return np.outer(freedom, freedom) / (2 * num_images)


class Pair(NamedTuple):
  """Two variables and what they share, in nats."""

  first: int
  second: int
  mutual_information: float
  floor: float

  @property
  def excess(self) -> float:
    """Mutual information above its finite-sample floor."""
    return self.mutual_information - self.floor


def most_redundant_pairs(
  information: np.ndarray, floor: np.ndarray, count: int = 20
) -> list[Pair]:
  """The pairs of different variables that share most above the floor."""
  rows, columns = np.triu_indices(information.shape[0], 1)
  excess = (information - floor)[rows, columns]
  order = np.argsort(-excess, kind="stable")[:count]
  return [
    Pair(
      int(rows[i]),
      int(columns[i]),
      float(information[rows[i], columns[i]]),
      float(floor[rows[i], columns[i]]),
    )
    for i in order
  ]


def contingency(
  first: np.ndarray, second: np.ndarray, num_first: int, num_second: int
) -> np.ndarray:
  """Counts of each pair of values: [num_first, num_second] int64."""
  flat = first.astype(np.int64) * num_second + second
  counts = np.bincount(flat, minlength=num_first * num_second)
  return counts.reshape(num_first, num_second)


def normalized_mutual_information(counts: np.ndarray) -> float:
  """2 I(A; B) / (H(A) + H(B)) from a contingency table; 0 if both constant."""
  total = counts.sum()
  if not total:
    return 0.0
  joint = counts / total
  rows, columns = entropy(joint.sum(1)), entropy(joint.sum(0))
  mean = (rows + columns) / 2
  information = rows + columns - entropy(joint, axis=None)
  return float(max(information, 0.0) / mean) if mean > 0 else 0.0


def chance_normalized_mutual_information(counts: np.ndarray) -> float:
  """What independent A and B would show on so few images, to first order."""
  total = counts.sum()
  if not total:
    return 0.0
  rows, columns = counts.sum(1), counts.sum(0)
  mean = (entropy(rows / total) + entropy(columns / total)) / 2
  freedom = max((rows > 0).sum() - 1, 0) * max((columns > 0).sum() - 1, 0)
  return float(min(freedom / (2 * total) / mean, 1.0)) if mean > 0 else 0.0


def purity(class_counts: np.ndarray) -> np.ndarray:
  """Share of the most frequent class, [..., K] -> [...]; 0 when empty."""
  total = class_counts.sum(-1)
  return np.divide(
    class_counts.max(-1),
    total,
    out=np.zeros(total.shape),
    where=total > 0,
  )


class Factor(NamedTuple):
  """Something known about each image: a label, or a factor of variation.

  Attributes:
    name: What it is called.
    values: [N] int32, 0..K-1, or -1 where unknown.
    names: K names of the values.
  """

  name: str
  values: np.ndarray
  names: tuple[str, ...]


def make_factor(
  name: str,
  values: np.ndarray,
  names: Sequence[str] | None = None,
  *,
  num_quantiles: int = 10,
) -> Factor:
  """A factor from raw values.

  Integers (and booleans) are categories as they are, negative ones unknown.
  Floats are cut into `num_quantiles` bins of equal share; NaN is unknown, and
  equal values stay together. Anything else (strings) is sorted into
  categories.

  Args:
    name: What it is called.
    values: [N].
    names: Names of the categories; by default their numbers.
    num_quantiles: Bins of a continuous factor.

  Returns:
    The factor.
  """
  values = np.asarray(values)
  if values.dtype.kind == "f":
    return _continuous_factor(name, values.astype(np.float64), num_quantiles)
  if values.dtype.kind in "iub":
    codes = np.maximum(values.astype(np.int64), -1).astype(np.int32)
    count = int(codes.max(initial=-1)) + 1
    if names is not None and len(names) >= count:
      return Factor(name, codes, tuple(str(n) for n in names))
    return Factor(name, codes, tuple(str(k) for k in range(count)))
  categories, codes = np.unique(values.astype(str), return_inverse=True)
  return Factor(name, codes.astype(np.int32), tuple(map(str, categories)))


def _continuous_factor(name, values, num_quantiles):
  known = np.isfinite(values)
  edges = np.quantile(
    values[known] if known.any() else [0.0],
    np.linspace(0, 1, num_quantiles + 1),
  )
  inner = np.unique(edges[1:-1])
  inner = inner[inner > edges[0]]
  # A value equal to an edge belongs to the bin above it, always.
  codes = np.searchsorted(inner, values, side="right").astype(np.int32)
  codes[~known] = -1
  bounds = [edges[0], *inner, edges[-1]]
  digits = _decimals(edges[-1] - edges[0])
  names = tuple(
    f"{low:.{digits}f} to {high:.{digits}f}"
    for low, high in itertools.pairwise(bounds)
  )
  return Factor(name, codes, names)


def _decimals(span: float) -> int:
  """Decimals that tell apart a hundred steps of `span`."""
  return max(0, 2 - math.floor(math.log10(span))) if span > 0 else 2
