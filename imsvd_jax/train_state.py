"""Everything a resume needs, in one pytree, and the EMA target network."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Skips:
  """Updates thrown away because the loss or a gradient was not finite.

  Part of the state: the host reads it only with the logged metrics, and a
  resumed run counts on.

  Attributes:
    total: int32 scalar, as all of these; updates thrown away so far.
    in_a_row: How many of the latest updates in a row.
    worst_in_a_row: The longest such row, so that one which began and ended
      between two logs is seen.
    first: Step of the first one; 0: none.
    last: Step of the last one; 0: none.
    values: Which values were not finite in any of them, a bit for each of
      `train_step.checked_names`.
  """

  total: jax.Array
  in_a_row: jax.Array
  worst_in_a_row: jax.Array
  first: jax.Array
  last: jax.Array
  values: jax.Array

  @classmethod
  def none(cls) -> "Skips":
    """Returns the counts of a run that has not begun."""
    return cls(*(jnp.zeros((), jnp.int32) for _ in range(6)))

  def after(
    self, step: jax.Array, finite: jax.Array, values: jax.Array
  ) -> "Skips":
    """Returns the counts after a step (counted from 1)."""
    skipped = jnp.where(finite, 0, 1)
    in_a_row = jnp.where(finite, 0, self.in_a_row + 1)
    is_first = ~finite & (self.total == 0)
    return Skips(
      total=self.total + skipped,
      in_a_row=in_a_row,
      worst_in_a_row=jnp.maximum(self.worst_in_a_row, in_a_row),
      first=jnp.where(is_first, step, self.first),
      last=jnp.where(finite, self.last, step),
      values=jnp.where(finite, self.values, self.values | values),
    )


@flax.struct.dataclass
class TrainState:
  """The state of a run after `step` updates.

  Attributes:
    step: int32 scalar; updates done.
    params: {"backbone": ..., "projector": ...}, float32.
    batch_stats: BatchNorm running statistics, the same two keys.
    opt_state: Optax state.
    target: {"params", "batch_stats"} of the EMA target network, or None where
      the objective has none.
    rng: Typed key of the run; never changes, only folded into.
    skips: Updates thrown away; they count as steps, and change nothing else.
    bad_images: int32 scalar; images so far, of all processes, that could not
      be read and were replaced. Here, so that no step waits for the host and a
      resumed run counts on.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  target: Any
  rng: jax.Array
  skips: Skips
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
