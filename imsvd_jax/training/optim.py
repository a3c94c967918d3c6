"""Optimizers of the reference recipes, their schedule and their masks.

All apply the learning rate last, outside of the momentum buffer, like the
reference implementations. `optax.lars` applies it inside, which is a different
algorithm under a schedule.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError, lookup


def not_1d(params: Any) -> Any:
  """Returns True for kernels, False for biases and batch-norm parameters."""
  return jax.tree.map(lambda p: jnp.ndim(p) != 1, params)


def _decay(settings: ConfigDict) -> optax.GradientTransformation:
  mask = None if settings.decay_1d else not_1d
  return optax.add_decayed_weights(settings.weight_decay, mask=mask)


def _trust_ratio(coefficient: float) -> optax.GradientTransformation:
  """Scales u to length coefficient |w|, where neither norm is zero.

  As `optax.scale_by_trust_ratio`, whose norms are safe to differentiate and
  therefore read weights and gradients twice.
  """

  def scale(u: jax.Array, w: jax.Array) -> jax.Array:
    norm_w, norm_u = jnp.linalg.norm(w), jnp.linalg.norm(u)
    ratio = coefficient * norm_w / norm_u
    return u * jnp.where((norm_w == 0) | (norm_u == 0), 1.0, ratio)

  return optax.stateless_with_tree_map(scale)


def lars(
  settings: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """LARS: m <- momentum m + q (g + wd w), w <- w - lr m.

  q = trust_coefficient |w| / |g + wd w| for kernels, 1 for 1-d parameters and
  where either norm is zero (You, Gitman and Ginsburg, 2017).
  """
  return optax.chain(
    _decay(settings),
    optax.masked(_trust_ratio(settings.trust_coefficient), not_1d),
    optax.trace(decay=settings.momentum),
    optax.scale_by_learning_rate(schedule),
  )


def sgd(
  settings: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """SGD: m <- momentum m + g + wd w, w <- w - lr m."""
  return optax.chain(
    _decay(settings),
    optax.trace(decay=settings.momentum),
    optax.scale_by_learning_rate(schedule),
  )


def adamw(
  settings: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """AdamW: w <- w - lr (adam(g) + wd w) (Loshchilov and Hutter, 2019)."""
  return optax.chain(
    optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
    _decay(settings),
    optax.scale_by_learning_rate(schedule),
  )


def adam(
  settings: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Adam: w <- w - lr adam(g + wd w) (torch's; Kingma and Ba, 2015)."""
  return optax.chain(
    _decay(settings),
    optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.eps),
    optax.scale_by_learning_rate(schedule),
  )


OPTIMIZERS: dict[
  str, Callable[[ConfigDict, optax.Schedule], optax.GradientTransformation]
] = {
  "lars": lars,
  "sgd": sgd,
  "adam": adam,
  "adamw": adamw,
}


def learning_rate_schedule(
  peak: float, *, warmup_steps: int, total_steps: int, final_fraction: float
) -> optax.Schedule:
  """Linear from 0 to peak, then half a cosine to final_fraction * peak.

  Raises:
    UserError: The run has no steps, or ends before its warm-up.
  """
  if total_steps < 1:
    raise UserError(f"A run needs at least one step, found {total_steps}.")
  if not 0 <= warmup_steps < total_steps:
    raise UserError(
      f"The warm-up of {warmup_steps} steps must be shorter than the run of "
      f"{total_steps}; lower optimizer.warmup_epochs or train longer."
    )
  if warmup_steps == 0:
    return optax.cosine_decay_schedule(peak, total_steps, final_fraction)
  return optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=peak,
    warmup_steps=warmup_steps,
    decay_steps=total_steps,
    end_value=peak * final_fraction,
  )


def fitting_warmup(warmup_steps: int, total_steps: int) -> int:
  """Returns the steps of a warm-up: a tenth of a run that would end in it."""
  return warmup_steps if warmup_steps < total_steps else total_steps // 10


class Plan(NamedTuple):
  """How the learning rate follows the run; by default as planned at first.

  Attributes:
    schedule: "cosine": warm-up and cosine over the whole run. "restart": both
      again from the last change of the plan, over the rest of the run.
      "constant": the learning rate at that change; in a run whose plan never
      changed, the peak after the warm-up.
    offset: What to add to the number of updates for the position in the run,
      in batches: not 0 after a change of the batch size.
    changed_at: Position of the last change of the plan; 0: never.
    changed_from: Learning rate at that change.
  """

  schedule: str = "cosine"
  offset: int = 0
  changed_at: int = 0
  changed_from: float = 0.0


ORIGINAL = Plan()
SCHEDULES = ("cosine", "constant", "restart")


def _planned_schedule(
  plan: Plan, peak: float, warmup_steps: int, total: int, final_fraction: float
) -> optax.Schedule:
  """Returns updates -> learning rate."""
  if plan.schedule == "constant":
    if plan.changed_at:
      return optax.constant_schedule(plan.changed_from)
    final_fraction = 1.0
  start = plan.changed_at if plan.schedule == "restart" else 0
  schedule = learning_rate_schedule(
    peak,
    warmup_steps=fitting_warmup(warmup_steps, total - start),
    total_steps=total - start,
    final_fraction=final_fraction,
  )
  shift = plan.offset - start
  if not shift:
    return schedule
  # Below 0 for a moment where skipped updates are not counted.
  return lambda count: schedule(jnp.maximum(count + shift, 0))


def make_optimizer(
  settings: ConfigDict,
  *,
  batch_size: int,
  steps_per_epoch: float,
  total_steps: int,
  plan: Plan = ORIGINAL,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """Returns the optimizer that `settings` describe, and its learning rate.

  Args:
    settings: `config.optimizer`: name, base_learning_rate (per 256 images),
      warmup_epochs, momentum, weight_decay, trust_coefficient, decay_1d
      (decay biases and batch norm too), final_fraction, b1, b2, eps.
    batch_size: Global batch size, in images.
    steps_per_epoch: May be fractional.
    total_steps: Length of the run.
    plan: How the learning rate follows the run.

  Returns:
    The optax transformation, and step -> learning rate (for the logs).

  Raises:
    UserError: Unknown optimizer, or a run without steps.
  """
  make = lookup(OPTIMIZERS, settings.name, "optimizer")
  schedule = _planned_schedule(
    plan,
    settings.base_learning_rate * batch_size / 256,
    round(settings.warmup_epochs * steps_per_epoch),
    total_steps,
    settings.final_fraction,
  )
  return make(settings, schedule), schedule
