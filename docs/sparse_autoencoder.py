"""A sparse autoencoder: features as sums of few directions of many.

L. Gao et al., "Scaling and evaluating sparse autoencoders", 2024,
arXiv:2406.04093: the k largest units of an image are active (section 2.3), and
units that no longer become active learn what the others leave over (AuxK,
appendix A.2).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

AUX_WEIGHT = 1 / 32  # Alpha of appendix A.2.
BATCH = 256
LEARNING_RATE = 1e-3
STEPS = 4000


class Autoencoder(NamedTuple):
  """Its weights; features x [B, F] are centered and scaled first."""

  center: jax.Array  # [F], the mean of the features.
  scale: jax.Array  # Of the centered features, to a mean square of 1.
  encoder: jax.Array  # [F, n].
  threshold: jax.Array  # [n], the bias of the units.
  decoder: jax.Array  # [n, F]; only the direction of a row counts.
  offset: jax.Array  # [F], what is added to every sum.


def activity(weights: Autoencoder, features: jax.Array, k: int) -> jax.Array:
  """Returns [B, n] >= 0, of which at most k of each row are not 0."""
  return _largest(_before(weights, _scaled(weights, features)), k)


def atoms(weights: Autoencoder) -> jax.Array:
  """Returns [n, F], the unit vectors that features are sums of."""
  return weights.decoder / jnp.linalg.norm(
    weights.decoder, axis=1, keepdims=True
  )


def _scaled(weights: Autoencoder, features: jax.Array) -> jax.Array:
  return (features - weights.center) * weights.scale


def _before(weights: Autoencoder, x: jax.Array) -> jax.Array:
  return (x - weights.offset) @ weights.encoder + weights.threshold


def _largest(before: jax.Array, k: int) -> jax.Array:
  """Keeps the k largest positive numbers of each row, and 0 elsewhere."""
  numbers = jax.lax.stop_gradient(before)
  smaller = lambda _, least: jnp.max(
    numbers, axis=1, keepdims=True, where=numbers < least, initial=-jnp.inf
  )
  # The k-th largest; on a CPU, 20 times faster than jax.lax.top_k.
  least = jax.lax.fori_loop(0, k, smaller, jnp.full((len(before), 1), jnp.inf))
  return jnp.where(before >= least, jax.nn.relu(before), 0)


def loss(
  weights: Autoencoder, x: jax.Array, idle: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
  """Returns the loss of scaled features x [B, F], and the active units [n].

  Its decoder's rows are divided by their norm: the gradient has no part along
  them, as in appendix A.1.

  Args:
    idle: bool [n], units without activity for a pass over the images.
  """
  before = _before(weights, x)
  z = _largest(before, k)
  rest = x - weights.offset - z @ atoms(weights)

  # The idle units' share: half of the features' number of them (A.2).
  def of_idle() -> jax.Array:
    few = min(x.shape[1] // 2, len(idle))
    aux = _largest(jnp.where(idle, before, -jnp.inf), few) @ atoms(weights)
    left = jax.lax.stop_gradient(rest)
    return jnp.mean((left - aux) ** 2) / jnp.mean(left**2)

  error = jnp.mean(rest**2) / jnp.mean(x**2)
  aux_error = jax.lax.cond(idle.any(), of_idle, lambda: 0.0)
  return error + AUX_WEIGHT * aux_error, (z > 0).any(axis=0)


def train(
  features: np.ndarray,
  num_units: int,
  k: int,
  *,
  seed: int = 0,
  steps: int = STEPS,
) -> Autoencoder:
  """Returns an autoencoder of features [N, F] whose n units are k-sparse."""
  key, order = jax.random.split(jax.random.key(seed))
  decoder = jax.random.normal(key, (num_units, features.shape[1]))
  decoder /= jnp.linalg.norm(decoder, axis=1, keepdims=True)
  center = features.mean(axis=0)
  weights = Autoencoder(
    center=jnp.asarray(center),
    scale=jnp.asarray(1 / np.sqrt(np.mean((features - center) ** 2))),
    encoder=decoder.T,  # Tied at the start (A.1).
    threshold=jnp.zeros(num_units),
    decoder=decoder,
    offset=jnp.zeros(features.shape[1]),
  )
  x = _scaled(weights, features)
  optimizer = optax.adam(LEARNING_RATE)
  per_pass = -(-len(x) // BATCH)

  def step(carry, key):
    weights, state, since = carry
    rows = jax.random.choice(key, len(x), (BATCH,))
    gradient, is_active = jax.grad(loss, has_aux=True)(
      weights, x[rows], since >= per_pass, k
    )
    updates, state = optimizer.update(gradient, state)
    weights = optax.apply_updates(weights, updates)
    return (weights, state, jnp.where(is_active, 0, since + 1)), None

  start = (weights, optimizer.init(weights), jnp.zeros(num_units, int))
  keys = jax.random.split(order, steps)
  (weights, _, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))(start)
  return weights


def unexplained(weights: Autoencoder, features: np.ndarray, k: int) -> float:
  """Returns the share of the features' variance that the sums leave over."""
  x = _scaled(weights, jnp.asarray(features))
  error, _ = loss(weights, x, jnp.zeros(len(weights.decoder), bool), k)
  return float(error)
