"""A 2-D map of the features, their spectrum, and nearest neighbours."""

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
    """[k] share of the total variance."""
    return self.variances / max(self.total_variance, 1e-300)

  def project(self, features: np.ndarray) -> np.ndarray:
    """[n, F] -> [n, k] float32."""
    centred = np.asarray(features, np.float64) - self.mean
    return (centred @ self.components.T).astype(np.float32)


def principal_components(
  mean: np.ndarray, covariance: np.ndarray, count: int = 2
) -> PrincipalComponents:
  """Exact PCA of the whole data set from its streamed covariance.

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
  """[F] share of the variance of each principal direction, largest first."""
  values = np.maximum(np.linalg.eigvalsh(covariance), 0)[::-1]
  return values / max(values.sum(), 1e-300)


def effective_rank(covariance: np.ndarray) -> float:
  """exp of the entropy of the spectrum: 1 (a line) .. F (a ball); 0: empty."""
  share = spectrum(covariance)
  if not share.any():
    return 0.0
  return float(np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)))))


def neighbour_agreement(
  neighbours: np.ndarray, values: np.ndarray
) -> tuple[float, float]:
  """How often a neighbour has the same label, and by chance.

  Args:
    neighbours: [S, k] rows.
    values: [S] int, -1 where unknown.

  Returns:
    (share over pairs whose labels are both known, share by chance).
  """
  own, other = values[:, None], values[neighbours]
  known = (own >= 0) & (other >= 0)
  if not known.any():
    return 0.0, 0.0
  counts = np.bincount(values[values >= 0])
  chance = np.sum((counts / counts.sum()) ** 2)
  return float(((own == other) & known).sum() / known.sum()), float(chance)


def nearest_neighbours(
  features: np.ndarray,
  queries: np.ndarray,
  *,
  count: int = 10,
  block: int = 512,
) -> tuple[np.ndarray, np.ndarray]:
  """Cosine neighbours of chosen rows among all rows, themselves excluded.

  Args:
    features: [S, F].
    queries: [Q] row numbers.
    count: Neighbours of each; at most S - 1.
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
    best, place = _neighbours(unit, jnp.asarray(padded), count)
    rows.append(np.asarray(place, np.int64)[: len(part)])
    cosines.append(np.asarray(best)[: len(part)])
  if not rows:
    return np.zeros((0, count), np.int64), np.zeros((0, count), np.float32)
  return np.concatenate(rows), np.concatenate(cosines)


@functools.partial(jax.jit, static_argnums=2)
def _neighbours(unit, queries, count):
  cosines = jnp.matmul(
    unit[queries], unit.T, precision=jax.lax.Precision.HIGHEST
  )
  own = jnp.arange(len(queries)), queries
  return jax.lax.top_k(cosines.at[own].set(-jnp.inf), count)
