"""Is the run collapsing? Cheap figures of a training step.

A run collapses when the embedding stops depending on the image: a constant
code, or bins that all stay equally likely. These figures cost O(N D), nothing
beside the D x D matrix of the loss; the off-diagonal entropy is a term of the
loss already, to be read beside `off_diagonal_floor`. `training.verdict` judges
them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives.checks import check_embeddings
from imsvd_jax.objectives.collectives import AxisName, batch_mean
from imsvd_jax.objectives.numerics import unit_rows
from imsvd_jax.objectives.soft_variables import entropy, soft_discretize

# A bin is dead below this share of its fair mass 1/b. One image of a batch
# that is certain of the bin gives it more (b/N of its fair mass) for every
# batch of fewer than 100 b images, so dead means that no image uses it.
DEAD_BIN = 0.01


def diagnostics(
  embeddings: Sequence[jax.Array],
  *,
  num_bins: int | None = None,
  temperature: float = 1.0,
  axis_name: AxisName = None,
) -> dict[str, jax.Array]:
  """Returns figures that show a collapse, for logging beside the loss.

  Args:
    embeddings: Views [n, D] of the images; the first two are used.
    num_bins: b for a discrete objective, None for a continuous one.
    temperature: tau of the discretization.
    axis_name: Mapped axis over which the batch is split, or None.

  Returns:
    Scalars. For every objective:

    * embedding_std: Standard deviation over the batch of the entries of the
      embedding scaled to length sqrt(D); 0 is collapsed, 1 is isotropic.

    With `num_bins` also these, where entropies are shares of log b:

    * marginal_entropy_mean, marginal_entropy_min: Entropy of the batch's
      marginal, mean and least over variables; 1 is every bin used equally.
    * information: Mutual information between image and variable, the
      marginal entropy less the mean entropy of one image's q; 0 is
      collapsed in any way, 1 is one-hot with every bin used equally.
    * max_probability: Mean of each variable's largest probability; 1/b is
      uniform, 1 is one-hot.
    * argmax_agreement: Share of variables whose likeliest bin is the same in
      both views.
    * dead_bins: Share of bins that no image uses.
  """
  views = list(embeddings)[:2]
  if len(views) < 2:
    raise UserError("Diagnostics compare two views; found one.")
  check_embeddings(views)
  views = [jax.lax.stop_gradient(z) for z in views]
  figures = {"embedding_std": _embedding_std(views, axis_name)}
  if num_bins is not None:
    q1, q2 = (
      soft_discretize(z, num_bins=num_bins, temperature=temperature)
      for z in views
    )
    figures |= _code_figures(q1, q2, axis_name)
  return figures


def _embedding_std(
  views: Sequence[jax.Array], axis_name: AxisName
) -> jax.Array:
  """Returns the deviation of unit rows over the batch, times sqrt(D)."""
  unit = jnp.stack([unit_rows(z) for z in views], axis=1)  # [n, 2, D]
  centered = unit - batch_mean(unit, axis_name)
  deviation = jnp.sqrt(batch_mean(centered**2, axis_name))  # [2, D]
  return jnp.mean(deviation) * math.sqrt(unit.shape[-1])


def _code_figures(
  q1: jax.Array, q2: jax.Array, axis_name: AxisName
) -> dict[str, jax.Array]:
  """Returns the figures of soft variables q1, q2 [n, M, b]."""
  num_bins = q1.shape[-1]
  log_b = math.log(num_bins)
  q = jnp.stack([q1, q2], axis=1)  # [n, 2, M, b]
  mean = lambda x: jnp.mean(batch_mean(x, axis_name))

  marginal = batch_mean(q, axis_name)  # [2, M, b]
  marginal_entropy = entropy(marginal, axis=-1) / log_b  # [2, M]
  image_entropy = mean(entropy(q, axis=-1)) / log_b
  same = jnp.argmax(q1, axis=-1) == jnp.argmax(q2, axis=-1)  # [n, M]
  dead = marginal < DEAD_BIN / num_bins
  return {
    "marginal_entropy_mean": jnp.mean(marginal_entropy),
    "marginal_entropy_min": jnp.min(marginal_entropy),
    "information": jnp.mean(marginal_entropy) - image_entropy,
    "max_probability": mean(jnp.max(q, axis=-1)),
    "argmax_agreement": mean(same.astype(q.dtype)),
    "dead_bins": jnp.mean(dead.astype(q.dtype)),
  }


def off_diagonal_floor(num_bins: int, batch_size: int) -> float:
  """Returns the `off_diagonal` term of independent uniform one-hot variables.

  From N images the empirical entropy of the K = b^2 cells falls short of
  2 log b, by about (K - 1) / (2N) nats while N is well above K (Miller and
  Madow), of which (b-1)^2 / (2N) remain when the marginals are even. This is
  its exact expectation for any N, from counts c ~ Binomial(N, 1/K):

      floor = K E[(c/N) log(c/N)]

  A term at its floor cannot tell its variables from independent ones. Lower
  values need a code that is more even over the batch than chance.

  Args:
    num_bins: b.
    batch_size: N, of the global batch.

  Returns:
    The floor in nats, between -2 log b and 0.
  """
  cells = num_bins**2
  expectation = 0.0
  for count in range(1, batch_size):  # The terms of 0 and N are 0.
    log_ways = (
      math.lgamma(batch_size + 1)
      - math.lgamma(count + 1)
      - math.lgamma(batch_size - count + 1)
    )
    log_probability = -count * math.log(cells) + (
      batch_size - count
    ) * math.log1p(-1 / cells)
    share = count / batch_size
    expectation += (
      math.exp(log_ways + log_probability) * share * math.log(share)
    )
  return cells * expectation
