"""Linear heads trained by SGD, several learning rates at once.

The heads share every batch and differ in their learning rate only, so a grid of
them is one matrix product. Batches may be sharded over all devices of all
processes; the heads are replicated.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import devices
from imsvd_jax.evaluation.features import in_blocks


class Heads(NamedTuple):
  """G linear classifiers of C classes."""

  kernel: jax.Array  # float32 [G, F, C]
  bias: jax.Array  # float32 [G, C]


class HeadsState(NamedTuple):
  """The heads and the momentum buffers of SGD."""

  heads: Heads
  momentum: Heads


def create_heads(
  num_heads: int,
  num_features: int,
  num_classes: int,
  *,
  seed: int,
  deviation: float,
  mesh: Mesh,
) -> HeadsState:
  """Returns heads that all start from the same N(0, deviation^2) kernel."""
  key = jax.random.key(seed)
  kernel = deviation * jax.random.normal(key, (num_features, num_classes))
  heads = Heads(
    kernel=np.broadcast_to(kernel, (num_heads, num_features, num_classes)),
    bias=np.zeros((num_heads, num_classes), np.float32),
  )
  state = HeadsState(heads, jax.tree.map(np.zeros_like, heads))
  return jax.device_put(state, devices.replicated(mesh))


def place_batch(
  mesh: Mesh, *rows: np.ndarray, size: int = 0
) -> tuple[jax.Array, ...]:
  """Shards rows of this process over the mesh, as part of a global batch.

  Args:
    mesh: Its processes all call this, with as many rows [B, ...] each.
    size: Pad with zeros to at least this many rows, so that a smaller last
      batch needs no compilation of its own.

  Returns:
    The rows, padded further to a multiple of the devices.
  """
  size = max(size, len(rows[0]))
  size += -size % len(mesh.local_devices)
  return devices.shard_batch(
    tuple(devices.pad_rows(r, size) for r in rows), mesh
  )


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnums=0)
def train_step(
  state: HeadsState,
  features: jax.Array,
  labels: jax.Array,
  weights: jax.Array,
  learning_rates: jax.Array,
  *,
  momentum: float,
  weight_decay: float,
  optimizer: str = "sgd",
  trust_coefficient: float = 1e-3,
) -> tuple[HeadsState, jax.Array]:
  """Takes one step of SGD or LARS with each head.

    g <- gradient + weight_decay * w
    g <- g * trust_coefficient * |w| / |g|       (LARS, where both are not zero)
    m <- momentum * m + g
    w <- w - learning_rate * m

  Args:
    state: Donated.
    features: float32 [B, F].
    labels: int32 [B].
    weights: float32 [B], 0 for padding; the loss is the weighted mean.
    learning_rates: float32 [G].
    weight_decay: Applied to kernel and bias alike.
    optimizer: "sgd" or "lars".
    trust_coefficient: Of LARS.

  Returns:
    The new state and the mean cross entropy [G] in nats.
  """
  weights = weights / jnp.maximum(weights.sum(), 1e-12)

  def total_loss(heads: Heads) -> tuple[jax.Array, jax.Array]:
    logits = _logits(heads, features)  # [G, B, C]
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, labels[None, :, None], axis=2)
    losses = -jnp.einsum("gb,b->g", picked[..., 0], weights)
    return losses.sum(), losses  # A head's gradient sees its own loss alone.

  gradients, losses = jax.grad(total_loss, has_aux=True)(state.heads)

  def update(
    w: jax.Array, g: jax.Array, m: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    g = g + weight_decay * w
    if optimizer == "lars":
      g = g * _trust_ratio(w, g, trust_coefficient)
    m = momentum * m + g
    rates = learning_rates.reshape(-1, *([1] * (w.ndim - 1)))
    return w - rates * m, m

  (kernel, kernel_momentum), (bias, bias_momentum) = map(
    update, state.heads, gradients, state.momentum
  )
  return HeadsState(
    Heads(kernel, bias), Heads(kernel_momentum, bias_momentum)
  ), losses


def rank_classes(
  heads: Heads, features: np.ndarray, labels: np.ndarray, *, block: int = 1024
) -> np.ndarray:
  """Returns `scores.class_ranks` of every head: int32 [G, N].

  Of features float32 [N, F] and labels int32 [N], on one local device, `block`
  images at once. The heads are replicated.
  """
  heads = jax.tree.map(np.asarray, heads)
  heads = jax.device_put(heads, jax.local_devices()[0])
  return in_blocks(functools.partial(_ranks, heads), block, features, labels)


@jax.jit
def _ranks(heads: Heads, features: jax.Array, labels: jax.Array) -> jax.Array:
  scores = _logits(heads, features)  # [G, B, C]
  own = jnp.take_along_axis(scores, labels[None, :, None], axis=2)
  lower = jnp.arange(scores.shape[2]) < labels[:, None]  # [B, C]
  ahead = ~(scores <= own) | ((scores == own) & lower)
  return ahead.sum(axis=2, dtype=jnp.int32)


def _logits(heads: Heads, features: jax.Array) -> jax.Array:
  highest = jax.lax.Precision.HIGHEST
  scores = jnp.einsum("bf,gfc->gbc", features, heads.kernel, precision=highest)
  return scores + heads.bias[:, None, :]


def _trust_ratio(
  weights: jax.Array, gradient: jax.Array, trust_coefficient: float
) -> jax.Array:
  """Returns LARS's factor per head; 1 where a norm is zero."""
  axes = tuple(range(1, weights.ndim))
  weight_norm = jnp.sqrt((weights**2).sum(axes, keepdims=True))
  gradient_norm = jnp.sqrt((gradient**2).sum(axes, keepdims=True))
  ratio = trust_coefficient * weight_norm / (gradient_norm + 1e-12)
  usable = (weight_norm > 0) & (gradient_norm > 0)
  return jnp.where(usable, ratio, 1.0)
