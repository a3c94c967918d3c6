"""The numbers of an explanation: frozen parts, and the file that holds them.

N images, M variables of b bins, D = M * b, F features.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from imsvd_jax.base import files
from imsvd_jax.explain import information
from imsvd_jax.explain.captions import Caption, Captions
from imsvd_jax.explain.factors import Factor
from imsvd_jax.explain.interventions import Interventions, Selectivity

# Prefixes of arrays in the file: of what flips, and of its selectivity.
_INTERVENTIONS = ("intervention/", "selectivity/")
_EDITS = ("edit/", "edit_selectivity/")
_Part = TypeVar("_Part")
_Row = TypeVar("_Row", Caption, Selectivity)


@dataclasses.dataclass(frozen=True)
class Features:
  """The backbone's features."""

  feature_mean: np.ndarray  # [F] float64.
  sample_indices: np.ndarray  # [S] int64, ascending, a uniform sample.
  sample_features: np.ndarray  # [S, F] float32.
  # [F, F] float64, or None when not asked for.
  feature_covariance: np.ndarray | None = None

  def sampled_from(self, indices: np.ndarray) -> "Features":
    """Returns the same features with the sample's part among `indices`."""
    chosen = np.isin(self.sample_indices, indices)
    return dataclasses.replace(
      self,
      sample_indices=self.sample_indices[chosen],
      sample_features=self.sample_features[chosen],
    )


@dataclasses.dataclass(frozen=True)
class Code:
  """The discrete code of the images."""

  codes: np.ndarray  # [N, M] uint8 or uint16, the most probable bins.
  marginal: np.ndarray  # [M, b] float64, p(m; d), mean of q.
  usage: np.ndarray  # [M, b] int64, images whose most probable bin it is.
  conditional_entropy: np.ndarray  # [M] nats, mean over images of H(q).
  confidence: np.ndarray  # [M], mean over images of the largest probability.
  # [M, b, n] float32, the largest q of each bin, rounded to 2^-16 so that noise
  # does not rank certain images; -1: none.
  top_scores: np.ndarray
  # [M, b, n] int64, their images, equal scores by lower index; -1: none.
  top_indices: np.ndarray

  @property
  def num_variables(self) -> int:
    """M."""
    return self.marginal.shape[0]

  @property
  def num_bins(self) -> int:
    """b."""
    return self.marginal.shape[1]

  def entropies(self) -> np.ndarray:
    """Returns [M] nats, H(p(m; .)); an image tells at most this much."""
    return information.entropy(self.marginal)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """What pairs of variables share."""

  joint: np.ndarray  # [D, D] float32, P.
  mutual_information: np.ndarray  # [M, M] nats, from `joint`.
  floor: np.ndarray  # [M, M] nats, its finite-sample floor.

  def excess(self) -> np.ndarray:
    """Returns [M, M] nats, the mutual information above its floor."""
    return self.mutual_information - self.floor

  def most_redundant(self, count: int) -> list[tuple[int, int]]:
    """Returns the pairs of variables that share most above the floor."""
    rows, columns = np.triu_indices(len(self.floor), 1)
    order = np.argsort(-self.excess()[rows, columns], kind="stable")[:count]
    return [(int(rows[i]), int(columns[i])) for i in order]


@dataclasses.dataclass(frozen=True)
class Views:
  """How alike the codes of two augmented views of an image are."""

  agreement: np.ndarray  # [M], share of images whose views share the bin.
  soft_agreement: np.ndarray  # [M], mean over images of sum_d q'(d) q''(d).
  example_indices: np.ndarray  # [n] int64, images shown with their views.
  example_views: np.ndarray  # [n, 2, S, S, C] uint8.
  example_probabilities: np.ndarray  # [n, 2, M, b] float32.
  # [D, D] float32, Pc (rows: view 1), or None when not asked for.
  cross_joint: np.ndarray | None = None
  # [M, M] nats, from `cross_joint`.
  cross_mutual_information: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class FactorScores:
  """What the variables tell of labels and factors."""

  class_counts: Mapping[str, np.ndarray]  # [M, b, K] images, by factor.
  nmi: np.ndarray  # [M, number of factors], normalized mutual information.
  nmi_chance: np.ndarray  # [M, number of factors], of independent variables.
  # [M, number of factors], of the same network with random weights; None where
  # that was not measured.
  nmi_untrained: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Patches:
  """How well the patches in a bin cover the object of an image."""

  # [2, M, b], mean intersection over union, by halves of the images.
  patch_iou: np.ndarray
  # [2, 2], by halves: of all patches, and of the best choice of patches.
  patch_limits: np.ndarray
  # [2, M, b], of the same network with random weights.
  patch_iou_untrained: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Analysis:
  """What was found."""

  indices: np.ndarray  # [N] int64, ascending, as rows of codes and factors.
  features: Features  # Of every encoder.
  # None for an encoder without discrete code, as the parts that follow.
  code: Code | None = None
  pairs: Pairs | None = None  # None when the joint matrix was not asked for.
  views: Views | None = None  # None when no views were compared.
  factors: tuple[Factor, ...] = ()  # The label first, if there is one.
  scores: FactorScores | None = None  # None when no factor is known.
  patches: Patches | None = None  # None when no masks of objects are known.
  edits: Interventions | None = None  # None where none were made.
  interventions: Interventions | None = None  # None without a drawing.
  captions: Captions | None = None  # None where they were not looked for.
  seconds: float = 0.0  # Of the pass over the images, with compilation.
  images_per_second: float = 0.0  # Without the first batch, which compiles.

  @property
  def num_images(self) -> int:
    """N."""
    return len(self.indices)

  @property
  def num_variables(self) -> int:
    """M, 0 without a discrete code."""
    return 0 if self.code is None else self.code.num_variables

  def rows(self, indices: np.ndarray) -> np.ndarray:
    """Returns the places of images in `self.indices`."""
    return np.searchsorted(self.indices, indices)

  def save(self, path: str | pathlib.Path) -> None:
    """Writes every array to one .npz file, in full precision."""
    arrays: dict[str, Any] = {
      "indices": self.indices,
      "seconds": np.float64(self.seconds),
      "images_per_second": np.float64(self.images_per_second),
    }
    parts = (self.features, self.code, self.pairs, self.views, self.scores)
    for part in (*parts, self.patches):
      fields = {} if part is None else vars(part)
      arrays |= {n: v for n, v in fields.items() if isinstance(v, np.ndarray)}
    for i, factor in enumerate(self.factors):
      arrays[f"factor/{i}/name"] = np.array(factor.name)
      arrays[f"factor/{i}/values"] = factor.values
      arrays[f"factor/{i}/names"] = np.array(factor.names, dtype=np.str_)
      arrays[f"factor/{i}/ordered"] = np.array(factor.ordered)
      if self.scores is not None:
        arrays[f"factor/{i}/counts"] = self.scores.class_counts[factor.name]
    if (names := self.captions) is not None:
      arrays["caption/num_used"] = np.array(names.num_used)
      arrays |= _columns("caption/", Caption, names.confirmed)
    arrays |= _flip_arrays(self.interventions, *_INTERVENTIONS)
    arrays |= _flip_arrays(self.edits, *_EDITS)
    with (
      files.in_place_when_done(path) as unfinished,
      open(unfinished, "wb") as file,  # Given a name, NumPy appends ".npz".
    ):
      np.savez(file, **arrays)

  @classmethod
  def load(cls, path: str | pathlib.Path) -> "Analysis":
    """Reads what `save` wrote, also what an earlier version wrote."""
    with np.load(path, allow_pickle=False) as stored:
      arrays = {name: stored[name] for name in stored.files}
    factors: list[Factor] = []
    class_counts = {}
    while f"factor/{len(factors)}/name" in arrays:
      at = f"factor/{len(factors)}/"
      name = str(arrays[at + "name"])
      names = tuple(map(str, arrays[at + "names"]))
      ordered = bool(arrays.get(at + "ordered", False))
      factors.append(Factor(name, arrays[at + "values"], names, ordered))
      if at + "counts" in arrays:
        class_counts[name] = arrays[at + "counts"]
    return cls(
      indices=arrays["indices"],
      features=_part(Features, arrays),
      code=_part(Code, arrays),
      pairs=_part(Pairs, arrays),
      views=_part(Views, arrays),
      factors=tuple(factors),
      patches=_part(Patches, arrays),
      scores=_part(FactorScores, arrays | {"class_counts": class_counts}),
      interventions=_flips(arrays, *_INTERVENTIONS),
      edits=_flips(arrays, *_EDITS),
      captions=_captions(arrays),
      seconds=float(arrays["seconds"]),
      images_per_second=float(arrays["images_per_second"]),
    )


def _part(part: type[_Part], arrays: Mapping[str, Any]) -> Any:
  """Builds a part from its arrays; None if one that it needs is not there."""
  fields = dataclasses.fields(part)  # type: ignore[arg-type]
  needed = {f.name for f in fields if f.default is dataclasses.MISSING}
  if not needed <= arrays.keys():
    return None
  return part(**{f.name: arrays[f.name] for f in fields if f.name in arrays})


def _columns(
  prefix: str, kind: type[_Row], rows: Sequence[_Row]
) -> dict[str, np.ndarray]:
  """Returns an array for each field of rows of one kind."""
  return {
    prefix + name: np.array([getattr(row, name) for row in rows])
    for name in kind._fields
  }


def _rows(
  prefix: str, kind: type[_Row], arrays: Mapping[str, Any]
) -> tuple[_Row, ...]:
  """Returns the rows that `_columns` was given."""
  columns = [arrays[prefix + name].tolist() for name in kind._fields]
  return tuple(kind(*row) for row in zip(*columns, strict=True))


def _captions(arrays: Mapping[str, Any]) -> Captions | None:
  if "caption/num_used" not in arrays:
    return None
  confirmed = _rows("caption/", Caption, arrays)
  return Captions(confirmed, int(arrays["caption/num_used"]))


def _flip_arrays(
  found: Interventions | None, prefix: str, of_selectivity: str
) -> dict[str, np.ndarray]:
  if found is None:
    return {}
  return {
    f"{prefix}factors": np.array(found.factors),
    f"{prefix}images": found.images,
    f"{prefix}flips": found.flips,
    **_columns(of_selectivity, Selectivity, found.selectivity),
  }


def _flips(
  arrays: Mapping[str, Any], prefix: str, of_selectivity: str
) -> Interventions | None:
  if f"{prefix}factors" not in arrays:
    return None
  return Interventions(
    tuple(arrays[f"{prefix}factors"].tolist()),
    arrays[f"{prefix}images"],
    arrays[f"{prefix}flips"],
    _rows(of_selectivity, Selectivity, arrays),
  )
