"""Updates that are not finite: discarded on the device, counted, reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # `state` holds the counts of this module.
  from imsvd_jax.training.state import TrainState


def checked_names(metrics: dict[str, Any]) -> list[str]:
  """Names of the values whose finiteness is recorded, in bit order."""
  return sorted(["loss", "gradient_norm", *metrics["terms"]])


def discard_unless_finite(
  old: TrainState, new: TrainState, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
  """Takes the new state or, on the device, counts a skip and keeps the old."""
  values = {**metrics, **metrics["terms"]}
  wrong = [~jnp.isfinite(values[name]) for name in checked_names(metrics)]
  bits = sum(w.astype(jnp.int32) << i for i, w in enumerate(wrong))
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(
    metrics["gradient_norm"]
  )
  step = old.step + 1
  skips = old.skips.after(step, finite, bits)
  # The key never changes, and `where` would unwrap it for nothing.
  kept = jax.tree.map(
    lambda n, o: jnp.where(finite, n, o),
    new.replace(rng=None),
    old.replace(rng=None),
  )
  new = kept.replace(
    step=step, skips=skips, rng=old.rng, bad_images=metrics["bad_images"]
  )
  return new, {**metrics, "skips": skips}


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
  def none(cls) -> Skips:
    """Returns the counts of a run that has not begun."""
    return cls(*(jnp.zeros((), jnp.int32) for _ in range(6)))

  def after(
    self, step: jax.Array, finite: jax.Array, values: jax.Array
  ) -> Skips:
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
