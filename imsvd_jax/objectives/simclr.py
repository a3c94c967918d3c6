"""SimCLR: a simple framework for contrastive learning.

arXiv:2002.05709, equation 1 (NT-Xent). u are the 2N embeddings of both views
on the unit sphere, p(i) is the other view of i:

    loss = 1/(2N) sum_i - log( exp(u_i.u_p(i) / tau)
                               / sum_{k != i} exp(u_i.u_k / tau) )
         = alignment + uniformity
    alignment  = - 1/(2N) sum_i u_i.u_p(i) / tau
    uniformity =   1/(2N) sum_i log sum_{k != i} exp(u_i.u_k / tau)

tau is 0.1, the paper's best on ImageNet (0.5 for CIFAR-10). Each device
compares its own rows with all 2N. Known deviations: none.
"""

import jax
import jax.numpy as jnp

from imsvd_jax.objectives.checks import check_embeddings, check_positive
from imsvd_jax.objectives.collectives import (
  AxisName,
  batch_mean,
  first_row,
  gather_rows,
)
from imsvd_jax.objectives.numerics import PRECISION, unit_rows


def _log_partition(
  u: jax.Array, everyone: jax.Array, own: jax.Array, temperature: float
) -> jax.Array:
  """Returns log sum_{k != i} exp(u_i.u_k / tau) [n].

  Args:
    u: Anchors [n, D].
    everyone: All embeddings [2N, D].
    own: Position of each anchor in `everyone` [n].
    temperature: tau.
  """
  similarity = jnp.einsum("id,kd->ik", u, everyone, precision=PRECISION)
  others = jnp.arange(everyone.shape[0]) != own[:, None]  # [n, 2N]
  return jax.nn.logsumexp(similarity / temperature, axis=1, where=others)


def simclr_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  temperature: float = 0.1,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the NT-Xent loss of two views.

  loss = alignment + uniformity, see the module.

  Args:
    z1: Embeddings of the first view [n, D].
    z2: Embeddings of the second view of the same images [n, D].
    temperature: tau.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar in nats, and its terms "alignment" in [-1/tau, 1/tau]
    and "uniformity".
  """
  check_embeddings([z1, z2])
  check_positive("temperature", temperature)
  u1, u2 = unit_rows(z1), unit_rows(z2)
  all1, all2 = gather_rows(u1, axis_name), gather_rows(u2, axis_name)
  everyone = jnp.concatenate([all1, all2])  # [2N, D]
  own1 = first_row(u1, axis_name) + jnp.arange(u1.shape[0])
  own2 = own1 + all1.shape[0]

  positive = jnp.sum(u1 * u2, axis=1) / temperature
  alignment = -batch_mean(positive, axis_name)
  partition1 = _log_partition(u1, everyone, own1, temperature)
  partition2 = _log_partition(u2, everyone, own2, temperature)
  uniformity = batch_mean(partition1 + partition2, axis_name) / 2
  loss = alignment + uniformity
  return loss, {"alignment": alignment, "uniformity": uniformity}
