"""Everything a resume needs, in one pytree, and the EMA target network."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from imsvd_jax.training.finite import Skips


@flax.struct.dataclass
class TrainState:
  """The state of a run after `step` updates."""

  step: jax.Array  # int32 scalar; updates done.
  params: Any  # {"backbone": ..., "projector": ...}, float32.
  batch_stats: Any  # BatchNorm running statistics, the same two keys.
  opt_state: Any  # Optax state.
  # {"params", "batch_stats"} of the EMA target network, or None where the
  # objective has none.
  target: Any
  # Typed key of the run. It never changes; other keys are folded from it.
  rng: jax.Array
  # Discarded updates. They count as steps and change nothing else.
  skips: Skips
  # int32 scalar; images so far, of all processes, that could not be read and
  # were replaced. Part of the state, so that no step waits for the host and a
  # resumed run continues the count.
  bad_images: jax.Array


def target_momentum(
  step: jax.Array, *, start: float, total_steps: int
) -> jax.Array:
  """Momentum of the target network: `start` rising to 1 on a cosine.

  m(s) = 1 - (1 - start) (cos(pi s / S) + 1) / 2.
  """
  progress = step / total_steps
  return 1.0 - (1.0 - start) * (jnp.cos(jnp.pi * progress) + 1.0) / 2.0


def update_target(target: Any, params: Any, momentum: jax.Array) -> Any:
  """Returns m * target + (1 - m) * params, leaf by leaf."""
  return jax.tree.map(
    lambda t, p: momentum * t + (1.0 - momentum) * p, target, params
  )
