"""Meaning by intervention: change one thing of an image, and nothing else.

Where images are drawn from factors, each is drawn twice, the second time with
one factor of another image. Any image can be edited: see `probes`. The bins
that flip depend on what was changed: unlike a correlation, this says what a
variable reacts to.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # Of intervals of 95%.
_RESAMPLES = 1000


class Selectivity(NamedTuple):
  """How much more the variable of a factor flips than the others.

  The variable is chosen on one half of the images; the numbers are of the
  other half.
  """

  factor: str
  variable: int
  flips: float  # Share of images whose bin flips.
  others: float  # Mean share of the other variables.
  ratio: float
  low: float  # The 95% interval of the ratio, by resampling of the images.
  high: float


class Interventions(NamedTuple):
  """Which variables flip when a factor, or an edit, changes the image."""

  factors: tuple[str, ...]
  images: np.ndarray  # int [K], images that changed.
  flips: np.ndarray  # [K, M], share of these whose bin flips.
  selectivity: tuple[Selectivity, ...]  # Empty for one variable or image.

  def lines(self, title: str) -> list[str]:
    """Returns the selectivity as text under a title, if there is any."""
    if not self.selectivity:
      return []
    width = max(map(len, self.factors))
    return [
      title,
      *(
        f"  {one.factor:<{width}}  v{one.variable} {one.flips:.2f}, others"
        f" {one.others:.2f}, ratio {one.ratio:.1f} [{one.low:.1f},"
        f" {one.high:.1f}]"
        for one in self.selectivity
      ),
    ]

  def table(self) -> str:
    """Returns flips of each factor and variable with 95% intervals, as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["factor", "variable", "images", "flips", "low", "high"])
    for name, count, row in zip(
      self.factors, self.images, self.flips, strict=True
    ):
      for variable, rate in enumerate(row):
        low, high = wilson(rate, int(count))
        numbers = [f"{x:.4f}" for x in (rate, low, high)]
        writer.writerow([name, variable, count, *numbers])
    return file.getvalue()


def wilson(rate: float, count: int) -> tuple[float, float]:
  """Returns Wilson's 95% interval of a share of `count` images."""
  square = _Z**2 / count
  center = (rate + square / 2) / (1 + square)
  spread = _Z * np.sqrt(rate * (1 - rate) / count + square / (4 * count))
  half = spread / (1 + square)
  return max(0.0, center - half), min(1.0, center + half)


def intervene(
  codes_of: Callable[[np.ndarray], np.ndarray],
  draw: Callable[[np.ndarray], np.ndarray],
  factors: np.ndarray,
  names: Sequence[str],
) -> Interventions | None:
  """Changes each factor of all images, one at a time.

  Args:
    codes_of: Images -> their bins, int [n, M].
    draw: Factors float32 [n, columns] -> images.
    factors: Those of the images, [N, columns].
    names: Of the factor of each column; columns of one name change together.

  Returns:
    What flipped; None where all images have the same factors.
  """
  groups: dict[str, list[int]] = {}
  for column, name in enumerate(names):
    groups.setdefault(name, []).append(column)
  order = np.random.default_rng(0)
  before = codes_of(draw(factors))
  flips = {}
  for name, columns in groups.items():
    changed = factors.copy()
    # Of other images: the factor keeps its distribution.
    changed[:, columns] = order.permutation(factors[:, columns])
    moved = (changed != factors).any(axis=1)
    if moved.any():
      flips[name] = codes_of(draw(changed[moved])) != before[moved]
  return judge(flips) if flips else None


def judge(flips: Mapping[str, np.ndarray]) -> Interventions:
  """Sums up which bins flipped: bool [n, M] by factor or edit."""
  return Interventions(
    tuple(flips),
    np.array([len(is_flipped) for is_flipped in flips.values()]),
    np.stack([is_flipped.mean(axis=0) for is_flipped in flips.values()]),
    tuple(
      _selectivity(name, is_flipped)
      for name, is_flipped in flips.items()
      if min(is_flipped.shape) > 1
    ),
  )


def _selectivity(factor: str, is_flipped: np.ndarray) -> Selectivity:
  """Measures the variable that is chosen on half of the images [n, M]."""
  first, second = is_flipped[::2], is_flipped[1::2]
  variable = int(first.mean(axis=0).argmax())
  own = second[:, variable].astype(np.float64)
  others = np.delete(second, variable, axis=1).mean(axis=1)
  rows = np.random.default_rng(0).integers(0, len(own), (_RESAMPLES, len(own)))
  tiny = 1 / (own.size * max(is_flipped.shape[1] - 1, 1))
  ratio = lambda a, b: a / np.maximum(b, tiny)
  ratios = ratio(own[rows].mean(axis=1), others[rows].mean(axis=1))
  low, high = np.quantile(ratios, (0.025, 0.975))
  return Selectivity(
    factor,
    variable,
    float(own.mean()),
    float(others.mean()),
    float(ratio(own.mean(), others.mean())),
    float(low),
    float(high),
  )
