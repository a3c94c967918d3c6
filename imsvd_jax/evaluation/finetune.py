"""Semi-supervised fine-tuning: backbone and head on part of the labels.

Unlike the other evaluators it changes weights: those of a copy, which starts
from the checkpoint every time.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import (
  epochs,
  input_checks,
  protocols,
  scores,
  subsets,
)
from imsvd_jax.evaluation.features import extract
from imsvd_jax.evaluation.inputs import (
  Apply,
  Backbone,
  Batches,
  Evaluator,
  Inputs,
)

NEEDS = (
  "backbone",
  "num_classes",
  "train_labels",
  "test_labels",
  "train_epochs",
  "test_batches",
)


class State(NamedTuple):
  """What a step of fine-tuning changes."""

  params: dict[str, Any]  # {"backbone", "head": {"kernel", "bias"}}
  batch_stats: Any  # of the backbone
  momentum: Any  # optax state of SGD


def run(
  inputs: Inputs, protocol: protocols.FineTune
) -> Iterator[tuple[str, float]]:
  """Trains backbone and a linear head; yields the accuracy on test.

    m <- momentum m + gradient + weight_decay w,   w <- w - learning_rate m

  with one learning rate for the backbone and one for the head, both on a cosine
  in steps of an epoch. BatchNorm normalizes by the batch over all devices and
  keeps running statistics, which classify the test images after every epoch.

  Raises:
    UserError: The batch does not fit the images or the devices, a class of test
      is absent from train, or the loss is not finite.
  """
  backbone, num_classes, train_labels, test_labels, train_epochs, test = (
    inputs.need(*NEEDS)
  )
  labels = train_labels()
  chosen = labelled_part(labels, protocol)
  num_images = len(labels if chosen is None else chosen)
  mesh = devices.make_mesh()
  _check(num_images, protocol, mesh)
  input_checks.check_classes(labels, test_labels())
  classify = _classifier(backbone.apply, test)

  def finish(state: State, epoch: int, loss: float) -> np.ndarray:
    if not math.isfinite(loss):
      raise UserError(
        f"Fine-tuning diverged in epoch {epoch} (loss {loss}); use smaller"
        " learning rates."
      )
    return classify(state)

  found = epochs.train(
    _initial_state(backbone, num_classes, protocol, mesh),
    protocol.epochs,
    batches=train_epochs(chosen),
    step=_step(backbone.apply, protocol, mesh),
    finish=finish,
    meter=console.Progress("Fine-tuning", protocol.epochs * num_images),
    keeper=inputs.keeper,
  )
  yield from scores.epochs_headline(found.history, found.mean_losses[-1])
  yield "train_images", num_images


def labelled_part(
  labels: np.ndarray, protocol: protocols.FineTune
) -> np.ndarray | None:
  """Returns the images whose labels may be used; None for all of them.

  The protocol's fraction and seed alone choose the part.

  Raises:
    UserError: There are several labels per image.
  """
  if labels.ndim > 1:
    raise UserError(
      "The training images have several labels each; fine-tuning expects one."
    )
  if protocol.fraction == 1:
    return None
  return subsets.subset(labels, protocol.fraction, seed=protocol.seed)


def _step(
  apply: Apply, protocol: protocols.FineTune, mesh: jax.sharding.Mesh
) -> Callable[[State, Mapping[str, Any], int], tuple[State, jax.Array, int]]:
  """Returns the step of `epochs.train`."""
  train_step = jax.jit(
    functools.partial(_train_step, apply, protocol), donate_argnums=0
  )

  def step(
    state: State, batch: Mapping[str, Any], epoch: int
  ) -> tuple[State, jax.Array, int]:
    decay = 0.5 * (1 + math.cos(math.pi * epoch / protocol.epochs))
    wanted = {name: batch[name] for name in ("image", "label", "mask")}
    placed = devices.shard_batch(wanted, mesh)
    return *train_step(state, placed, np.float32(decay)), protocol.batch_size

  return step


def _check(
  num_images: int, protocol: protocols.FineTune, mesh: jax.sharding.Mesh
) -> None:
  size = protocol.batch_size
  fitting = max(2, num_images // 4)  # One image has no batch statistics.
  fitting += -fitting % mesh.size
  if size > num_images:
    remedy = (
      f"set a smaller one, such as --set=batch_size={fitting}"
      if fitting <= num_images
      else f"at least {fitting} are needed"
    )
    raise UserError(
      f"The labelled part has {num_images} images, fewer than a batch of"
      f" {size}; {remedy}."
    )
  # Padding would change the batch's statistics.
  devices.check_batch_size(size, mesh.size, "batch_size of the protocol")


def _initial_state(
  backbone: Backbone,
  num_classes: int,
  protocol: protocols.FineTune,
  mesh: jax.sharding.Mesh,
) -> State:
  # Copies: the step donates its state.
  params, batch_stats = jax.tree.map(
    np.array, (backbone.params, backbone.batch_stats)
  )
  shape = (backbone.num_features, num_classes)
  kernel = jax.random.normal(jax.random.key(protocol.seed), shape)
  params = {
    "backbone": params,
    "head": {
      "kernel": np.asarray(protocol.initial_deviation * kernel),
      "bias": np.zeros(num_classes, np.float32),
    },
  }
  momentum = jax.tree.map(np.asarray, _optimizer(protocol).init(params))
  state = State(params, batch_stats, momentum)
  return jax.device_put(state, devices.replicated(mesh))


def _optimizer(protocol: protocols.FineTune) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(protocol.weight_decay),
    optax.trace(decay=protocol.momentum),
  )


def _logits(
  apply: Apply,
  params: dict[str, Any],
  batch_stats: Any,
  images: jax.Array,
  train: bool,
) -> tuple[jax.Array, Any]:
  """Returns the logits [B, C] of uint8 images, and the new statistics."""
  features, updated = apply(params["backbone"], batch_stats, images, train)
  features = features.astype(jnp.float32)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"]
  return logits, updated


def _train_step(
  apply: Apply,
  protocol: protocols.FineTune,
  state: State,
  batch: dict[str, jax.Array],
  decay: jax.Array,
) -> tuple[State, jax.Array]:
  """Takes one step of SGD; returns the new state and the mean loss in nats."""

  def loss_of(params: dict[str, Any]) -> tuple[jax.Array, Any]:
    logits, batch_stats = _logits(
      apply, params, state.batch_stats, batch["image"], True
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(batch["label"], 0)
    )
    weights = (batch["mask"] & (batch["label"] >= 0)).astype(jnp.float32)
    return (losses * weights).sum() / jnp.maximum(weights.sum(), 1), batch_stats

  (loss, batch_stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(
    state.params
  )
  updates, momentum = _optimizer(protocol).update(
    gradients, state.momentum, state.params
  )
  rates = {
    "backbone": protocol.backbone_learning_rate * decay,
    "head": protocol.head_learning_rate * decay,
  }
  params = {
    name: jax.tree.map(
      lambda w, m, rate=rate: w - rate * m, state.params[name], updates[name]
    )
    for name, rate in rates.items()
  }
  return State(params, batch_stats, momentum), loss


def _classifier(
  apply: Apply, test_batches: Callable[[], Batches]
) -> Callable[[State], np.ndarray]:
  """Returns a function that ranks the classes of the test images, int32 [N].

  By the running statistics of a state; see `scores.class_ranks`.
  """
  # Over this process's devices; processes divide the images among them.
  mesh = devices.make_mesh(jax.local_devices())
  logits_of = jax.jit(
    lambda params, batch_stats, images: _logits(
      apply, params, batch_stats, images, False
    )[0]
  )

  def classify(state: State) -> np.ndarray:
    weights = devices.local_view((state.params, state.batch_stats), mesh)
    logits, labels = extract(
      lambda images: logits_of(*weights, devices.shard_batch(images, mesh)),
      test_batches(),
      name="test images",
    )
    labels = input_checks.check_labels(labels, len(logits), "test")
    return scores.class_ranks(logits, labels)

  return classify


EVALUATOR = Evaluator(run, (*NEEDS, "keeper"), joint=True)
