"""One training step as a pure function: augment, embed, objective, update.

Free of TensorFlow, so that benchmarks and preflight can compile the real step
on any machine.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imsvd_jax.models import Encoder
from imsvd_jax.objectives.diagnostics import diagnostics, off_diagonal_floor
from imsvd_jax.training import augment
from imsvd_jax.training.experiment import (
  NUM_GLOBAL,
  Experiment,
  hyperparameters,
)
from imsvd_jax.training.finite import Skips
from imsvd_jax.training.finite import (
  discard_unless_finite as _discard_unless_finite,
)
from imsvd_jax.training.state import TrainState, target_momentum, update_target

# Augmentation's keys fold in an epoch first; this is none.
_NOISE = 2**32 - 1


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
