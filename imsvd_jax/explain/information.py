"""Entropies, mutual information and their finite-sample floors, in float64.

Everything here is NumPy on the host: it runs once, on sums. Logarithms are
natural, values are nats, and 0 log 0 = 0.
"""

import numpy as np
from scipy import special


def entropy(p: np.ndarray, axis: int | None = -1) -> np.ndarray:
  """Returns -sum p log p over `axis`, in nats."""
  return special.entr(np.asarray(p, np.float64)).sum(axis=axis)


def mutual_information(joint: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns [M, M] nats from the joint matrix [D, D] of soft variables.

  I(m1; m2) = sum_{d1, d2} P log (P / (p(m1; d1) p(m2; d2)))

  D = M * b, and each [b, b] block of P sums to 1. The diagonal is between two
  independent draws of one variable for an image: its entropy only if it is
  one-hot.
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
  """Returns [M], degrees of freedom of soft variables: sum_d Var(q_d) / p(d).

  The diagonal of the joint matrix [D, D] is E[q_d^2], so this is
  sum_d P(m, m; d, d) / p(m; d) - 1: occupied bins - 1 for one-hot codes, and
  0 for a variable that says the same of every image.
  """
  num_variables = joint.shape[0] // num_bins
  blocks = joint.reshape(num_variables, num_bins, num_variables, num_bins)
  blocks = np.einsum("mdme->mde", blocks).astype(np.float64)
  second, marginal = np.einsum("mdd->md", blocks), blocks.sum(2)
  share = np.divide(
    second, marginal, out=np.zeros_like(second), where=marginal > 0
  )
  return np.maximum(share.sum(1) - 1, 0)


def mutual_information_floor(
  joint: np.ndarray, num_bins: int, num_images: int
) -> np.ndarray:
  """Returns [M, M] nats, the information that independent variables would show.

  The plug-in estimate is biased up: to first order (Miller and Madow) by
  f1 f2 / (2 N), where f is the degrees of freedom of a variable. For one-hot
  codes that use all bins this is (b - 1)^2 / (2 N). `joint` is [D, D].
  """
  freedom = effective_freedom(joint, num_bins)
  return np.outer(freedom, freedom) / (2 * num_images)


def contingency(
  first: np.ndarray, second: np.ndarray, num_first: int, num_second: int
) -> np.ndarray:
  """Counts each pair of values: [num_first, num_second] int64."""
  flat = first.astype(np.int64) * num_second + second
  counts = np.bincount(flat, minlength=num_first * num_second)
  return counts.reshape(num_first, num_second)


def normalized_mutual_information(counts: np.ndarray) -> float:
  """Returns 2 I(A; B) / (H(A) + H(B)) from counts; 0 if both are constant."""
  total = counts.sum()
  if not total:
    return 0.0
  joint = counts / total
  rows, columns = entropy(joint.sum(1)), entropy(joint.sum(0))
  mean = (rows + columns) / 2
  information = rows + columns - entropy(joint, axis=None)
  return float(max(information, 0.0) / mean) if mean > 0 else 0.0


def chance_normalized_mutual_information(counts: np.ndarray) -> float:
  """Returns the score that independent A and B would have, to first order."""
  total = counts.sum()
  if not total:
    return 0.0
  rows, columns = counts.sum(1), counts.sum(0)
  mean = (entropy(rows / total) + entropy(columns / total)) / 2
  freedom = max((rows > 0).sum() - 1, 0) * max((columns > 0).sum() - 1, 0)
  return float(min(freedom / (2 * total) / mean, 1.0)) if mean > 0 else 0.0
