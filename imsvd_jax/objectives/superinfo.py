"""SuperInfo: leaving out what the views do not share.

arXiv:2408.10292. The encoder is stochastic: the head gives each view v of an
image a diagonal Gaussian p(z|v) = N(mu(v), sigma(v)^2), and z is one sample,
z = mu + sigma * epsilon. What z1 keeps of v1 that v2 does not have is
superfluous:

    maximize  I(z1; z2) - lambda_a I(v1; z1 | v2) - lambda_b I(v2; z2 | v1)

Both sides are bounded by what can be computed (all in nats):

    I(z1; z2)      >= log N - info_nce
    info_nce        = 1/2 (row(z1, z2) + row(z2, z1))
    row(x, y)       = 1/N sum_i - log( exp(cos(x_i, y_i) / tau)
                                       / sum_j exp(cos(x_i, y_j) / tau) )
    I(v1; z1 | v2) <= superfluous_1 = 1/N sum_i KL(p(z|v1_i) || p(z|v2_i))
    loss            = info_nce + lambda_a superfluous_1 + lambda_b superfluous_2

    KL(N(mu, s^2) || N(nu, t^2))
                    = sum_d log(t/s) + (s^2 + (mu - nu)^2) / (2 t^2) - 1/2

The bound on the superfluous terms is the variational one of multi-view
information bottleneck (Federici et al. 2020, arXiv:2002.07017); the bound on
I(z1; z2) is InfoNCE (arXiv:1807.03748). With lambda_a = lambda_b = 0 the loss
is InfoNCE on the samples.

Known deviations: the paper's exact estimators, its weights and its
temperature are not in the text we hold. Both bounds above,
lambda_a = lambda_b = 0.01, tau = 0.1 and the parameterization
sigma = softplus(pre-scale) + `minimum_scale` are ours. The minimum keeps the
KL finite in float32 for any finite output of the head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives.checks import check_embeddings, check_positive
from imsvd_jax.objectives.collectives import (
  AxisName,
  batch_mean,
  first_row,
  gather_rows,
)
from imsvd_jax.objectives.numerics import PRECISION, as_float32, unit_rows
from imsvd_jax.objectives.views import Terms, mean_over_pairs, view_pairs


class Gaussian(NamedTuple):
  """Diagonal Gaussians, one per image: mean and scale (sigma), each [n, D]."""

  mean: jax.Array
  scale: jax.Array


def gaussian(z: jax.Array, minimum_scale: float) -> Gaussian:
  """Returns p(z|v) from the head's output z [n, 2D]: mean, then pre-scale."""
  mean, pre_scale = jnp.split(as_float32(z), 2, axis=1)
  return Gaussian(mean, jax.nn.softplus(pre_scale) + minimum_scale)


def standard_noise(
  key: jax.Array, num_views: int, like: jax.Array, axis_name: AxisName = None
) -> jax.Array:
  """Returns epsilon [V, n, D], standard normal, for `like` [n, D].

  Each row is keyed by its view and by its position in the global batch, so
  the noise does not depend on the number of devices.
  """
  rows, dimensions = like.shape
  positions = first_row(like, axis_name) + jnp.arange(rows)

  def draw(view: jax.Array, position: jax.Array) -> jax.Array:
    row_key = jax.random.fold_in(jax.random.fold_in(key, view), position)
    return jax.random.normal(row_key, (dimensions,), like.dtype)

  over_rows = jax.vmap(draw, in_axes=(None, 0))
  return jax.vmap(over_rows, in_axes=(0, None))(
    jnp.arange(num_views), positions
  )


def kl_divergence(p: Gaussian, q: Gaussian) -> jax.Array:
  """Returns KL(p || q) of each image [n], in nats."""
  log_ratio = jnp.log(q.scale) - jnp.log(p.scale)
  squares = (p.scale / q.scale) ** 2 + ((p.mean - q.mean) / q.scale) ** 2
  return jnp.sum(log_ratio + (squares - 1) / 2, axis=1)


def info_nce(
  z1: jax.Array,
  z2: jax.Array,
  *,
  temperature: float,
  axis_name: AxisName = None,
) -> jax.Array:
  """Returns 1/2 (row(z1, z2) + row(z2, z1)) of z1, z2 [n, D], in nats."""
  u1, u2 = unit_rows(z1), unit_rows(z2)

  def log_partition(u: jax.Array, v: jax.Array) -> jax.Array:
    everyone = gather_rows(v, axis_name)  # [N, D]
    cosine = jnp.einsum("id,jd->ij", u, everyone, precision=PRECISION)
    return jax.nn.logsumexp(cosine / temperature, axis=1)  # [n]

  positive = jnp.sum(u1 * u2, axis=1) / temperature
  partition = (log_partition(u1, u2) + log_partition(u2, u1)) / 2
  return batch_mean(partition - positive, axis_name)


def superinfo_views(
  embeddings: Sequence[jax.Array],
  *,
  num_global: int = 2,
  targets: Sequence[jax.Array] | None = None,
  key: jax.Array | None = None,
  temperature: float = 0.1,
  superfluous_weight_1: float = 0.01,
  superfluous_weight_2: float = 0.01,
  minimum_scale: float = 1e-3,
  axis_name: AxisName = None,
) -> tuple[jax.Array, Terms]:
  """Returns the loss of V views: the mean over pairs, see views.py.

  Each view is sampled once, with a key of its own; in a pair the view of the
  lower index is the first. Arguments are those of `superinfo_loss`.
  """
  del targets
  view_pairs(len(embeddings), num_global)  # Raises on a wrong number of views.
  check_embeddings(embeddings)
  check_positive("temperature", temperature)
  check_positive("minimum_scale", minimum_scale)
  if embeddings[0].shape[1] % 2:
    raise UserError(
      f"SuperInfo got embeddings of {embeddings[0].shape[1]} entries; expected"
      " an even number, mean and pre-scale."
    )
  if key is None:
    raise UserError("SuperInfo samples its embeddings: pass a key, one a step.")
  gaussians = [gaussian(z, minimum_scale) for z in embeddings]
  noise = standard_noise(key, len(embeddings), gaussians[0].mean, axis_name)
  samples = [
    p.mean + p.scale * epsilon
    for p, epsilon in zip(gaussians, noise, strict=True)
  ]

  def pair_loss(first: int, second: int) -> tuple[jax.Array, Terms]:
    p1, p2 = gaussians[first], gaussians[second]
    contrast = info_nce(
      samples[first],
      samples[second],
      temperature=temperature,
      axis_name=axis_name,
    )
    superfluous1 = batch_mean(kl_divergence(p1, p2), axis_name)
    superfluous2 = batch_mean(kl_divergence(p2, p1), axis_name)
    loss = (
      contrast
      + superfluous_weight_1 * superfluous1
      + superfluous_weight_2 * superfluous2
    )
    return loss, {
      "info_nce": contrast,
      "superfluous_1": superfluous1,
      "superfluous_2": superfluous2,
    }

  return mean_over_pairs(pair_loss, len(embeddings), num_global)


def superinfo_loss(
  z1: jax.Array,
  z2: jax.Array,
  *,
  key: jax.Array,
  temperature: float = 0.1,
  superfluous_weight_1: float = 0.01,
  superfluous_weight_2: float = 0.01,
  minimum_scale: float = 1e-3,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the SuperInfo loss of two views.

  loss = info_nce + lambda_a superfluous_1 + lambda_b superfluous_2, see the
  module.

  Args:
    z1: The head's output for the first view [n, 2D]: mean, then pre-scale.
    z2: The same for the second view of the same images [n, 2D].
    key: Random key of this step, the same on all devices.
    temperature: tau of the cosines.
    superfluous_weight_1: lambda_a.
    superfluous_weight_2: lambda_b.
    minimum_scale: The least sigma.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar in nats, and its unweighted terms "info_nce",
    "superfluous_1" and "superfluous_2", nats per image.
  """
  return superinfo_views(
    [z1, z2],
    key=key,
    temperature=temperature,
    superfluous_weight_1=superfluous_weight_1,
    superfluous_weight_2=superfluous_weight_2,
    minimum_scale=minimum_scale,
    axis_name=axis_name,
  )
