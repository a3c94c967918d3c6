"""MVEB: self-supervised learning with the multi-view entropy bottleneck.

arXiv:2403.19078. Embeddings z live on the unit sphere; a slowly moving (EMA)
target network embeds the global views too and gives the alignment targets t.

    alignment = mean over views v and images i of z_v,i . t_v,i
    entropy_surrogate = mean over v and i of < -stop_gradient(s_v,i), z_v,i >
    loss      = - alignment - lambda entropy_surrogate            lambda = 0.01

t_v is the mean of the targets of the global views other than v: view 1 has
target 2, view 2 target 1, a local crop the mean of both (not normalized
again, so its alignment is the mean of its two cosines).

The surrogate's value means nothing; its gradient is that of the embeddings'
differential entropy when s is the score (the gradient of the log-density) of
their distribution, here Stein's estimate (Li and Turner 2018,
arXiv:1705.07107) with an exponential kernel:

    K_ij = exp(z_i.z_j / tau)     g_i = (sum_j K_ij) z_i / tau
    s    = -(K + eta I)^{-1} g    eta = 0.01

tau is the median of 1 - cosine over the pairs i != j, and at least 0.1.

The entropy of each view is estimated on groups of `group_size` consecutive
images of the global batch, so the objective does not depend on the number of
devices. The paper's 128 was one GPU's share of its batch.

Known deviations: groups are a hyper-parameter. The authors' code takes the
median over all n^2 pairs, i = j included, the 49.6th percentile of ours for
n = 128. The ridge is eta, but at least
2 n eps max(K) / tau, with n the group size and eps float32's: a bound on the
rounding of K, without which its Cholesky factorization fails near collapse. It
acts only where embeddings are close (for n = 128, a median cosine above 0.77).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import (
  AxisName,
  batch_mean,
  first_row,
  global_rows,
)
from imsvd_jax.objectives.numerics import PRECISION, unit_rows
from imsvd_jax.objectives.views import Terms, view_pairs


def _cosine_distance(z: jax.Array) -> jax.Array:
  """Returns 1 - z_i.z_j [n, n] of unit vectors z [n, D].

  1 - z_i.z_j = |z_i - z_j|^2 / 2, from z less its mean: where embeddings
  almost coincide, 1 minus their cosine would be nothing but rounding.
  """
  z = z - jnp.mean(z, axis=0)
  gram = jnp.einsum("id,jd->ij", z, z, precision=PRECISION)
  squares = jnp.diagonal(gram)
  return jnp.maximum((squares[:, None] + squares) / 2 - gram, 0)


def stein_score(
  z: jax.Array, *, eta: float = 0.01, min_temperature: float = 0.1
) -> jax.Array:
  """Returns Stein's estimate of the score of the density that z came from.

  s = -(K + eta I)^{-1} g, see the module. O(n^2 + n D) memory.

  Args:
    z: Unit vectors [n, D].
    eta: Ridge.
    min_temperature: The least tau.

  Returns:
    s [n, D], in nats per unit of z.
  """
  n = z.shape[0]
  distance = _cosine_distance(z)
  # Rows of n + 1 entries put the diagonal, but for its first, last in each.
  pairs = distance.reshape(-1)[1:].reshape(n - 1, n + 1)[:, :-1]
  tau = jnp.maximum(jnp.median(pairs), min_temperature)
  # K, g and eta are divided by exp(1 / tau), which leaves s as it is and
  # the exponents small and exact where embeddings almost coincide.
  kernel = jnp.exp(-distance / tau)
  g = jnp.sum(kernel, axis=1, keepdims=True) * z / tau
  rounding = 2 * n * jnp.finfo(z.dtype).eps / tau
  ridge = jnp.maximum(eta * jnp.exp(-1 / tau), rounding)
  factor = jax.scipy.linalg.cho_factor(
    kernel + ridge * jnp.eye(n, dtype=z.dtype)
  )
  return -jax.scipy.linalg.cho_solve(factor, g)


def grouped_score(
  z: jax.Array,
  *,
  group_size: int,
  eta: float = 0.01,
  min_temperature: float = 0.1,
  axis_name: AxisName = None,
) -> jax.Array:
  """Returns `stein_score` of each group of the global batch, for z [n, D].

  Not differentiable: rows of other devices come by `all_gather`.
  """
  z = jax.lax.stop_gradient(z)
  n, dimensions = z.shape
  score = lambda group: stein_score(
    group, eta=eta, min_temperature=min_temperature
  )
  # XLA on CPUs splits a batched factorization over the threads that run the
  # program and blocks one until it is done: two at a time (two views, or two
  # devices of one process) can leave none to do the work, and the step hangs
  # (seen with jax 0.10.2 on two cores). One group after the other cannot.
  scores_of = lambda groups: jax.lax.platform_dependent(
    groups, cpu=lambda g: jax.lax.map(score, g), default=jax.vmap(score)
  )

  if n % group_size == 0:  # Whole groups: nothing to exchange.
    groups = z.reshape(-1, group_size, dimensions)
    return scores_of(groups).reshape(n, dimensions)

  rows = jax.lax.all_gather(z, axis_name, tiled=True)  # [N, D]
  start = first_row(z, axis_name)
  if group_size % n == 0:  # A part of one group: the others are not computed.
    group = start // group_size * group_size
    rows = jax.lax.dynamic_slice_in_dim(rows, group, group_size)
    start = start - group
  groups = rows.reshape(-1, group_size, dimensions)
  scores = scores_of(groups).reshape(-1, dimensions)
  return jax.lax.dynamic_slice_in_dim(scores, start, n)


def _check(
  embeddings: Sequence[jax.Array],
  targets: Sequence[jax.Array] | None,
  num_global: int,
  group_size: int,
  axis_name: AxisName,
) -> Sequence[jax.Array]:
  """Returns the targets; raises on wrong views, targets or groups."""
  view_pairs(len(embeddings), num_global)  # Raises on a wrong number of views.
  if num_global < 2:
    raise UserError("MVEB aligns global views: expected 2 or more, found 1.")
  if targets is None or len(targets) != num_global:
    found = "none" if targets is None else f"{len(targets)}"
    raise UserError(
      f"MVEB needs the target embedding of each of the {num_global} global"
      f" views; found {found}."
    )
  check_embeddings([*embeddings, *targets])
  rows = global_rows(embeddings[0], axis_name)
  if group_size < 2 or rows % group_size:
    raise UserError(
      f"MVEB's group_size is {group_size} and the batch is {rows}; expected a"
      " batch that is a multiple of a group_size of 2 or more."
    )
  return targets


def mveb_views(
  embeddings: Sequence[jax.Array],
  *,
  num_global: int = 2,
  targets: Sequence[jax.Array] | None = None,
  key: jax.Array | None = None,
  entropy_weight: float = 0.01,
  eta: float = 0.01,
  min_temperature: float = 0.1,
  group_size: int = 128,
  axis_name: AxisName = None,
) -> tuple[jax.Array, Terms]:
  """Returns the loss of V views, of which the first are global.

  Args:
    embeddings: V arrays [n, D].
    num_global: Number of global views.
    targets: The target network's embeddings of the global views, [n, D] each;
      no gradient flows into them.
    key: Not used.
    entropy_weight: lambda.
    eta: Ridge of the Stein estimator.
    min_temperature: The least tau of its kernel.
    group_size: Images per entropy estimate; divides the global batch.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    The loss, a scalar, and its terms "alignment" in [-1, 1] (a cosine) and
    "entropy_surrogate" (only its gradient has a meaning).
  """
  del key
  targets = _check(embeddings, targets, num_global, group_size, axis_name)
  units = [unit_rows(z) for z in embeddings]
  targets = [jax.lax.stop_gradient(unit_rows(t)) for t in targets]

  alignments, surrogates = [], []
  for view, z in enumerate(units):
    others = [t for index, t in enumerate(targets) if index != view]
    target = sum(others) / len(others)
    score = grouped_score(
      z,
      group_size=group_size,
      eta=eta,
      min_temperature=min_temperature,
      axis_name=axis_name,
    )
    alignments.append(batch_mean(jnp.sum(z * target, axis=1), axis_name))
    surrogates.append(batch_mean(jnp.sum(z * -score, axis=1), axis_name))

  alignment = sum(alignments) / len(units)
  surrogate = sum(surrogates) / len(units)
  loss = -alignment - entropy_weight * surrogate
  return loss, {"alignment": alignment, "entropy_surrogate": surrogate}


def mveb_loss(
  z1: jax.Array,
  z2: jax.Array,
  target1: jax.Array,
  target2: jax.Array,
  *,
  entropy_weight: float = 0.01,
  eta: float = 0.01,
  min_temperature: float = 0.1,
  group_size: int = 128,
  axis_name: AxisName = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the MVEB loss of two views.

  loss = - alignment - lambda entropy_surrogate, see the module.

  Args:
    z1: Embeddings of the first view [n, D], normalized here.
    z2: Embeddings of the second view of the same images [n, D].
    target1: The target network's embeddings of the first view [n, D].
    target2: The target network's embeddings of the second view [n, D].
    entropy_weight: lambda.
    eta: Ridge of the Stein estimator.
    min_temperature: The least tau of its kernel.
    group_size: Images per entropy estimate; divides the global batch.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    As `mveb_views`.
  """
  return mveb_views(
    [z1, z2],
    targets=[target1, target2],
    entropy_weight=entropy_weight,
    eta=eta,
    min_temperature=min_temperature,
    group_size=group_size,
    axis_name=axis_name,
  )
