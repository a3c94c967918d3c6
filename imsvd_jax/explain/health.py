"""A handful of indicators that tell a working code from a broken one."""

from typing import NamedTuple

import numpy as np

from imsvd_jax.explain import embedding_map, information
from imsvd_jax.explain.analysis import Analysis

LEVELS = ("good", "fair", "poor")


class Indicator(NamedTuple):
  """One number, what it means and how it looks.

  Attributes:
    name: Short title.
    value: The number as text, with its unit.
    share: 0..1, where it lies on a scale whose right end is best.
    level: "good", "fair" or "poor".
    meaning: One sentence.
  """

  name: str
  value: str
  share: float
  level: str
  meaning: str


def _level(value: float, good: float, fair: float) -> str:
  """Thresholds in the direction in which `good` exceeds `fair`, or not."""
  sign = 1 if good >= fair else -1
  if sign * value >= sign * good:
    return "good"
  return "fair" if sign * value >= sign * fair else "poor"


def effective_bins(analysis: Analysis) -> np.ndarray:
  """[M], exp of the entropy of the marginal: 1 (collapsed) .. b (uniform)."""
  return np.exp(analysis.entropies())


def indicators(analysis: Analysis) -> list[Indicator]:
  """The indicators that the analysis allows."""
  found = []
  if analysis.has_codes:
    found += _code_indicators(analysis)
  if analysis.feature_covariance is not None:
    found.append(_rank_indicator(analysis))
  return found


def _code_indicators(analysis):
  bins = analysis.num_bins
  used = float(np.mean(analysis.entropies()) / np.log(bins))
  empty = float((analysis.usage == 0).mean())
  collapsed = int((effective_bins(analysis) < 1.5).sum())
  confidence = float(analysis.confidence.mean())
  found = [
    Indicator(
      "Entropy used",
      f"{used:.0%}",
      used,
      _level(used, 0.8, 0.5),
      f"Mean entropy of a variable, of the {np.log(bins):.2f} nats that "
      f"{bins} equally used bins would have.",
    ),
    Indicator(
      "Confidence",
      f"{confidence:.2f}",
      confidence,
      _level(confidence, 0.8, 0.5),
      "Mean largest probability: 1 when every variable decides for one bin.",
    ),
    Indicator(
      "Empty bins",
      f"{empty:.1%}",
      1 - empty,
      _level(empty, 0.02, 0.2),
      "Bins that are no image's most probable one.",
    ),
    Indicator(
      "Collapsed variables",
      f"{collapsed} of {analysis.num_variables}",
      1 - collapsed / analysis.num_variables,
      _level(collapsed / analysis.num_variables, 0.0, 0.05),
      "Variables that use fewer than 1.5 bins and so say nothing.",
    ),
  ]
  if analysis.mutual_information is not None and analysis.num_variables > 1:
    found.append(_independence_indicator(analysis))
  if analysis.agreement is not None:
    agreement = float(analysis.agreement.mean())
    found.append(
      Indicator(
        "Agreement of views",
        f"{agreement:.0%}",
        agreement,
        _level(agreement, 0.7, 0.4),
        "How often two augmented views of an image fall into the same bin.",
      )
    )
  return found


def _independence_indicator(analysis):
  rows, columns = np.triu_indices(analysis.num_variables, 1)
  excess = (analysis.mutual_information - analysis.floor)[rows, columns]
  entropy = max(float(analysis.entropies().mean()), 1e-12)
  shared = max(float(excess.mean()) / entropy, 0.0)
  return Indicator(
    "Shared information",
    f"{shared:.1%}",
    1 - min(shared, 1.0),
    _level(shared, 0.05, 0.2),
    "Mean mutual information of two variables above its finite-sample floor, "
    "as a share of their entropy.",
  )


def _rank_indicator(analysis):
  rank = embedding_map.effective_rank(analysis.feature_covariance)
  width = len(analysis.feature_mean)
  share = rank / width
  return Indicator(
    "Effective rank",
    f"{rank:.1f} of {width}",
    share,
    _level(share, 0.1, 0.02),
    "How many directions the features use: exp of the entropy of their "
    "normalized spectrum.",
  )


def neighbour_indicator(
  factor: str, agreement: float, chance: float
) -> Indicator:
  """How often neighbours in feature space have the same label."""
  beyond = max((agreement - chance) / max(1 - chance, 1e-12), 0.0)
  return Indicator(
    "Neighbours alike",
    f"{agreement:.0%}",
    agreement,
    _level(beyond, 0.5, 0.2),
    f"How often an image's nearest neighbours have its {factor}; by chance "
    f"{chance:.0%}.",
  )


def summary(analysis: Analysis) -> str:
  """One sentence about the whole."""
  images = f"{analysis.num_images:,} images"
  if not analysis.has_codes:
    return f"{images}, features of {len(analysis.feature_mean)} dimensions."
  total = float(analysis.entropies().sum() / np.log(2))
  own = float(analysis.conditional_entropy.mean() / np.log(2))
  text = (
    f"{images}, {analysis.num_variables} variables of {analysis.num_bins} "
    f"bins. Taken alone the variables carry {total:,.0f} bits; an image "
    f"leaves {own:.2f} bits of doubt in each."
  )
  return text


def best_factors(analysis: Analysis, count: int = 5) -> list[dict]:
  """By factor, the variables that know most of it.

  Beside them goes the best variable of the network with random weights, None
  where that was not measured.
  """
  if analysis.nmi is None:
    return []
  table = []
  for number, factor in enumerate(analysis.factors):
    order = np.argsort(-analysis.nmi[:, number], kind="stable")[:count]
    table.append(
      {
        "factor": factor.name,
        "values": len(factor.names),
        "variables": [int(m) for m in order],
        "nmi": [float(analysis.nmi[m, number]) for m in order],
        "chance": float(analysis.nmi_chance[order[0], number]),
        "untrained": None
        if analysis.nmi_untrained is None
        else float(analysis.nmi_untrained[:, number].max()),
      }
    )
  return table


def bin_purity(analysis: Analysis) -> dict[str, np.ndarray]:
  """By factor, [M, b] share of the most frequent value in each bin."""
  return {
    name: information.purity(counts)
    for name, counts in analysis.class_counts.items()
  }
