"""What the explorer's pages of duplicates, outliers and interventions show."""

from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import duplicates, rarity
from imsvd_jax.explain.analysis import Code
from imsvd_jax.explain.interventions import Interventions, wilson

NUM_OUTLIERS = 120  # Images of a page.


def duplicate_groups(
  slots: np.ndarray,
  features: np.ndarray,
  rows: np.ndarray,
  cosines: np.ndarray,
) -> dict[str, Any]:
  """Returns groups of images whose features are nearly those of their first.

  Args:
    slots: [S], of the compared images.
    features: [S, F].
    rows: [S, k], the nearest neighbors of each, as places in `slots`.
    cosines: [S, k], theirs.
  """
  near = np.argwhere(cosines >= duplicates.THRESHOLD)
  first_of = duplicates.first_of((int(i), int(rows[i, j])) for i, j in near)
  groups: dict[int, list[int]] = {}
  for other, first in sorted(first_of.items()):
    groups.setdefault(first, [first]).append(other)
  found = []
  for first, members in sorted(groups.items()):
    vectors = features[members].astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(features[first])
    cosine = vectors @ features[first] / np.maximum(norms, 1e-24)
    found.append([slots[members].tolist(), np.round(cosine, 4).tolist()])
  return {
    "threshold": duplicates.THRESHOLD,
    "compared": len(slots),
    "groups": found,
  }


def outliers(code: Code, rows: np.ndarray) -> dict[str, Any]:
  """Returns the images of the rarest codes, as `imsvd search outliers`.

  Args:
    code: Of all images.
    rows: [T], the shown images: p is that of their codes, and slots are places
      among them.
  """
  codes, by = code.codes[rows], "pairs"
  try:
    nats = rarity.pair_surprise(codes, code.num_bins)
  except UserError:  # Too many bins, or one variable.
    nats, by = rarity.marginal_surprise(codes, code.num_bins), "marginals"
  slots = np.argsort(-nats, kind="stable")[:NUM_OUTLIERS]
  return {
    "by": by,
    "slots": slots.tolist(),
    "nats": np.round(nats[slots].astype(np.float64), 2).tolist(),
    "median": round(float(np.median(nats)), 2),
  }


def intervention_table(found: Interventions) -> dict[str, Any]:
  """Returns flips [K, M] with their 95% intervals, and the selectivity."""
  cells = [
    [[rate, *wilson(rate, int(count))] for rate in row]
    for count, row in zip(found.images, found.flips, strict=True)
  ]
  return {
    "factors": list(found.factors),
    "images": found.images.tolist(),
    "flips": np.round(cells, 4).tolist(),
    "selectivity": [one._asdict() for one in found.selectivity],
  }
