"""A 2-D map of the features, their spectrum, and nearest neighbors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.explain.analysis import Features
from imsvd_jax.explain.images import some_of
from imsvd_jax.explain.information import entropy

_BLOCK = 512  # Queries per product, so that memory is _BLOCK * S.
TSNE_IMAGES = 3000  # At most: its time grows faster than their number.
_TSNE_COMPONENTS = 50  # Principal ones that it starts from.
_PERPLEXITY = 30.0


def principal_components(
  features: Features, count: int = 2
) -> tuple[np.ndarray, np.ndarray]:
  """Projects the sample to the first components of the exact PCA.

  The components are those of all images, from their covariance. The entry of
  largest magnitude is positive, so that signs do not depend on the solver.

  Args:
    features: With the covariance [F, F] of at least `count` features.
    count: k, number of components.

  Returns:
    ([S, k] float32, [k] each component's share of the total variance).
  """
  values, vectors = np.linalg.eigh(features.feature_covariance)
  components = vectors[:, ::-1][:, :count].T
  peak = np.abs(components).argmax(1)
  components = components * np.sign(components[range(len(peak)), peak])[:, None]
  centered = features.sample_features.astype(np.float64) - features.feature_mean
  total = float(np.trace(features.feature_covariance))
  explained = np.maximum(values[::-1][:count], 0) / max(total, 1e-300)
  return (centered @ components.T).astype(np.float32), explained


def t_sne(features: Features) -> tuple[np.ndarray, np.ndarray] | None:
  """Places a sample of at most `TSNE_IMAGES` in the plane by t-SNE.

  It keeps neighbors together; distances between groups mean little.

  Returns:
    (rows of the sample [T], ascending, positions [T, 2] float32); None where
    there are too few images, or all have the same features.
  """
  rows = some_of(np.arange(len(features.sample_indices)), TSNE_IMAGES)
  width = min(_TSNE_COMPONENTS, len(features.feature_mean))
  points, explained = principal_components(features, width)
  if len(rows) < 10 or not explained[0] > 0:
    return None
  from sklearn.manifold import TSNE  # It takes a second.

  found = TSNE(
    init="pca",
    perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3),
    random_state=0,
  ).fit_transform(points[rows])
  return rows, found.astype(np.float32)


def spectrum(covariance: np.ndarray) -> np.ndarray:
  """Returns [F], the share of variance of each direction, largest first."""
  values = np.maximum(np.linalg.eigvalsh(covariance), 0)[::-1]
  return values / max(values.sum(), 1e-300)


def effective_rank(covariance: np.ndarray) -> float:
  """Returns exp of the spectrum's entropy: 1 (a line) to F (a ball).

  0 where there is no variance.
  """
  share = spectrum(covariance)
  return float(np.exp(entropy(share))) if share.any() else 0.0


def neighbor_agreement(
  neighbors: np.ndarray, values: np.ndarray
) -> tuple[float, float]:
  """Returns how often a neighbor has the same label, and by chance.

  Of the pairs whose labels are both known. `neighbors` are rows [S, k], and
  `values` int [S], -1 where unknown.
  """
  own, other = values[:, None], values[neighbors]
  known = (own >= 0) & (other >= 0)
  if not known.any():
    return 0.0, 0.0
  counts = np.bincount(values[values >= 0])
  chance = np.sum((counts / counts.sum()) ** 2)
  return float(((own == other) & known).sum() / known.sum()), float(chance)


def nearest_neighbors(
  features: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the cosine neighbors of each row among all other rows.

  Args:
    features: [S, F], S at least 2.
    count: k, neighbors of each row; at most S - 1.

  Returns:
    (rows [S, k] int64, cosines [S, k] float32), nearest first; equal cosines
    by the lower row.
  """
  size = len(features)
  count = min(count, size - 1)
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  unit = jnp.asarray(features / np.maximum(norms, 1e-12), jnp.float32)
  rows, cosines = [], []
  for start in range(0, size, _BLOCK):
    queries = np.minimum(np.arange(start, start + _BLOCK), size - 1)
    best, place = _neighbors(unit, jnp.asarray(queries, jnp.int32), count)
    rows.append(np.asarray(place, np.int64))
    cosines.append(np.asarray(best))
  return np.concatenate(rows)[:size], np.concatenate(cosines)[:size]


@functools.partial(jax.jit, static_argnums=2)
def _neighbors(
  unit: jax.Array, queries: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  cosines = jnp.matmul(
    unit[queries], unit.T, precision=jax.lax.Precision.HIGHEST
  )
  own = jnp.arange(len(queries)), queries
  return jax.lax.top_k(cosines.at[own].set(-jnp.inf), count)
