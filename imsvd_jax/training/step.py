"""One training step as a pure function: augment, embed, objective, update.

Free of TensorFlow, so that benchmarks and preflight can compile the real step
on any machine.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from imsvd_jax.data import resampling
from imsvd_jax.models import Encoder
from imsvd_jax.models.layers import DROP_PATH
from imsvd_jax.objectives.diagnostics import diagnostics, off_diagonal_floor
from imsvd_jax.training import finite, micro_batches, sharding
from imsvd_jax.training.augment import augment_views
from imsvd_jax.training.experiment import NUM_GLOBAL, Experiment
from imsvd_jax.training.state import TrainState, target_momentum, update_target

# Folded in where the augmentation folds in the epoch: no epoch has such a
# number. Of the objective's noise, and of stochastic depth.
_NOISE = 2**32 - 1
_DEPTH = 2**32 - 2


def init_state(experiment: Experiment) -> TrainState:
  """Returns the state before the first step, a function of the seed."""
  init_key, run_key = jax.random.split(jax.random.key(experiment.seed))
  images = jnp.zeros((1, *experiment.image_shape), jnp.float32)
  variables = experiment.model.init(init_key, images, train=False)
  params = variables["params"]
  batch_stats = variables.get("batch_stats", {})  # A ViT has no BatchNorm.
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
    skips=finite.Skips.none(),
    bad_images=jnp.zeros((), jnp.int32),
  )


def state_shardings(
  experiment: Experiment, replicated: jax.sharding.NamedSharding
) -> TrainState:
  """Returns the sharding of each leaf of the state.

  Args:
    experiment: From `build`; its `state_sharding` says what is split.
    replicated: Sharding of what is whole on every device of the mesh.
  """
  shapes = jax.eval_shape(functools.partial(init_state, experiment))
  mode = experiment.state_sharding
  return sharding.of_state(shapes, replicated.mesh, mode)


def initial_state(
  experiment: Experiment, replicated: jax.sharding.NamedSharding
) -> TrainState:
  """Returns the state before the first step, on the devices."""
  init = functools.partial(init_state, experiment)
  shardings = state_shardings(experiment, replicated)
  return jax.jit(init, out_shardings=shardings)()


def abstract_state(
  experiment: Experiment, replicated: jax.sharding.NamedSharding
) -> TrainState:
  """Returns shapes, types and shardings of a state; compiles nothing."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    jax.eval_shape(functools.partial(init_state, experiment)),
    state_shardings(experiment, replicated),
  )


def jit_train_step(
  experiment: Experiment, replicated: jax.sharding.NamedSharding
) -> jax.stages.Wrapped:
  """Returns `(state, batch) -> (state, metrics)` as training compiles it.

  Args:
    experiment: From `build`.
    replicated: Sharding of the metrics, and of what is whole in the state.
  """
  mesh = replicated.mesh.abstract_mesh

  def step(
    state: TrainState, batch: dict[str, Any]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    # The objective divides its work over the mesh in the context.
    with jax.sharding.use_abstract_mesh(mesh):
      return train_step(experiment, state, batch)

  shardings = (state_shardings(experiment, replicated), replicated)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings)


def train_steps(
  experiment: Experiment,
  replicated: jax.sharding.NamedSharding,
  sizes: Sequence[int],
) -> dict[int, jax.stages.Wrapped]:
  """Returns `jit_train_step` for each size of the global views."""
  return {
    size: jit_train_step(experiment.at_size(size), replicated) for size in sizes
  }


def compile_ahead(
  steps: Mapping[int, jax.stages.Wrapped],
  state: TrainState,
  batch: dict[str, Any],
) -> dict[int, jax.stages.Compiled]:
  """Compiles `train_steps`, so that no change of the size stops a run.

  Args:
    steps: From `train_steps`.
    state: A state.
    batch: A batch of any size of views.
  """
  return {
    size: step.lower(state, _abstract_at_size(batch, size)).compile()
    for size, step in steps.items()
  }


def _abstract_at_size(batch: dict[str, Any], size: int) -> dict[str, Any]:
  """Returns the shapes of a batch whose global views have one size."""
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch
  )
  if "views" not in batch:
    return batch  # The step cuts them out.
  views, *local = batch["views"]
  shape = (*views.shape[:2], size, size, views.shape[-1])
  return batch | {"views": (views.update(shape=shape), *local)}


def train_step(
  experiment: Experiment, state: TrainState, batch: dict[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
  """One update.

  Args:
    experiment: From `build`; static.
    state: The state so far; donate it.
    batch: {"views": (uint8 [B, 2, S, S, C], [uint8 [B, L, s, s, C]]),
      "index": int32 [B], "epoch": int32 [B]}; from a source of files also
      "bad": bool [B], which images were replaced. In place of "views", of which
      `cut_views` makes them.

  Returns:
    The new state, and scalars: "loss", the objective's "terms" (nats where
    they are entropies), "diagnostics", "learning_rate" and "gradient_norm";
    "skips" and "bad_images" as in the state. Where the loss or the gradient's
    norm is not finite, the new state is the old one but for `step`, `skips` and
    `bad_images`.
  """
  backpropagate = _accumulate if experiment.accumulate_steps > 1 else _whole
  passes = backpropagate(experiment, state, batch)
  gradients, target = passes.gradients, passes.target

  with jax.named_scope("optimizer"):
    mode = experiment.state_sharding
    params = sharding.split(state.params, mode)
    updates, opt_state = experiment.optimizer.update(
      sharding.split(gradients, mode), state.opt_state, params
    )
    params = optax.apply_updates(params, updates)
    if target is not None:
      momentum = target_momentum(
        state.step + experiment.offset,
        start=experiment.target_momentum,
        total_steps=experiment.total_steps,
      )
      target["params"] = update_target(target["params"], params, momentum)

  with jax.named_scope("diagnostics"):
    diagnosed = signs_of_collapse(experiment, passes.embeddings)
  metrics = {
    "loss": passes.loss,
    "terms": passes.terms,
    "diagnostics": diagnosed,
    # The optimizer does not count the steps that were skipped.
    "learning_rate": experiment.schedule(state.step - state.skips.total),
    "gradient_norm": optax.tree.norm(gradients),
    "bad_images": state.bad_images,
  }
  if "bad" in batch:
    metrics["bad_images"] += jnp.sum(batch["bad"], dtype=jnp.int32)
  new_state = dataclasses.replace(
    state,
    params=params,
    batch_stats=passes.batch_stats,
    opt_state=opt_state,
    target=target,
  )
  with jax.named_scope("optimizer"):
    return finite.discard_unless_finite(state, new_state, metrics)


class _Passes(NamedTuple):
  """What the passes through the networks give."""

  loss: jax.Array
  terms: dict[str, jax.Array]
  embeddings: list[jax.Array]  # [B, D] per view.
  gradients: Any  # Of the loss, in the structure of the parameters.
  batch_stats: Any  # Running statistics after the step.
  target: dict[str, Any] | None  # The target, with its running statistics.


def _whole(
  experiment: Experiment, state: TrainState, batch: dict[str, Any]
) -> _Passes:
  """Passes the whole batch through the network at once."""
  views = _views(experiment, state, batch)
  targets = target = None
  if experiment.objective.uses_target:
    targets, target = _target_pass(experiment, state.target, views[0])

  def loss_fn(params: Any) -> tuple[jax.Array, Any]:
    embeddings, batch_stats = embed_views(
      experiment.model,
      whole_weights(experiment, params),
      state.batch_stats,
      views,
      noise_key(state.rng, state.step, _DEPTH),
    )
    loss, terms = _objective(experiment, state, embeddings, targets)
    return loss, (terms, embeddings, batch_stats)

  (loss, (terms, embeddings, batch_stats)), gradients = jax.value_and_grad(
    loss_fn, has_aux=True
  )(state.params)
  return _Passes(loss, terms, embeddings, gradients, batch_stats, target)


def _accumulate(
  experiment: Experiment, state: TrainState, batch: dict[str, Any]
) -> _Passes:
  """Passes micro-batches through the network, in the memory of one (GradCache).

  The first pass keeps nothing but embeddings, of which the objective is that of
  the whole batch. The second computes each micro-batch again and passes the
  gradients of its embeddings back. BatchNorm normalizes by the statistics of a
  micro-batch; each updates the running ones once, in the first pass.
  """
  count = experiment.accumulate_steps
  target = state.target
  depth = noise_key(state.rng, state.step, _DEPTH)

  def embed(
    params: Any, batch_stats: Any, number: jax.Array
  ) -> tuple[list[jax.Array], tuple[Any, list[jax.Array]]]:
    part = micro_batches.take(batch, number, count)
    views = _views(experiment, state, part)
    key = jax.random.fold_in(depth, number)
    weights = whole_weights(experiment, params)
    z, stats = embed_views(experiment.model, weights, batch_stats, views, key)
    return z, (stats, views)

  def forward(carry: Any, number: jax.Array) -> tuple[Any, Any]:
    batch_stats, target = carry
    z, (batch_stats, views) = embed(state.params, batch_stats, number)
    targets = None
    if target is not None:
      targets, target = _target_pass(experiment, target, views[0])
    return (batch_stats, target), (z, targets)

  def backward(total: Any, part: Any) -> tuple[Any, None]:
    number, cotangents = part
    _, pull, _ = jax.vjp(
      lambda params: embed(params, state.batch_stats, number),
      state.params,
      has_aux=True,
    )
    return jax.tree.map(jnp.add, total, pull(cotangents)[0]), None

  numbers = jnp.arange(count)
  (batch_stats, target), parts = jax.lax.scan(
    forward, (state.batch_stats, target), numbers
  )
  embeddings, targets = jax.tree.map(micro_batches.join, parts)
  (loss, terms), cotangents = jax.value_and_grad(
    lambda z: _objective(experiment, state, z, targets), has_aux=True
  )(embeddings)
  cotangents = [micro_batches.split(z, count) for z in cotangents]
  gradients, _ = jax.lax.scan(
    backward,
    jax.tree.map(jnp.zeros_like, state.params),
    (numbers, cotangents),
  )
  return _Passes(loss, terms, embeddings, gradients, batch_stats, target)


def _views(
  experiment: Experiment, state: TrainState, batch: dict[str, Any]
) -> list[jax.Array]:
  """Returns the augmented views of a batch, see `augment_views`."""
  # The scopes name the parts in profiles and in preflight's table. The model's
  # modules have scopes of their own.
  with jax.named_scope("augment"):
    batch = cut_views(experiment, batch)
    return augment_views(experiment.augmentation, state.rng, batch)


def _objective(
  experiment: Experiment,
  state: TrainState,
  embeddings: list[jax.Array],
  targets: list[jax.Array] | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss and its terms, of the embeddings [B, D] of each view."""
  with jax.named_scope("objective"):
    return experiment.objective.loss(
      embeddings,
      num_global=NUM_GLOBAL,
      targets=targets,
      key=noise_key(state.rng, state.step),
      **experiment.hyperparameters,
    )


def cut_views(experiment: Experiment, batch: dict[str, Any]) -> dict[str, Any]:
  """Returns a batch with its views.

  Args:
    experiment: From `build`.
    batch: See `train_step`. A batch without "views" has "boxes", float32 [B, V,
      5] (see `data.boxes`), and the images that they are cut from: "images",
      uint8 [B, height, width, C], or "data_set", those of the whole data set.
  """
  if "views" in batch:
    return batch
  images = batch.get("images")
  if images is None:
    images = jnp.take(batch["data_set"], batch["index"], axis=0, mode="clip")
  views = resampling.cut_views(
    images, batch["boxes"], experiment.view_sizes, experiment.interpolation
  )
  return batch | {"views": views}


def noise_key(
  rng: jax.Array, step: jax.Array, purpose: int = _NOISE
) -> jax.Array:
  """Returns a key of a step, the objective's; augmentation never uses it."""
  return jax.random.fold_in(jax.random.fold_in(rng, purpose), step)


def embed_views(
  model: Encoder,
  params: Any,
  batch_stats: Any,
  views: list[jax.Array],
  key: jax.Array | None = None,
) -> tuple[list[jax.Array], Any]:
  """Embeds each view in training mode, with stochastic depth if given a key.

  Each global view goes through the network by itself, one after the other, so
  that BatchNorm sees one view's statistics, as in the reference recipes. All
  local crops go through together, as one batch, unlike in MVEB's reference:
  there each goes through alone, so that six of them have 82% of the weight in
  the running statistics, by which evaluation normalizes whole images; here they
  have 37%.

  Returns:
    Embeddings [B, D] per view, and the running statistics after all of them.
  """
  params = _in_compute_type(model, params)

  def apply(images: jax.Array, batch_stats: Any) -> tuple[jax.Array, Any]:
    rngs = None
    if key is not None:  # Another one for every view.
      rngs = {DROP_PATH: jax.random.fold_in(key, len(embeddings))}
    (_, z), updated = model.apply(
      {"params": params, "batch_stats": batch_stats},
      images,
      train=True,
      mutable=["batch_stats"],
      rngs=rngs,
    )
    return z, updated.get("batch_stats", {})

  embeddings: list[jax.Array] = []
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


def whole_weights(experiment: Experiment, params: Any) -> Any:
  """Returns weights as the network reads them, whole on every device."""
  params = _in_compute_type(experiment.model, params)
  return sharding.whole(params, experiment.state_sharding)


def _in_compute_type(model: Encoder, params: Any) -> Any:
  """Casts weight matrices and kernels once for all views, as each layer would.

  The gradients of all views are then added up before they are summed over the
  devices, not after: in bfloat16 this halves the traffic of training. Vectors,
  such as those of BatchNorm, stay in float32.
  """
  dtype = model.backbone.dtype
  return jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 1 else p, params)


def _target_pass(
  experiment: Experiment, target: dict[str, Any], global_views: jax.Array
) -> tuple[list[jax.Array], dict[str, Any]]:
  """Embeds the global views with the EMA target network.

  The target normalizes by the statistics of the batch, like the online
  network (a lagging running mean under fast-moving weights would shift its
  outputs), and keeps running statistics of its own for evaluation.
  """
  embeddings, batch_stats = embed_views(
    experiment.model,
    whole_weights(experiment, target["params"]),
    target["batch_stats"],
    [global_views],
  )
  target = target | {"batch_stats": batch_stats}
  return [jax.lax.stop_gradient(z) for z in embeddings], target


def signs_of_collapse(
  experiment: Experiment, embeddings: list[jax.Array]
) -> dict[str, jax.Array]:
  """Returns the numbers of `objectives.diagnostics` that every step computes.

  Args:
    experiment: What is trained.
    embeddings: Of each view, [N, D]; the first two are used.
  """
  # A stochastic head outputs the mean, then the parameters of its noise.
  size = experiment.embedding_size
  embeddings = [
    jax.lax.stop_gradient(z[:, :size]) for z in embeddings[:NUM_GLOBAL]
  ]
  if not experiment.objective.discrete:
    return diagnostics(embeddings)
  settings = experiment.hyperparameters
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
