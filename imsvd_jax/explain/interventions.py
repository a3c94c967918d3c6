"""Meaning by intervention: change one factor of an image, and nothing else.

Where images are drawn from factors, each is drawn twice, the second time with
one factor of another image. The bins that flip depend on that factor: unlike a
correlation, this says what a variable reacts to.
"""

import csv
import io
from collections.abc import Callable, Sequence
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
  """Which variables flip when a factor changes."""

  factors: tuple[str, ...]
  images: np.ndarray  # int [K], images whose factor changed.
  flips: np.ndarray  # [K, M], share of these whose bin flips.
  selectivity: tuple[Selectivity, ...]

  def lines(self) -> list[str]:
    """Returns a table as text."""
    width = max(map(len, self.factors))
    lines = ["Flips when one factor changes and nothing else does"]
    for one in self.selectivity:
      lines.append(
        f"  {one.factor:<{width}}  v{one.variable} {one.flips:.2f}, others"
        f" {one.others:.2f}, ratio {one.ratio:.1f} [{one.low:.1f},"
        f" {one.high:.1f}]"
      )
    return lines

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
) -> Interventions:
  """Changes each factor of all images, one at a time.

  Columns such as foreground_red and foreground_green change together, as the
  factor "foreground".

  Args:
    codes_of: Images -> their bins, int [n, M], M >= 2.
    draw: Factors float32 [n, columns] -> images.
    factors: Those of the images, [N, columns].
    names: Of the columns.
  """
  groups: dict[str, list[int]] = {}
  for column, name in enumerate(names):
    groups.setdefault(name.partition("_")[0], []).append(column)
  order = np.random.default_rng(0)
  before = codes_of(draw(factors))
  images, flips, selectivity = [], [], []
  for name, columns in groups.items():
    changed = factors.copy()
    # Of other images: the factor keeps its distribution.
    changed[:, columns] = order.permutation(factors[:, columns])
    moved = (changed != factors).any(axis=1)
    is_flipped = codes_of(draw(changed[moved])) != before[moved]
    images.append(len(is_flipped))
    flips.append(is_flipped.mean(axis=0))
    selectivity.append(_selectivity(name, is_flipped))
  return Interventions(
    tuple(groups), np.array(images), np.stack(flips), tuple(selectivity)
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
