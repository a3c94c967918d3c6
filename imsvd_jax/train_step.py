"""One training step as a pure function: augment, embed, objective, update.

Free of TensorFlow, so that benchmarks and preflight can compile the real step
on any machine.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imsvd_jax import augment
from imsvd_jax.errors import UserError, lookup, pair
from imsvd_jax.models import BACKBONES, Encoder, Projector
from imsvd_jax.objectives import OBJECTIVES, Objective
from imsvd_jax.objectives.diagnostics import diagnostics, off_diagonal_floor
from imsvd_jax.optim import make_optimizer
from imsvd_jax.train_state import (
  Skips,
  TrainState,
  target_momentum,
  update_target,
)

NUM_GLOBAL = 2  # Global views per image; local crops come after them.

# Augmentation's keys fold in an epoch first; this is none.
_NOISE = 2**32 - 1


class Experiment(NamedTuple):
  """What a config means: the objects that the step is made of."""

  config: Any  # The locked ConfigDict.
  model: Encoder
  objective: Objective
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  total_steps: int
  steps_per_epoch: float


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


def init_state(experiment: Experiment) -> TrainState:
  """Returns the state before the first step, a function of config.seed."""
  config = experiment.config
  init_key, run_key = jax.random.split(jax.random.key(config.seed))
  size = config.views.view1.size
  images = jnp.zeros((1, size, size, config.data.channels), jnp.float32)
  variables = experiment.model.init(init_key, images, train=False)
  params, batch_stats = variables["params"], variables["batch_stats"]
  target = None
  if experiment.objective.uses_target:
    # A copy: donated buffers must not be shared between two leaves.
    target = jax.tree.map(
      jnp.copy, {"params": params, "batch_stats": batch_stats}
    )
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=experiment.optimizer.init(params),
    target=target,
    rng=run_key,
    skips=Skips.none(),
    bad_images=jnp.zeros((), jnp.int32),
  )


def abstract_batch(config: Any, sharding: Any = None) -> dict[str, Any]:
  """Returns the shapes and types of a global batch, for compiling ahead."""
  views, size = config.views, config.batch_size

  def images(count: int, side: int) -> jax.ShapeDtypeStruct:
    shape = (size, count, side, side, config.data.channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)

  groups = (images(NUM_GLOBAL, views.view1.size),)
  if views.num_local:
    groups += (images(views.num_local, views.local.size),)
  numbers = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
  return {"views": groups, "index": numbers, "epoch": numbers}


def jit_train_step(
  experiment: Experiment, state_sharding: Any
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """Returns `(state, batch) -> (state, metrics)` as training compiles it.

  Args:
    experiment: From `build`.
    state_sharding: NamedSharding of the state and of the metrics.
  """
  mesh = state_sharding.mesh.abstract_mesh

  def step(state, batch):
    # The objective divides its work over the mesh that it finds in context.
    with jax.sharding.use_abstract_mesh(mesh):
      return train_step(experiment, state, batch)

  return jax.jit(step, donate_argnums=0, out_shardings=state_sharding)


def train_step(
  experiment: Experiment, state: TrainState, batch: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
  """One update.

  Args:
    experiment: From `build`; static.
    state: The state so far; donate it.
    batch: {"views": (uint8 [B, 2, S, S, C], [uint8 [B, L, s, s, C]]),
      "index": int32 [B], "epoch": int32 [B]}; from a source of files also
      "bad": bool [B], which images were replaced.

  Returns:
    The new state, and scalars: "loss", the objective's "terms" (nats where
    they are entropies), "diagnostics", "learning_rate" and "gradient_norm";
    "skips" and "bad_images" as in the state. Where the loss or the gradient's
    norm is not finite, the new state is the old one but for `step`, `skips` and
    `bad_images`.
  """
  # Scopes name the parts in profiles and in preflight's table; the model's
  # modules name their own.
  config = experiment.config
  with jax.named_scope("augment"):
    views = augment_views(config, state.rng, batch)  # list of [V, B, S, S, C]

  targets = target = None
  if experiment.objective.uses_target:
    targets, target = _target_pass(experiment, state, views[0])

  def loss_fn(params):
    embeddings, batch_stats = embed_views(
      experiment.model, params, state.batch_stats, views
    )
    with jax.named_scope("objective"):
      loss, terms = experiment.objective.loss(
        embeddings,  # [B, D] per view
        num_global=NUM_GLOBAL,
        targets=targets,
        key=noise_key(state.rng, state.step),
        **hyperparameters(config),
      )
    return loss, (terms, embeddings, batch_stats)

  (loss, (terms, embeddings, batch_stats)), gradients = jax.value_and_grad(
    loss_fn, has_aux=True
  )(state.params)

  with jax.named_scope("optimizer"):
    updates, opt_state = experiment.optimizer.update(
      gradients, state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    if target is not None:
      momentum = target_momentum(
        state.step,
        start=config.target_momentum,
        total_steps=experiment.total_steps,
      )
      target["params"] = update_target(target["params"], params, momentum)

  with jax.named_scope("diagnostics"):
    diagnosed = _diagnostics(experiment, embeddings)
  metrics = {
    "loss": loss,
    "terms": terms,
    "diagnostics": diagnosed,
    # The optimizer's own count does not see the steps that were skipped.
    "learning_rate": experiment.schedule(state.step - state.skips.total),
    "gradient_norm": optax.tree.norm(gradients),
    "bad_images": state.bad_images,
  }
  if "bad" in batch:
    metrics["bad_images"] += jnp.sum(batch["bad"], dtype=jnp.int32)
  new_state = state.replace(
    params=params,
    batch_stats=batch_stats,
    opt_state=opt_state,
    target=target,
  )
  with jax.named_scope("optimizer"):
    return _discard_unless_finite(state, new_state, metrics)


def noise_key(rng: jax.Array, step: jax.Array) -> jax.Array:
  """Returns the key of a step's objective, none of the augmentation's."""
  return jax.random.fold_in(jax.random.fold_in(rng, _NOISE), step)


def checked_names(metrics: dict[str, Any]) -> list[str]:
  """Names of the values whose finiteness is recorded, in bit order."""
  return sorted(["loss", "gradient_norm", *metrics["terms"]])


def _discard_unless_finite(
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


def augment_views(
  config: Any, rng: jax.Array, batch: dict[str, Any]
) -> list[jax.Array]:
  """Photometric augmentation of a batch's views.

  Returns:
    One float32 array [V, B, S, S, C] per resolution: the two global views,
    then the local crops where there are any.
  """
  views = config.views
  recipes = [[views.view1, views.view2], [views.local] * views.num_local]
  first, groups = 0, []
  for group, images in zip(recipes, batch["views"], strict=False):
    augmented = []
    for v, recipe in enumerate(group):
      keys = augment.view_keys(rng, batch["epoch"], batch["index"], first + v)
      augmented.append(
        augment.augment(
          keys, images[:, v], recipe, mean=config.data.mean, std=config.data.std
        )
      )
    groups.append(jnp.stack(augmented))
    first += len(group)
  return groups


def embed_views(
  model: Encoder, params: Any, batch_stats: Any, views: list[jax.Array]
) -> tuple[list[jax.Array], Any]:
  """Embeds each view in training mode.

  Each global view goes through the network by itself, one after the other, so
  that BatchNorm sees one view's statistics, as in the reference recipes. Local
  crops of one image go through together, as one larger batch.

  Returns:
    Embeddings [B, D] per view, and the running statistics after all of them.
  """
  params = _in_compute_type(model, params)

  def apply(images, batch_stats):
    (_, z), updated = model.apply(
      {"params": params, "batch_stats": batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    return z, updated["batch_stats"]

  embeddings = []
  for images in views[0]:
    z, batch_stats = apply(images, batch_stats)
    embeddings.append(z)
  for crops in views[1:]:
    # [L, B, ...] -> [B * L, ...] keeps axis 0 sharded over the devices.
    num_crops, size = crops.shape[:2]
    flat = crops.swapaxes(0, 1).reshape(-1, *crops.shape[2:])
    z, batch_stats = apply(flat, batch_stats)
    z = z.reshape(size, num_crops, -1)
    embeddings.extend(z[:, i] for i in range(num_crops))
  return embeddings, batch_stats


def _in_compute_type(model: Encoder, params: Any) -> Any:
  """Casts weight matrices and kernels once for all views, as each layer would.

  The views' gradients then meet before they are added up over the devices,
  and not after it: in bfloat16 that halves what training sends. Vectors, among
  them those of BatchNorm, stay in float32.
  """
  dtype = model.backbone.dtype
  return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)


def _target_pass(
  experiment: Experiment, state: TrainState, global_views: jax.Array
) -> tuple[list[jax.Array], dict[str, Any]]:
  """Embeds the global views with the EMA target network.

  The target normalizes by the statistics of the batch, like the online
  network (a lagging running mean under fast-moving weights would shift its
  outputs), and keeps running statistics of its own for evaluation.
  """
  embeddings, batch_stats = embed_views(
    experiment.model,
    state.target["params"],
    state.target["batch_stats"],
    [global_views],
  )
  target = {"params": state.target["params"], "batch_stats": batch_stats}
  return [jax.lax.stop_gradient(z) for z in embeddings], target


def _diagnostics(
  experiment: Experiment, embeddings: list[jax.Array]
) -> dict[str, jax.Array]:
  """Signs of collapse, cheap enough for every step."""
  # A stochastic head's outputs are the mean, and then what its noise is like.
  dimensions = experiment.config.model.projector[-1]
  embeddings = [
    jax.lax.stop_gradient(z[:, :dimensions]) for z in embeddings[:NUM_GLOBAL]
  ]
  if not experiment.objective.discrete:
    return diagnostics(embeddings)
  settings = hyperparameters(experiment.config)
  return {
    **diagnostics(
      embeddings,
      num_bins=settings["num_bins"],
      temperature=settings["temperature"],
    ),
    "off_diagonal_floor": off_diagonal_floor(
      settings["num_bins"], embeddings[0].shape[0]
    ),
  }
