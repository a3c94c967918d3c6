"""Which figures an analysis allows, and what they show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from imsvd_jax.explain import embedding_map, figures
from imsvd_jax.explain.analysis import Analysis, Code
from imsvd_jax.explain.illustrations import Illustrations

_NUM_VARIABLES = 8  # Of the figures, unless they are chosen.
_NUM_ATTRIBUTED = 6
_NUM_BINS, _NUM_BEST = 10, 8  # Rows and columns of a sample grid.


def figure_variables(
  analysis: Analysis, chosen: Sequence[int] | None
) -> list[int]:
  """Returns the variables of the figures: the chosen ones, or the best."""
  if analysis.code is None:
    return []
  if chosen is not None:
    return list(chosen)
  scores = analysis.scores
  score = analysis.code.entropies() if scores is None else scores.nmi.max(1)
  order = np.argsort(-score, kind="stable")[:_NUM_VARIABLES]
  return sorted(int(m) for m in order)


def wanted_images(analysis: Analysis, chosen: Sequence[int]) -> list[int]:
  """Returns the indices of the images that the figures need whole."""
  if analysis.code is None:
    return []
  wanted: set[int] = set()
  for m in chosen:
    best = analysis.code.top_indices[m, _busiest(analysis.code, m), :_NUM_BEST]
    wanted |= {int(i) for i in best.ravel() if i >= 0}
  return sorted(wanted)


def draw_all(
  analysis: Analysis,
  pictures: Illustrations,
  chosen: Sequence[int],
  records: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Figure]:
  """Draws every figure that the analysis allows, by file name.

  The images of `wanted_images` are in `pictures.kept`; `records` are those of
  `figures.curves_of`.
  """
  drawn: dict[str, Figure] = {}
  if analysis.code is not None and chosen:
    drawn |= _matrices(analysis, analysis.code.num_bins, chosen)
    drawn |= _sample_grids(analysis.code, pictures, chosen)
    if pictures.maps():
      drawn["attribution"] = _attribution(analysis.code, pictures, chosen)
  if analysis.scores is not None:
    tables = {"trained": analysis.scores.nmi}
    if analysis.scores.nmi_untrained is not None:
      tables = {"random weights": analysis.scores.nmi_untrained, **tables}
    names = [factor.name for factor in analysis.factors]
    drawn["factors"] = figures.factor_table(tables, names)
  if analysis.views is not None:
    drawn["embedding_vectors"] = figures.embedding_vectors(
      analysis.views.example_views, analysis.views.example_probabilities
    )
  features = analysis.features
  if features.feature_covariance is not None and len(features.feature_mean) > 1:
    drawn["embedding_map"] = _map(analysis)
  curves = figures.curves_of(records)
  if figures.panels_of(curves):
    drawn["training_curves"] = figures.training_curves(curves)
  return drawn


def _matrices(
  analysis: Analysis, bins: int, chosen: Sequence[int]
) -> dict[str, Figure]:
  drawn = {}
  if analysis.pairs is not None:
    drawn["joint"] = figures.joint_matrix(analysis.pairs.joint, bins, chosen)
    if analysis.num_variables > 1:
      drawn["mutual_information"] = figures.information_matrix(analysis.pairs)
  if analysis.views is not None and analysis.views.cross_joint is not None:
    drawn["cross_joint"] = figures.joint_matrix(
      analysis.views.cross_joint, bins, chosen, title="Cross-joint probability"
    )
  return drawn


def _busiest(code: Code, m: int) -> list[int]:
  """Returns the bins of a variable that its sample grid shows."""
  order = np.argsort(-code.usage[m], kind="stable")
  return sorted(int(d) for d in order[:_NUM_BINS])


def _sample_grids(
  code: Code, pictures: Illustrations, chosen: Sequence[int]
) -> dict[str, Figure]:
  """Draws the best images of the busiest bins of each chosen variable."""
  drawn = {}
  for m in chosen:
    busiest = _busiest(code, m)
    rows = [
      [
        pictures.kept[int(i)]
        for i in code.top_indices[m, d, :_NUM_BEST]
        if i >= 0
      ]
      for d in busiest
    ]
    titles = [f"bin {d}" for d in busiest]
    drawn[f"samples_variable_{m}"] = figures.sample_grid(rows, titles)
  return drawn


def _attribution(
  code: Code, pictures: Illustrations, chosen: Sequence[int]
) -> Figure:
  """Draws the best image of a busy bin of each chosen variable.

  Of the k-th variable it is the k-th busiest bin: the busiest bins of all
  variables often mean the same, and show the same image.
  """
  variables = np.array(chosen[:_NUM_ATTRIBUTED])
  ranks = np.arange(len(variables)) % code.num_bins
  order = np.argsort(-code.usage[variables], axis=1, kind="stable")
  bins = order[np.arange(len(variables)), ranks]
  best = code.top_indices[variables, bins, 0]
  maps = {
    name: found[variables, bins, 0].astype(np.float32)
    for name, found in pictures.maps().items()
  }
  name = "patches in the bin"
  if name in maps:  # A patch is in the bin or not: with edges, not blurred.
    maps[name] = maps[name].repeat(16, axis=1).repeat(16, axis=2)
  return figures.attribution_rows(
    np.stack([pictures.kept[int(i)] for i in best]),
    maps,
    [f"v{m}, bin {d}" for m, d in zip(variables, bins, strict=True)],
  )


def _map(analysis: Analysis) -> Figure:
  """Draws two principal components of the sample, colored by a factor."""
  points, explained = embedding_map.principal_components(analysis.features)
  values: np.ndarray | None = None
  names: tuple[str, ...] = ()
  if analysis.factors:
    first = analysis.factors[0]
    values = first.values[analysis.rows(analysis.features.sample_indices)]
    names = first.names
  return figures.embedding_map(points, values, names, explained=explained)
