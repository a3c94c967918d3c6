"""A 2-D map of the features, their spectrum, and nearest neighbors."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.base.errors import UserError


class PrincipalComponents(NamedTuple):
  """Principal components of the features.

  Attributes:
    mean: [F].
    components: [k, F], orthonormal, by falling variance; the entry of largest
      magnitude is positive, so that signs do not depend on the solver.
    variances: [k].
    total_variance: Of all F directions.
  """

  mean: np.ndarray
  components: np.ndarray
  variances: np.ndarray
  total_variance: float

  @property
  def explained(self) -> np.ndarray:
    """Returns [k], each component's share of the total variance."""
    return self.variances / max(self.total_variance, 1e-300)

  def project(self, features: np.ndarray) -> np.ndarray:
    """Projects [n, F] to [n, k] float32."""
    centered = np.asarray(features, np.float64) - self.mean
    return (centered @ self.components.T).astype(np.float32)


def principal_components(
  mean: np.ndarray, covariance: np.ndarray, count: int = 2
) -> PrincipalComponents:
  """Returns the exact PCA of a whole data set, from its covariance.

  Args:
    mean: [F].
    covariance: [F, F] float64.
    count: How many components.

  Returns:
    The components.
  """
  if covariance.shape != (len(mean), len(mean)):
    raise ValueError(
      f"covariance must be [F, F] with F = {len(mean)}; found shape "
      f"{covariance.shape}."
    )
  count = min(count, len(mean))
  values, vectors = np.linalg.eigh(covariance)
  components = vectors[:, ::-1][:, :count].T
  peak = np.abs(components).argmax(1)
  signs = np.sign(components[np.arange(count), peak])
  return PrincipalComponents(
    mean,
    components * signs[:, None],
    np.maximum(values[::-1][:count], 0),
    float(np.trace(covariance)),
  )


def spectrum(covariance: np.ndarray) -> np.ndarray:
  """Returns [F], the share of variance of each direction, largest first."""
  values = np.maximum(np.linalg.eigvalsh(covariance), 0)[::-1]
  return values / max(values.sum(), 1e-300)


def effective_rank(covariance: np.ndarray) -> float:
  """Returns exp of the spectrum's entropy: 1 (a line) to F (a ball).

  0 where there is no variance.
  """
  share = spectrum(covariance)
  if not share.any():
    return 0.0
  return float(np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)))))


def neighbor_agreement(
  neighbors: np.ndarray, values: np.ndarray
) -> tuple[float, float]:
  """Returns how often a neighbor has the same label, and by chance.

  Args:
    neighbors: [S, k] rows.
    values: [S] int, -1 where unknown.

  Returns:
    (share over pairs whose labels are both known, share by chance).
  """
  own, other = values[:, None], values[neighbors]
  known = (own >= 0) & (other >= 0)
  if not known.any():
    return 0.0, 0.0
  counts = np.bincount(values[values >= 0])
  chance = np.sum((counts / counts.sum()) ** 2)
  return float(((own == other) & known).sum() / known.sum()), float(chance)


def nearest_neighbors(
  features: np.ndarray,
  queries: np.ndarray,
  *,
  count: int = 10,
  block: int = 512,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the cosine neighbors of chosen rows among all other rows.

  Args:
    features: [S, F].
    queries: [Q] row numbers.
    count: Neighbors of each; at most S - 1.
    block: Queries per product, so that memory is block * S.

  Returns:
    (rows [Q, count] int64, cosines [Q, count] float32), nearest first; equal
    cosines by the lower row.
  """
  queries = np.asarray(queries, np.int64)
  if queries.size and not 0 <= queries.min() <= queries.max() < len(features):
    raise UserError(
      f"Queries must be rows 0..{len(features) - 1}; found "
      f"{queries.min()}..{queries.max()}."
    )
  count = min(count, len(features) - 1)
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  unit = jnp.asarray(features / np.maximum(norms, 1e-12), jnp.float32)
  rows, cosines = [], []
  for start in range(0, len(queries), block):
    part = queries[start : start + block]
    padded = np.pad(part, (0, block - len(part))).astype(np.int32)
    best, place = _neighbors(unit, jnp.asarray(padded), count)
    rows.append(np.asarray(place, np.int64)[: len(part)])
    cosines.append(np.asarray(best)[: len(part)])
  if not rows:
    return np.zeros((0, count), np.int64), np.zeros((0, count), np.float32)
  return np.concatenate(rows), np.concatenate(cosines)


@functools.partial(jax.jit, static_argnums=2)
def _neighbors(
  unit: jax.Array, queries: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  cosines = jnp.matmul(
    unit[queries], unit.T, precision=jax.lax.Precision.HIGHEST
  )
  own = jnp.arange(len(queries)), queries
  return jax.lax.top_k(cosines.at[own].set(-jnp.inf), count)
