"""How rare the codes of images are: -log p, in nats."""

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import information

_CHUNK = 1024  # Images at once.
_PRIOR = 0.5  # Added to each count: a pair that never occurred has p > 0.
_MAX_DIMENSION = 1 << 14  # M b: the joint counts take 4 (M b)^2 bytes.


def marginal_surprise(codes: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns float32 [N]: -sum_i log p(c_i), as if variables were independent.

  Args:
    codes: [N, M].
    num_bins: b.
  """
  log_p = _log_marginals(codes, num_bins)
  total: np.ndarray = np.zeros(len(codes), np.float32)
  for m, column in enumerate(codes.T):
    total -= log_p[m, column]
  return total


def pair_surprise(codes: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns float32 [N]: -sum_i mean_{j != i} log p(c_i | c_j).

  It equals `marginal_surprise` for independent variables, and is larger for
  bins that are common, but not together.

  Raises:
    UserError: The joint counts would be too large, or there is one variable.
  """
  count, num_variables = codes.shape
  dimension = num_variables * num_bins
  if num_variables < 2 or dimension > _MAX_DIMENSION:
    raise UserError(
      f"Pairs of {num_variables} variables of {num_bins} bins: expected at"
      f" least 2 variables, and at most {_MAX_DIMENSION} bins in all; use"
      " --by=marginals."
    )
  offsets = np.arange(num_variables) * num_bins
  joint = np.zeros((dimension, dimension), np.float32)
  for i in range(num_variables):
    for j in range(i + 1):
      block = information.contingency(
        codes[:, i], codes[:, j], num_bins, num_bins
      )
      rows, columns = (slice(o, o + num_bins) for o in offsets[[i, j]])
      joint[rows, columns], joint[columns, rows] = block, block.T
  prior = _PRIOR / num_bins  # Of a pair, as of a bin of a marginal.
  log_joint = np.log((joint + prior) / (count + _PRIOR * num_bins))
  log_p = _log_marginals(codes, num_bins)
  found = np.empty(count, np.float32)
  for start in range(0, count, _CHUNK):
    part = codes[start : start + _CHUNK].astype(np.int64)
    places = part + offsets
    pairs = log_joint[places[:, :, None], places[:, None, :]]
    pairs[:, range(num_variables), range(num_variables)] = 0
    alone = log_p[range(num_variables), part].sum(axis=1)
    given = pairs.sum(axis=(1, 2)) / (num_variables - 1) - alone
    found[start : start + _CHUNK] = -given
  return found


def _log_marginals(codes: np.ndarray, num_bins: int) -> np.ndarray:
  """Returns log p of each bin, float32 [M, b]."""
  counts = np.stack([np.bincount(c, minlength=num_bins) for c in codes.T])
  p = (counts + _PRIOR) / (len(codes) + _PRIOR * num_bins)
  return np.log(p).astype(np.float32)


RARITY = {"marginals": marginal_surprise, "pairs": pair_surprise}
