"""Semi-supervised fine-tuning: backbone and head on part of the labels.

Unlike the other protocols it changes the backbone: a training run, of copies of
the weights, that starts anew from the checkpoint every time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from imsvd_jax.base import devices as sharding
from imsvd_jax.base.console import Progress, print_line
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import crops, evaluation_batches, host_pipeline, part
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import input_checks, protocols, scores, subsets
from imsvd_jax.evaluation.features import extract
from imsvd_jax.runs.encoder import LoadedEncoder
from imsvd_jax.training import augment


class State(NamedTuple):
  """What a step of fine-tuning changes."""

  params: dict[str, Any]  # {"backbone", "head": {"kernel", "bias"}}
  batch_stats: Any  # of the backbone
  momentum: Any  # optax state of SGD


def labelled_part(source: Source, protocol: protocols.FineTune) -> Source:
  """Returns the images whose labels may be used, the same for ever.

  Raises:
    UserError: There are no labels, or several per image.
  """
  labels = part.labels_of(source)
  if source.multi_label:
    raise UserError(
      f"{source.name} has several labels per image; fine-tuning expects one."
    )
  if protocol.fraction == 1:
    return source
  chosen = subsets.subset(labels, protocol.fraction, seed=protocol.seed)
  return part.take(source, chosen)


def fine_tune(
  encoder: LoadedEncoder,
  train: Source,
  test: Source,
  protocol: protocols.FineTune,
  *,
  batch_size: int = 256,
  report: Callable[[str], None] = print_line,
) -> Iterator[tuple[str, float]]:
  """Trains backbone and a linear head; yields the accuracy on test.

    m <- momentum m + gradient + weight_decay w,   w <- w - learning_rate m

  with a learning rate for the backbone and one for the head, both on a cosine
  per epoch. BatchNorm normalizes by the batch over all devices and keeps its
  running statistics, by which the test images are classified after every epoch.

  Args:
    encoder: Where the backbone starts from; it is not changed.
    train: The labelled images, from `labelled_part`.
    test: The images to classify.
    protocol: The hyper-parameters.
    batch_size: Test images at a time, over all devices.
    report: Takes a progress line every few seconds.

  Raises:
    UserError: The batch does not fit the images or the devices, a class of test
      is absent from train, or the loss is not finite.
  """
  mesh = sharding.make_mesh()
  _check(train, protocol, mesh)
  test_labels = part.labels_of(test)
  input_checks.check_classes(part.labels_of(train), test_labels)
  state = _initial_state(encoder, train.num_classes, protocol, mesh)
  step = jax.jit(
    functools.partial(_train_step, encoder, protocol), donate_argnums=0
  )
  classify = _Classifier(encoder, test, protocol.crops, batch_size)
  train_epoch = host_pipeline.labelled_epochs(
    train,
    crop=crops.Crop(*dataclasses.astuple(protocol.crops)[:4]),
    batch_size=protocol.batch_size,
    seed=protocol.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  meter = Progress(
    "Fine-tuning", protocol.epochs * train.num_examples, report=report
  )
  history = []
  for epoch in range(protocol.epochs):
    decay = 0.5 * (1 + math.cos(math.pi * epoch / protocol.epochs))
    losses = []
    for batch in train_epoch(epoch):
      wanted = {name: batch[name] for name in ("image", "label", "mask")}
      placed = sharding.shard_batch(wanted, mesh)
      state, loss = step(state, placed, np.float32(decay))
      losses.append(loss)
      meter.add(protocol.batch_size)
    loss = float(np.mean([np.asarray(value) for value in losses]))
    if not math.isfinite(loss):
      raise UserError(
        f"Fine-tuning diverged in epoch {epoch} (loss {loss}); use smaller"
        " learning rates."
      )
    history.append(classify(state))
  accuracy = scores.accuracy(history[-1])
  top1 = [float((ranks == 0).mean()) for ranks in history]
  yield from scores.headline(accuracy, max(top1))
  yield "top1", accuracy.top1
  yield "top5", accuracy.top5
  yield "best_epoch", int(np.argmax(top1))
  yield "train_loss", loss
  yield "train_images", train.num_examples


def _check(
  train: Source, protocol: protocols.FineTune, mesh: jax.sharding.Mesh
) -> None:
  size = protocol.batch_size
  if size > train.num_examples:
    raise UserError(
      f"The labelled part has {train.num_examples} images, fewer than a batch"
      f" of {size}; set a smaller one, such as"
      f" --set=batch_size={max(mesh.size, train.num_examples // 4)}."
    )
  # Padding would change the batch's statistics.
  sharding.check_batch_size(size, mesh.size, "batch_size of the protocol")


def _initial_state(
  encoder: LoadedEncoder,
  num_classes: int,
  protocol: protocols.FineTune,
  mesh: jax.sharding.Mesh,
) -> State:
  # Through the host: the step donates its state, the encoder keeps its weights.
  variables = jax.tree.map(np.array, encoder.variables)
  side, channels = protocol.crops.size, encoder.config.data.channels
  images = jax.ShapeDtypeStruct((1, side, side, channels), jnp.uint8)
  features = jax.eval_shape(encoder.apply, variables, images)
  shape = (features.shape[-1], num_classes)
  kernel = jax.random.normal(jax.random.key(protocol.seed), shape)
  params = {
    "backbone": variables["params"]["backbone"],
    "head": {
      "kernel": np.asarray(protocol.initial_deviation * kernel),
      "bias": np.zeros(num_classes, np.float32),
    },
  }
  state = State(
    params,
    variables["batch_stats"]["backbone"],
    jax.tree.map(np.asarray, _optimizer(protocol).init(params)),
  )
  return jax.device_put(state, sharding.replicated(mesh))


def _optimizer(protocol: protocols.FineTune) -> optax.GradientTransformation:
  return optax.chain(
    optax.add_decayed_weights(protocol.weight_decay),
    optax.trace(decay=protocol.momentum),
  )


def _logits(
  encoder: LoadedEncoder,
  params: dict[str, Any],
  batch_stats: Any,
  images: jax.Array,
  *,
  train: bool,
) -> tuple[jax.Array, Any]:
  """Returns the logits [B, C] of uint8 images, and the new statistics."""
  settings = encoder.config.data
  images = augment.normalize(
    images, mean=tuple(settings.mean), std=tuple(settings.std)
  )
  features, updated = encoder.model.apply(
    {
      "params": {"backbone": params["backbone"]},
      "batch_stats": {"backbone": batch_stats},
    },
    images,
    train=train,
    method=encoder.model.features,
    mutable=["batch_stats"],
  )
  features = features.astype(jnp.float32)
  logits = features @ params["head"]["kernel"] + params["head"]["bias"]
  return logits, updated["batch_stats"]["backbone"]


def _train_step(
  encoder: LoadedEncoder,
  protocol: protocols.FineTune,
  state: State,
  batch: dict[str, jax.Array],
  decay: jax.Array,
) -> tuple[State, jax.Array]:
  """One step of SGD; returns the new state and the mean loss in nats."""

  def loss_of(params):
    logits, batch_stats = _logits(
      encoder, params, state.batch_stats, batch["image"], train=True
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


class _Classifier:
  """Ranks the classes of every test image by a state's running statistics."""

  def __init__(
    self,
    encoder: LoadedEncoder,
    test: Source,
    settings: protocols.Crops,
    batch_size: int,
  ):
    self._test = test
    self._settings = settings
    # Over this process's devices; the images are shared out over processes.
    self._mesh = sharding.make_mesh(jax.local_devices())
    devices = self._mesh.size * jax.process_count()
    self._batch_size = -(-batch_size // devices) * devices
    self._apply = jax.jit(
      lambda params, batch_stats, images: _logits(
        encoder, params, batch_stats, images, train=False
      )[0]
    )

  def __call__(self, state: State) -> np.ndarray:
    """Returns `metrics.class_ranks` of the test images, int32 [N]."""
    weights = sharding.local_view((state.params, state.batch_stats), self._mesh)
    found = extract(
      lambda images: self._apply(
        *weights, sharding.shard_batch(images, self._mesh)
      ),
      evaluation_batches.eval_batches(
        self._test,
        batch_size=self._batch_size,
        resize=self._settings.test_resize,
        crop=self._settings.size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
      name="test images",
    )
    return scores.class_ranks(found.features, found.labels)
