"""Barlow Twins: self-supervised learning via redundancy reduction.

arXiv:2103.03230, equations 1 and 2. With embeddings standardized over the
batch, the cross-correlation matrix of two views should be the identity:

    C_ij       = 1/N sum_n zhat'_n,i zhat''_n,j
    invariance = sum_i (1 - C_ii)^2
    redundancy = sum_{i != j} C_ij^2
    loss       = invariance + lambda redundancy

Known deviations: standardization adds 1e-5 to the (biased) variance, as the
authors' batch normalization does, so an entry that is constant over the batch
correlates with nothing instead of dividing by zero. lambda is 0.0051, of the
authors' code (the paper says 0.005). The code's later overall factor of 0.1
or less belongs to the learning rate and is left out.
"""

import jax
import jax.numpy as jnp

from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import (
  AxisName,
  batch_mean,
  global_rows,
  global_sum,
)
from imsvd_jax.objectives.numerics import PRECISION, as_float32


def standardize(z: jax.Array, axis_name: AxisName = None) -> jax.Array:
  """Returns z [n, D] with mean 0 and variance 1 over the global batch."""
  centered = z - batch_mean(z, axis_name)
  variance = batch_mean(centered**2, axis_name)
  return centered * jax.lax.rsqrt(variance + 1e-5)


def barlow_twins_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  redundancy_weight: float = 0.0051,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the Barlow Twins loss of two views.

  loss = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2, see the module.

  Args:
    z1: Embeddings of the first view [n, D].
    z2: Embeddings of the second view of the same images [n, D].
    redundancy_weight: lambda.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar without unit, and its unweighted terms "invariance" and
    "redundancy".
  """
  check_embeddings([z1, z2])
  zhat1, zhat2 = (standardize(as_float32(z), axis_name) for z in (z1, z2))
  products = jnp.einsum("ni,nj->ij", zhat1, zhat2, precision=PRECISION)
  correlation = global_sum(products, axis_name) / global_rows(z1, axis_name)

  diagonal = jnp.diagonal(correlation)
  invariance = jnp.sum((1 - diagonal) ** 2)
  off_diagonal = 1 - jnp.eye(z1.shape[1], dtype=correlation.dtype)
  redundancy = jnp.sum((correlation * off_diagonal) ** 2)
  loss = invariance + redundancy_weight * redundancy
  return loss, {"invariance": invariance, "redundancy": redundancy}
