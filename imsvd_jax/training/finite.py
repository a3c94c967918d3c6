"""Updates that are not finite: discarded on the device, counted, reported.

The device keeps the old state and counts a skip; it never waits for the host.
The host reads the counts with the logged metrics, and reports them or stops the
run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import flax.struct
import jax
import jax.numpy as jnp

from imsvd_jax.base import console
from imsvd_jax.base.errors import EXIT_NOT_FINITE, Stopped

if TYPE_CHECKING:  # `state` holds the counts of this module.
  from imsvd_jax.training.state import TrainState


@flax.struct.dataclass
class Skips:
  """Updates discarded because the loss or a gradient was not finite.

  Part of the state, so that a resumed run continues the counts.
  """

  total: jax.Array  # int32 scalar, like all of these; updates discarded so far.
  in_a_row: jax.Array  # How many of the latest updates in a row.
  # The longest such row, even if it began and ended between two logged steps.
  worst_in_a_row: jax.Array
  first: jax.Array  # Step of the first one; 0: none.
  last: jax.Array  # Step of the last one; 0: none.
  # Which values were not finite in any of them, a bit for each of
  # `checked_names`.
  values: jax.Array

  @classmethod
  def none(cls) -> Skips:
    """Returns the counts before the first step."""
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


def checked_names(metrics: Mapping[str, Any]) -> list[str]:
  """Returns the names of the recorded values, in the order of their bits."""
  return sorted(["loss", "gradient_norm", *metrics["terms"]])


def discard_unless_finite(
  old: TrainState, new: TrainState, metrics: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
  """Returns the new state, or the old one and a counted skip.

  Args:
    old: The state before the step.
    new: The state after it, with the step and the skips of the old one.
    metrics: "loss", "gradient_norm", "terms" and "bad_images" of the step.

  Returns:
    The state to continue with, and the metrics with "skips".
  """
  values = {**metrics, **metrics["terms"]}
  wrong = [~jnp.isfinite(values[name]) for name in checked_names(metrics)]
  bits = sum(w.astype(jnp.int32) << i for i, w in enumerate(wrong))
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(
    metrics["gradient_norm"]
  )
  step = old.step + 1
  skips = old.skips.after(step, finite, bits)
  # The key never changes, and `where` would have to unwrap it.
  kept = jax.tree.map(
    lambda n, o: jnp.where(finite, n, o),
    dataclasses.replace(new, rng=None),
    dataclasses.replace(old, rng=None),
  )
  new = dataclasses.replace(
    kept, step=step, skips=skips, rng=old.rng, bad_images=metrics["bad_images"]
  )
  return new, {**metrics, "skips": skips}


class SkipLimit:
  """Reports skipped updates, and stops the run when there are too many.

  Args:
    policy: "skip" or "stop".
    max_in_a_row: With "skip": the largest number of skips in a row.
    seen: Skips of the run that is resumed, which were reported before.
  """

  def __init__(self, policy: str, max_in_a_row: int, seen: int) -> None:
    self._policy = policy
    self._max_in_a_row = max_in_a_row
    self._seen = seen

  def check(self, skips: Skips, names: Sequence[str]) -> None:
    """Reports the skips since the last call.

    Call it at the same steps in every process, so that all stop together.

    Args:
      skips: The counts so far, on the host.
      names: See `checked_names`.

    Raises:
      Stopped: The policy does not allow so many.
    """
    total, worst = int(skips.total), int(skips.worst_in_a_row)
    if total == self._seen:
      return
    new, self._seen = total - self._seen, total
    wrong = [n for i, n in enumerate(names) if int(skips.values) >> i & 1]
    what = (
      f"{new} update(s) were not finite and were discarded ({total} so far,"
      f" between steps {int(skips.first)} and {int(skips.last)}; not finite:"
      f" {', '.join(wrong)})"
    )
    if self._policy == "stop":
      stop(f"{what}; not_finite.policy is 'stop'.")
    if worst > self._max_in_a_row:
      stop(
        f"{what}; {worst} in a row, not_finite.max_in_a_row="
        f"{self._max_in_a_row}."
      )
    console.say(f"WARNING: {what}.")


def stop(message: str) -> NoReturn:
  """Says why the run cannot continue, and ends it."""
  console.say(f"error: {message} The earlier checkpoints are intact.")
  raise Stopped(EXIT_NOT_FINITE)
