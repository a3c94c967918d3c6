"""VICReg: variance-invariance-covariance regularization.

arXiv:2105.04906, equations 1 to 6, with the averages of the authors' code:

    invariance = 1/(N D) sum_n ||z'_n - z''_n||^2
    variance   = 1/2 (v(z') + v(z''))   v(z) = 1/D sum_j max(0, 1 - S(z_j))
    covariance = c(z') + c(z'')         c(z) = 1/D sum_{i != j} Cov(z)_ij^2
    loss       = 25 invariance + 25 variance + 1 covariance

S(x) = sqrt(Var(x) + 1e-4); Var and Cov divide by N - 1.

Known deviations: the paper's invariance does not divide by D and its variance
is v(z') + v(z''). The published weights and numbers belong to the authors'
code, which divides the one by D and halves the other, and so do we; weights
of 25 D and 50 give the paper's formula.
"""

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import (
  AxisName,
  batch_mean,
  global_rows,
  global_sum,
)
from imsvd_jax.objectives.numerics import PRECISION, as_float32


def _variance_and_covariance(
  z: jax.Array, axis_name: AxisName
) -> tuple[jax.Array, jax.Array]:
  """Returns v(z) and c(z), two scalars, for z [n, D]."""
  dimensions = z.shape[1]
  z = z - batch_mean(z, axis_name)
  products = jnp.einsum("ni,nj->ij", z, z, precision=PRECISION)
  covariances = global_sum(products, axis_name)
  covariances = covariances / (global_rows(z, axis_name) - 1)  # [D, D]

  deviation = jnp.sqrt(jnp.diagonal(covariances) + 1e-4)
  variance = jnp.mean(jax.nn.relu(1 - deviation))
  off_diagonal = 1 - jnp.eye(dimensions, dtype=z.dtype)
  covariance = jnp.sum((covariances * off_diagonal) ** 2) / dimensions
  return variance, covariance


def vicreg_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  invariance_weight: float = 25.0,
  variance_weight: float = 25.0,
  covariance_weight: float = 1.0,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the VICReg loss of two views.

  loss = lambda invariance + mu variance + nu covariance, see the module.

  Args:
    z1: Embeddings of the first view [n, D].
    z2: Embeddings of the second view of the same images [n, D].
    invariance_weight: lambda.
    variance_weight: mu.
    covariance_weight: nu.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar in squared units of z, and its unweighted terms
    "invariance", "variance" and "covariance".
  """
  check_embeddings([z1, z2])
  if global_rows(z1, axis_name) < 2:
    raise UserError("VICReg got a batch of 1; a variance needs 2 or more.")
  z1, z2 = as_float32(z1), as_float32(z2)
  invariance = jnp.mean(batch_mean((z1 - z2) ** 2, axis_name))
  variance1, covariance1 = _variance_and_covariance(z1, axis_name)
  variance2, covariance2 = _variance_and_covariance(z2, axis_name)
  variance = (variance1 + variance2) / 2
  covariance = covariance1 + covariance2
  loss = (
    invariance_weight * invariance
    + variance_weight * variance
    + covariance_weight * covariance
  )
  return loss, {
    "invariance": invariance,
    "variance": variance,
    "covariance": covariance,
  }
