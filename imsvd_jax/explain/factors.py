"""Labels and other known factors of the images, as categories."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from imsvd_jax.base.errors import UserError

_NUM_QUANTILES = 10  # Bins of a continuous factor.


class Factor(NamedTuple):
  """Something known about each image: a label, or a factor of variation."""

  name: str  # What it is called.
  values: np.ndarray  # [N] int32, 0..K-1, or -1 where unknown.
  names: tuple[str, ...]  # K names of the values.
  ordered: bool = False  # Whether the values are ranges, ascending.


def make_factor(
  name: str, values: np.ndarray, names: Sequence[str] | None = None
) -> Factor:
  """Returns a factor from raw values.

  Integers (and booleans) are categories as they are, negative ones unknown.
  Floats are cut into ten bins of equal share; NaN is unknown, and
  equal values stay together. Anything else (strings) is sorted into
  categories. `names` are those of the categories, by default their numbers.
  """
  values = np.asarray(values)
  if values.dtype.kind == "f":
    return _continuous_factor(name, values.astype(np.float64))
  if values.dtype.kind in "iub":
    codes = np.maximum(values.astype(np.int64), -1).astype(np.int32)
    count = int(codes.max(initial=-1)) + 1
    if names is not None and len(names) >= count:
      return Factor(name, codes, tuple(str(n) for n in names))
    return Factor(name, codes, tuple(str(k) for k in range(count)))
  categories, codes = np.unique(values.astype(str), return_inverse=True)
  return Factor(name, codes.astype(np.int32), tuple(map(str, categories)))


def _continuous_factor(name: str, values: np.ndarray) -> Factor:
  known = np.isfinite(values)
  edges = np.quantile(
    values[known] if known.any() else [0.0],
    np.linspace(0, 1, _NUM_QUANTILES + 1),
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
  return Factor(name, codes, names, ordered=True)


def _decimals(span: float) -> int:
  """Returns how many decimals tell a hundred steps of `span` apart."""
  return max(0, 2 - math.floor(math.log10(span))) if span > 0 else 2


def known_factors(
  indices: np.ndarray,
  labels: np.ndarray,
  values: Mapping[str, Any],
  label_names: Sequence[str] | None,
) -> tuple[Factor, ...]:
  """Returns the label, if there are any, and every other factor.

  Of the images `indices`, [N] int64, ascending; `labels` are [N] int, -1 where
  unknown, and `values` those of `images.Images.factors`.

  Raises:
    UserError: A factor has too few values.
  """
  found = []
  if (labels >= 0).any():
    found.append(make_factor("label", labels, label_names))
  for name, column in values.items():
    found.append(make_factor(name, _chosen(name, column, indices)))
  return tuple(found)


def _chosen(name: str, column: Any, indices: np.ndarray) -> np.ndarray:
  """Returns the values of a factor for the images of `indices`."""
  if isinstance(column, Mapping):
    return np.asarray([column[int(i)] for i in indices])
  column = np.asarray(column)
  if len(column) <= indices[-1]:
    raise UserError(
      f"Factor {name!r} has {len(column)} values, but the data set has an image"
      f" of index {indices[-1]}; give one value per image."
    )
  return column[indices]
