"""Embeddings as M soft discrete variables of b bins, and their statistics.

An embedding z has D = M*b entries. N is the size of the global batch.

    q_i(m, :)            = softmax(z_i(m, :) / tau)
    P(m1, m2; d1, d2)    = 1/N sum_i q'_i(m1, d1) q''_i(m2, d2)
    H(p)                 = - sum_d p(d) log p(d)        in nats, 0 log 0 = 0
"""

import jax
import jax.numpy as jnp

from imsvd_jax.objectives.checks import (
  check_bins,
  check_embeddings,
  check_positive,
)
from imsvd_jax.objectives.collectives import AxisName, global_rows, global_sum
from imsvd_jax.objectives.numerics import PRECISION, as_float32, log_softmax


def log_soft_discretize(
  z: jax.Array, *, num_bins: int, temperature: float = 1.0
) -> jax.Array:
  """Returns log q [B, M, b] (nats): finite wherever z is, unlike log(q)."""
  check_embeddings([z])
  check_bins(z.shape[1], num_bins)
  check_positive("temperature", temperature)
  logits = as_float32(z).reshape(z.shape[0], -1, num_bins)  # [B, M, b]
  return log_softmax(logits / temperature)


def soft_discretize(
  z: jax.Array, *, num_bins: int, temperature: float = 1.0
) -> jax.Array:
  """Turns embeddings into soft discrete variables.

  q_i(m, :) = softmax(z_i(m, :) / tau).

  Args:
    z: Embeddings [B, M*b], any floating-point type.
    num_bins: b, bins per variable.
    temperature: tau.

  Returns:
    Probabilities q [B, M, b], float32 (float64 if z is), summing to one over
    the bins.
  """
  return jnp.exp(
    log_soft_discretize(z, num_bins=num_bins, temperature=temperature)
  )


def joint_probability(
  q1: jax.Array,
  q2: jax.Array,
  *,
  axis_name: AxisName = None,
  precision: jax.lax.PrecisionLike = PRECISION,
) -> jax.Array:
  """Returns the batch's joint probability matrix of all pairs of variables.

  P(m1, m2; d1, d2) = 1/N sum_i q1_i(m1, d1) q2_i(m2, d2). The same view twice
  gives the joint matrix, two views of the images give the cross-joint matrix.

  Args:
    q1: Soft variables [B, M, b].
    q2: Soft variables of the same images [B, M, b].
    axis_name: Mapped axis over which the batch is split, or None.
    precision: Of the matrix product, as in `jnp.einsum`.

  Returns:
    P [M, b, M, b]; each block P[m1, :, m2, :] sums to one.
  """
  if q1.ndim != 3 or q1.shape != q2.shape:
    raise ValueError(
      f"q1 has shape {q1.shape} and q2 {q2.shape}; expected both [B, M, b]."
    )
  q1, q2 = as_float32(q1), as_float32(q2)
  products = jnp.einsum("imd,ine->mdne", q1, q2, precision=precision)
  return global_sum(products, axis_name) / global_rows(q1, axis_name)


def entropy(p: jax.Array, *, axis: int | tuple[int, ...]) -> jax.Array:
  """Returns the entropy of `p` over `axis`, in nats.

  H(p) = - sum p log p with 0 log 0 = 0. The logarithm is taken of at least the
  smallest normal number, so an empty cell has value 0 and, instead of the
  true slope +inf, slope 87 in float32: it still pulls towards more mass.

  Args:
    p: Probabilities, any shape.
    axis: Axis or axes of one distribution, summed over.

  Returns:
    Entropies, `p`'s shape without `axis`, float32 (float64 if p is).
  """
  p = as_float32(p)
  smallest = jnp.finfo(p.dtype).tiny
  return -jnp.sum(p * jnp.log(jnp.maximum(p, smallest)), axis=axis)
