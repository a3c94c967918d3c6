"""A handful of indicators that tell a working code from a broken one."""

from typing import Any, NamedTuple

import numpy as np

from imsvd_jax.explain import embedding_map, information
from imsvd_jax.explain.analysis import Analysis, Code, Pairs, Views
from imsvd_jax.explain.factors import Factor

NO_VERDICT = "no verdict"  # A level, beside "good", "fair" and "poor".
# Two variables that share more of their entropy say mostly the same.
_MOSTLY_SHARED = 0.5
# Below this mean probability of their bin, variables decide nothing.
_LEAST_CONFIDENCE = 0.5
_CONFIDENCE = "Confidence"


class Indicator(NamedTuple):
  """One number, what it means and how it looks."""

  name: str  # Short title.
  value: str  # The number as text, with its unit.
  share: float  # 0..1, where it lies on a scale whose right end is best.
  level: str  # "good", "fair", "poor" or NO_VERDICT.
  meaning: str  # One sentence.


def _level(value: float, good: float, fair: float) -> str:
  """Returns the level of a value between two thresholds.

  Larger values are better where `good` exceeds `fair`, else smaller ones.
  """
  sign = 1 if good >= fair else -1
  if sign * value >= sign * good:
    return "good"
  return "fair" if sign * value >= sign * fair else "poor"


def effective_bins(code: Code) -> np.ndarray:
  """Returns [M], exp of the marginal entropy: 1 (collapsed) to b (uniform)."""
  return np.exp(code.entropies())


def indicators(analysis: Analysis) -> list[Indicator]:
  """Returns the indicators that the analysis allows."""
  found = []
  if analysis.code is not None:
    found += _code_indicators(analysis.code)
    if analysis.pairs is not None and analysis.num_variables > 1:
      label = analysis.factors[0] if analysis.factors else None
      found.append(
        _independence_indicator(analysis.code, analysis.pairs, label)
      )
    if analysis.code.confidence.mean() < _LEAST_CONFIDENCE:
      found = [_undecided(indicator) for indicator in found]
  if analysis.views is not None:
    found.append(_agreement_indicator(analysis.views))
  if analysis.features.feature_covariance is not None:
    found.append(_rank_indicator(analysis.features.feature_covariance))
  return found


def _undecided(indicator: Indicator) -> Indicator:
  """Returns an indicator of variables whose bins mean nothing yet.

  The probabilities of random weights are nearly uniform: such variables use
  every bin and share nothing, and know nothing either.
  """
  if indicator.name == _CONFIDENCE or indicator.level == "poor":
    return indicator
  return indicator._replace(
    level=NO_VERDICT,
    meaning=f"{indicator.meaning} No verdict while confidence is poor.",
  )


def _code_indicators(code: Code) -> list[Indicator]:
  bins = code.num_bins
  used = float(np.mean(code.entropies()) / np.log(bins))
  empty = float((code.usage == 0).mean())
  collapsed = int((effective_bins(code) < 1.5).sum())
  confidence = float(code.confidence.mean())
  return [
    Indicator(
      "Entropy used",
      f"{used:.0%}",
      used,
      _level(used, 0.8, 0.5),
      f"Mean entropy of a variable's mean probabilities, of the "
      f"{np.log(bins):.2f} nats that {bins} equally used bins would have.",
    ),
    Indicator(
      _CONFIDENCE,
      f"{confidence:.2f}",
      confidence,
      _level(confidence, 0.8, _LEAST_CONFIDENCE),
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
      f"{collapsed} of {code.num_variables}",
      1 - collapsed / code.num_variables,
      _level(collapsed / code.num_variables, 0.0, 0.05),
      "Variables that use fewer than 1.5 bins and so say nothing.",
    ),
  ]


def _agreement_indicator(views: Views) -> Indicator:
  agreement = float(views.agreement.mean())
  return Indicator(
    "Agreement of views",
    f"{agreement:.0%}",
    agreement,
    _level(agreement, 0.7, 0.4),
    "How often two augmented views of an image, as in training, fall into the"
    " same bin.",
  )


def _independence_indicator(
  code: Code, pairs: Pairs, label: Factor | None
) -> Indicator:
  excess = pairs.excess()[np.triu_indices(code.num_variables, 1)]
  entropy = max(float(code.entropies().mean()), 1e-12)
  shared = max(float(excess.mean()) / entropy, 0.0)
  meaning = (
    "Mean mutual information of two variables above its finite-sample floor, "
    "as a share of their entropy."
  )
  content, needed = _needed_share(label, entropy)
  if label is not None and needed > _MOSTLY_SHARED:
    meaning += (
      f" Two variables that told the {label.name}, {content:.2f} nats, as well"
      f" as they can would share {needed:.0%}."
    )
  return Indicator(
    "Shared information",
    f"{shared:.1%}",
    1 - min(shared, 1.0),
    _level(shared, 0.05, max(needed, _MOSTLY_SHARED)),
    meaning,
  )


def _needed_share(label: Factor | None, entropy: float) -> tuple[float, float]:
  """Returns what two variables share that tell a label as well as they can.

  Of H nats each and a label of I nats: if I <= H, both tell all of it and share
  at least I. Else they tell nothing else, H(a, b) <= I, and as H(a, b) = 2 H -
  I(a; b), they share at least 2 H - I.

  Returns:
    (I, the share of H); zeros where no label is known.
  """
  known = np.empty(0, int) if label is None else label.values[label.values >= 0]
  if not len(known):
    return 0.0, 0.0
  content = float(information.entropy(np.bincount(known) / len(known)))
  return content, max(min(content, 2 * entropy - content) / entropy, 0.0)


def _rank_indicator(covariance: np.ndarray) -> Indicator:
  rank = embedding_map.effective_rank(covariance)
  width = len(covariance)
  share = rank / width
  return Indicator(
    "Effective rank",
    f"{rank:.1f} of {width}",
    share,
    _level(share, 0.1, 0.02),
    "How many directions the features use: exp of the entropy of their "
    "normalized spectrum.",
  )


def neighbor_indicator(
  factor: Factor, rows: np.ndarray, neighbors: np.ndarray
) -> Indicator:
  """Returns how often neighbors in feature space have the same label.

  `rows` [S] are places of images in the factor's values, and `neighbors` [S, k]
  the neighbors of each, as places in `rows`.
  """
  agreement, chance = embedding_map.neighbor_agreement(
    neighbors, factor.values[rows]
  )
  beyond = max((agreement - chance) / max(1 - chance, 1e-12), 0.0)
  return Indicator(
    "Neighbors alike",
    f"{agreement:.0%}",
    agreement,
    _level(beyond, 0.5, 0.2),
    f"How often an image's nearest neighbors have its {factor.name}; by chance "
    f"{chance:.0%}.",
  )


def summary(analysis: Analysis) -> str:
  """Returns a sentence about the whole."""
  images = f"{analysis.num_images:,} images"
  code = analysis.code
  if code is None:
    width = len(analysis.features.feature_mean)
    return f"{images}, features of {width} dimensions."
  total = float(code.entropies().sum())
  own = float(code.conditional_entropy.mean())
  return (
    f"{images}, {code.num_variables} variables of {code.num_bins} bins. Taken"
    f" alone the variables carry {total:,.0f} nats; the mean conditional"
    f" entropy of a variable given the image is {own:.2f} nats."
  )


def best_factors(analysis: Analysis) -> list[dict[str, Any]]:
  """Returns, by factor, the five variables that tell most of it.

  "untrained" is the best variable's score with random weights, None where that
  was not measured.
  """
  scores = analysis.scores
  if scores is None:
    return []
  table = []
  for number, factor in enumerate(analysis.factors):
    order = np.argsort(-scores.nmi[:, number], kind="stable")[:5]
    untrained = None
    if scores.nmi_untrained is not None:
      untrained = float(scores.nmi_untrained[:, number].max())
    table.append(
      {
        "factor": factor.name,
        "variables": [int(m) for m in order],
        "nmi": [float(scores.nmi[m, number]) for m in order],
        "chance": float(scores.nmi_chance[order[0], number]),
        "untrained": untrained,
      }
    )
  return table
