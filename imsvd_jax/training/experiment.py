"""From a config to the objects that a training step is made of."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imsvd_jax.base.errors import UserError, lookup, pair
from imsvd_jax.models import BACKBONES, Encoder, Projector
from imsvd_jax.objectives import OBJECTIVES, Objective
from imsvd_jax.training.optim import make_optimizer


class Experiment(NamedTuple):
  """What a config means: the objects that the step is made of."""

  config: Any  # The locked ConfigDict.
  model: Encoder
  objective: Objective
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  total_steps: int
  steps_per_epoch: float


NUM_GLOBAL = 2  # Global views per image; local crops come after them.


def epochs_to_steps(epochs: float, steps_per_epoch: float) -> int:
  """The one place that turns epochs into steps (rounded, at least one)."""
  return max(1, round(epochs * steps_per_epoch))


def hyperparameters(config: Any) -> dict[str, Any]:
  """Keyword arguments of the config's objective."""
  return dict(config.objective[config.objective.name])


def build(config: Any, num_examples: int) -> Experiment:
  """Checks a config and makes its model, objective and optimizer.

  Args:
    config: A recipe (see configs/common.py).
    num_examples: Images in the train split, which defines the epoch.

  Raises:
    UserError: A name is unknown, or values contradict each other.
  """
  objective = lookup(OBJECTIVES, config.objective.name, "objective")
  _check(config, objective)
  jax.eval_shape(lambda: _check_objective(config, objective))
  steps_per_epoch = num_examples / config.batch_size
  total_steps = epochs_to_steps(config.epochs, steps_per_epoch)
  optimizer, schedule = make_optimizer(
    config.optimizer,
    batch_size=config.batch_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
  )
  return Experiment(
    config=config,
    model=make_model(config.model, objective),
    objective=objective,
    optimizer=optimizer,
    schedule=schedule,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
  )


def make_model(settings: Any, objective: Objective) -> Encoder:
  """Returns the encoder of `config.model` with the objective's head."""
  dtype = lookup(
    {"float32": jnp.float32, "bfloat16": jnp.bfloat16}, settings.dtype, "dtype"
  )
  *hidden, out = settings.projector
  return Encoder(
    backbone=lookup(BACKBONES, settings.backbone, "backbone")(
      width_multiplier=settings.width_multiplier,
      stem=settings.stem,
      dtype=dtype,
      remat=settings.remat,
      zero_init_residual=settings.zero_init_residual,
    ),
    projector=Projector(
      widths=(*hidden, out * objective.embedding_factor),
      hidden_bias=settings.projector_bias,
      dtype=dtype,
    ),
  )


def _check(config: Any, objective: Objective) -> None:
  if config.batch_size < 2:
    raise UserError(
      f"batch_size={config.batch_size}: the objectives are statistics over"
      " the batch; use at least 2."
    )
  if not 0 < config.epochs < math.inf:
    raise UserError(f"epochs={config.epochs}; expected more than 0.")
  _check_widths(config.model.projector)
  if config.views.view1.size != config.views.view2.size:
    raise UserError(
      f"views.view1.size={config.views.view1.size} differs from"
      f" views.view2.size={config.views.view2.size}; the two global views"
      " need one size."
    )
  for name, view in config.views.items():
    if name != "num_local":
      pair(f"views.{name}.blur_sigma", view.blur_sigma)
  for key in ("mean", "std"):
    count = len(config.data[key])
    if count not in (1, config.data.channels):
      raise UserError(
        f"data.{key} has {count} values, but data.channels is"
        f" {config.data.channels}; expected one value per channel, or a single"
        " one for all."
      )
  name = config.objective.name
  if objective.discrete:
    width = config.model.projector[-1]
    num_bins = config.objective[name].num_bins
    if num_bins < 2 or width % num_bins:
      raise UserError(
        f"The last width of model.projector ({width}) is not a multiple of"
        f" objective.{name}.num_bins ({num_bins}); an embedding is M variables"
        " of num_bins entries each."
      )


def _check_widths(widths: Any) -> None:
  is_list = isinstance(widths, list | tuple) and len(widths) > 0
  if not is_list or not all(isinstance(w, int) and w > 0 for w in widths):
    raise UserError(
      f"model.projector is {widths!r}; expected one or more widths, such as"
      ' "(2048,1024)".'
    )


def _check_objective(config: Any, objective: Objective) -> None:
  """Traces the objective, which refuses what it cannot compute with."""
  num_views = NUM_GLOBAL + config.views.num_local
  width = config.model.projector[-1] * objective.embedding_factor
  z = jnp.zeros((config.batch_size, width))
  objective.loss(
    [z] * num_views,
    num_global=NUM_GLOBAL,
    targets=[z] * NUM_GLOBAL if objective.uses_target else None,
    key=jax.random.key(0),
    **hyperparameters(config),
  )
