"""The linear protocols of the papers: SGD on crops of a frozen backbone.

Every epoch embeds new random crops; only the head learns. The evaluator never
sees the backbone, so it cannot change it. Test features do not change either:
they are extracted once and scored after every epoch.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from imsvd_jax.base import console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import (
  epochs,
  input_checks,
  linear_heads,
  protocols,
  scores,
)
from imsvd_jax.evaluation.features import Embed, Features, embed_ahead
from imsvd_jax.evaluation.inputs import Evaluator, Inputs, TrainEpoch


class LinearResult(NamedTuple):
  """What a linear protocol reports."""

  history: list[np.ndarray]  # `scores.class_ranks` of test, after every epoch
  train_loss: list[float]  # mean cross entropy in nats, every epoch
  heads: linear_heads.Heads  # one head, on the host


NEEDS = ("embed", "train_epochs", "test_crops", "num_classes")


def run(
  inputs: Inputs, protocol: protocols.Linear
) -> Iterator[tuple[str, float]]:
  """Yields the accuracy on test, after the last and the best epoch."""
  embed, train_epochs, test, num_classes = inputs.need(*NEEDS)
  result = train_linear(
    embed,
    train_epochs(None),
    test,
    protocol,
    num_classes=num_classes,
    keeper=inputs.keeper,
  )
  yield from scores.epochs_headline(result.history, result.train_loss[-1])


def train_linear(
  embed: Embed,
  train_epoch: TrainEpoch,
  test: Features,
  protocol: protocols.Linear,
  *,
  num_classes: int,
  keeper: epochs.Keeper | None = None,
) -> LinearResult:
  """Trains one linear head as `protocol` says.

  With several processes each gives its share of every batch, all of the same
  size, and the gradient is that of the whole batch.

  Args:
    embed: From uint8 [B, S, S, C] to float32 [B, F]; frozen.
    train_epoch: Gives the batches of an epoch.
    test: Features of the test images, from `features.extract`.
    num_classes: C of the head.
    keeper: Keeps what is done on disk.

  Raises:
    UserError: Labels or features are unusable.
  """
  test_features = input_checks.check_features(test.features, "test")
  labels = input_checks.check_labels(test.labels, len(test_features), "test")
  if labels.max() >= num_classes:
    raise UserError(
      f"Test has class {labels.max()}; expected classes below {num_classes}: "
      "check that both splits number their classes alike."
    )
  mesh = devices.make_mesh()
  state = linear_heads.create_heads(
    1,
    test_features.shape[1],
    num_classes,
    seed=protocol.seed,
    deviation=protocol.initial_deviation,
    mesh=mesh,
  )

  def finish(
    state: linear_heads.HeadsState, epoch: int, loss: float
  ) -> np.ndarray:
    if not np.isfinite(loss):
      raise UserError(
        f"The linear head diverged in epoch {epoch} (loss {loss}): check the "
        "features, or use a smaller learning rate."
      )
    return linear_heads.rank_classes(state.heads, test_features, labels)[0]

  found = epochs.train(
    state,
    protocol.epochs,
    batches=lambda epoch, done: embed_ahead(
      embed, train_epoch(epoch, done) if done else train_epoch(epoch)
    ),
    step=functools.partial(_step, protocol, mesh),
    finish=finish,
    meter=console.Progress("Linear", None),
    keeper=keeper,
  )
  heads = jax.tree.map(np.asarray, found.state.heads)
  return LinearResult([*found.history], [*found.mean_losses], heads)


def _step(
  protocol: protocols.Linear,
  mesh: jax.sharding.Mesh,
  state: linear_heads.HeadsState,
  batch: tuple[Mapping[str, np.ndarray], np.ndarray],
  epoch: int,
) -> tuple[linear_heads.HeadsState, jax.Array, int]:
  """Returns the new state, the loss [1] and the number of images."""
  images, embedded = batch
  labels, weights = _labels_and_weights(images, state.heads.bias.shape[1])
  state, loss = linear_heads.train_step(
    state,
    *linear_heads.place_batch(mesh, embedded, labels, weights),
    np.full(1, protocol.learning_rate_at(epoch), np.float32),
    momentum=protocol.momentum,
    weight_decay=protocol.weight_decay,
    optimizer=protocol.optimizer,
    trust_coefficient=protocol.trust_coefficient,
  )
  return state, loss, len(labels)


def _labels_and_weights(
  batch: Mapping[str, np.ndarray], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
  weights = batch.get("mask", np.ones(len(batch["image"]), bool))
  weights = np.asarray(weights, np.float32)
  labels = np.where(weights > 0, batch.get("label", -1), 0).astype(np.int32)
  if labels.min() < 0 or labels.max() >= num_classes:
    raise UserError(
      f"A training batch has labels from {labels.min()} to {labels.max()}; "
      f"expected 0 to {num_classes - 1}: use a labelled training set."
    )
  return labels, weights


EVALUATOR = Evaluator(run, (*NEEDS, "keeper"), joint=True)
