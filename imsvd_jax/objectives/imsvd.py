"""IMSVD: information-maximized soft variable discretization.

The joint-cross entropy loss of arXiv:2501.03469. With q', q'' the soft
variables of two views (soft_variables.py) and Pc their cross-joint matrix:

    diagonal     = 1/M        sum_m sum_d Pc(m,m;d,d) log Pc(m,m;d,d)
    off_diagonal = 1/(M(M-1)) sum_{m1 != m2} sum_{d1,d2} Pc log Pc
    invariance   = -1/(N M)   sum_i sum_m log sum_d q'_i(m,d) q''_i(m,d)
    loss         = w_d diagonal + w_o off_diagonal + w_i invariance

Theorem 1: at the minimum all q are one-hot and equal across views, every bin
has probability 1/b and variables are independent in pairs, so the minimum is
-log b - 2 log b + 0 = -3 log b. A full factorial code of N = b^M images
reaches it.

The loss depends on the batch: from N images the entropy of b^2 cells is
biased low by about (b-1)^2 / (2N) nats (diagnostics.off_diagonal_floor), so
joint matrices are of the global batch and never averaged over devices.

Known deviations from the authors' code, which clamps q at 1e-8: the logarithm
in the invariance term is exact here (log-sum-exp of log q' + log q''). It is
finite for finite logits, grows linearly with them where two views disagree,
and its gradient w.r.t. z' is (q' - w) / (N M tau) with w proportional to
q' q'': bounded, and not zero where the views disagree most, as a clamp's is.
"""

import jax
import jax.numpy as jnp

from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import AxisName, batch_mean
from imsvd_jax.objectives.joint_entropy import joint_entropy_terms
from imsvd_jax.objectives.numerics import log_sum_exp
from imsvd_jax.objectives.soft_variables import log_soft_discretize


def invariance_term(
  log_q1: jax.Array, log_q2: jax.Array, axis_name: AxisName = None
) -> jax.Array:
  """Returns -1/(N M) sum_i sum_m log sum_d q1_i(m,d) q2_i(m,d), in nats.

  Args:
    log_q1: Logarithms of the first view's soft variables [n, M, b].
    log_q2: Logarithms of the second view's soft variables [n, M, b].
    axis_name: Mapped axis over which the batch is split, or None.
  """
  agreement = log_sum_exp(log_q1 + log_q2)[..., 0]  # [n, M]
  return -jnp.mean(batch_mean(agreement, axis_name))


def imsvd_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  num_bins: int,
  temperature: float = 1.0,
  diagonal_weight: float = 1.0,
  off_diagonal_weight: float = 1.0,
  invariance_weight: float = 1.0,
  kernel: str = "auto",
  precision: str = "auto",
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the joint-cross entropy loss of two views.

  loss = w_d diagonal + w_o off_diagonal + w_i invariance, see the module.

  Args:
    z1: Embeddings of the first view [n, M*b].
    z2: Embeddings of the second view of the same images [n, M*b].
    num_bins: b, bins per variable.
    temperature: tau of the softmax over bins.
    diagonal_weight: w_d, 1 in the paper.
    off_diagonal_weight: w_o, 1 in the paper.
    invariance_weight: w_i, 1 in the paper.
    kernel: How the entropy terms are computed, see joint_entropy.py.
    precision: Of their matrix products, see there.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar in nats, and its unweighted terms "diagonal" in
    [-log b, 0], "off_diagonal" in [-2 log b, 0] and "invariance" >= 0.
  """
  check_embeddings([z1, z2])
  log_q1, log_q2 = (
    log_soft_discretize(z, num_bins=num_bins, temperature=temperature)
    for z in (z1, z2)
  )
  diagonal, off_diagonal = joint_entropy_terms(
    jnp.exp(log_q1),
    jnp.exp(log_q2),
    axis_name,
    kernel=kernel,
    precision=precision,
  )
  invariance = invariance_term(log_q1, log_q2, axis_name)
  loss = (
    diagonal_weight * diagonal
    + off_diagonal_weight * off_diagonal
    + invariance_weight * invariance
  )
  return loss, {
    "diagonal": diagonal,
    "off_diagonal": off_diagonal,
    "invariance": invariance,
  }
