"""A linear probe on cached features: a grid of learning rates in one run.

A quick look, where `linear/imsvd` and its like are too slow: no augmentation,
features standardized by train. The learning rate is chosen on a
held-out part of train; the heads are then trained again on all of it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from imsvd_jax.base import console, devices
from imsvd_jax.evaluation import (
  epochs,
  input_checks,
  linear_heads,
  logistic,
  protocols,
  scores,
  subsets,
)
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.inputs import Evaluator, Inputs


class ProbeResult(NamedTuple):
  """The accuracy on test, and how the learning rate was chosen."""

  accuracy: scores.Accuracy  # after the last epoch, at `learning_rate`
  best_top1: float  # best epoch on test at `learning_rate`: optimistic
  learning_rate: float  # chosen on the held-out part of train
  held_out_top1: dict[float, float]  # per learning rate
  test_top1: dict[float, float]  # per learning rate, after the last epoch


def run(
  inputs: Inputs, protocol: protocols.Probe
) -> Iterator[tuple[str, float]]:
  """Yields the accuracy on test, the learning rate and its alternatives."""
  train, test = inputs.need("train", "test")
  result = linear_probe(train, test, protocol, inputs.keeper)
  yield from scores.headline(result.accuracy, result.best_top1)
  yield "learning_rate", result.learning_rate
  for rate, top1 in result.test_top1.items():
    yield f"lr{rate:g}/top1", top1


def linear_probe(
  train: Features,
  test: Features,
  protocol: protocols.Probe,
  keeper: epochs.Keeper | None = None,
) -> ProbeResult:
  """Trains a linear head per learning rate; cosine per epoch to zero.

  The protocol has the learning rates to choose from (not scaled), the share of
  each class of train that chooses, and the settings of SGD. The last batch of
  an epoch may be smaller than the others. The keeper keeps what is done.

  Raises:
    UserError: Features or labels are unusable.
  """
  x_train, y_train, x_test, y_test, num_classes = input_checks.check_splits(
    train, test
  )
  x_train, x_test = logistic.standardize(x_train, x_test)
  rates = [float(rate) for rate in protocol.learning_rates]
  fit = functools.partial(_fit, protocol=protocol, num_classes=num_classes)
  held_out_top1: dict[float, float] = {}
  chosen = 0
  if len(rates) > 1:
    stay, away = subsets.split_classes(
      y_train, protocol.held_out, seed=protocol.seed
    )
    (ranks,) = fit(
      x_train[stay],
      y_train[stay],
      x_train[away],
      y_train[away],
      every_epoch=False,
      keeper=keeper and keeper.part("held out"),
    )
    held_out_top1 = _top1(rates, ranks)
    chosen = int(np.argmax(list(held_out_top1.values())))
  history = fit(
    x_train, y_train, x_test, y_test, every_epoch=True, keeper=keeper
  )
  return ProbeResult(
    accuracy=scores.accuracy(history[-1][chosen]),
    best_top1=max(float((r[chosen] == 0).mean()) for r in history),
    learning_rate=rates[chosen],
    held_out_top1=held_out_top1,
    test_top1=_top1(rates, history[-1]),
  )


def _top1(rates: Sequence[float], ranks: np.ndarray) -> dict[float, float]:
  top1 = (ranks == 0).mean(axis=1).tolist()
  return dict(zip(rates, top1, strict=True))


def _fit(
  train: np.ndarray,
  train_labels: np.ndarray,
  features: np.ndarray,
  labels: np.ndarray,
  *,
  protocol: protocols.Probe,
  num_classes: int,
  every_epoch: bool,
  keeper: epochs.Keeper | None,
) -> list[np.ndarray]:
  """Trains on `train` and ranks `features`: one [G, Q] per epoch, or the last.

  Every process does the same work on its own devices: cached features are few
  enough, and processes need not agree on anything.
  """
  mesh = devices.make_mesh(jax.local_devices())
  rates = np.asarray(protocol.learning_rates, np.float32)
  batch_size = protocol.batch_size
  state = linear_heads.create_heads(
    len(rates),
    train.shape[1],
    num_classes,
    seed=protocol.seed,
    deviation=0.01,
    mesh=mesh,
  )

  def step(
    state: linear_heads.HeadsState, rows: np.ndarray, epoch: int
  ) -> tuple[linear_heads.HeadsState, jax.Array, int]:
    decay = 0.5 * (1 + math.cos(math.pi * epoch / protocol.epochs))
    weights: np.ndarray = np.ones(len(rows), np.float32)
    batch = (train[rows], train_labels[rows], weights)
    batch = linear_heads.place_batch(mesh, *batch, size=batch_size)
    state, losses = linear_heads.train_step(
      state,
      *batch,
      rates * np.float32(decay),
      momentum=protocol.momentum,
      weight_decay=protocol.weight_decay,
    )
    return state, losses, len(rows)

  def finish(
    state: linear_heads.HeadsState, epoch: int, _: float
  ) -> np.ndarray | None:
    if not every_epoch and epoch < protocol.epochs - 1:
      return None
    return linear_heads.rank_classes(state.heads, features, labels)

  found = epochs.train(
    state,
    protocol.epochs,
    batches=_shuffled(len(train), batch_size, protocol.seed),
    step=step,
    finish=finish,
    meter=console.Progress("Linear probe", protocol.epochs * len(train)),
    keeper=keeper,
  )
  return [*found.history]


def _shuffled(
  count: int, batch_size: int, seed: int
) -> Callable[[int, int], Iterator[np.ndarray]]:
  """Returns `batches` of `epochs.train`: rows, in another order each epoch."""
  generator = np.random.default_rng(seed)
  num_drawn = 0  # Orders; the one of each epoch depends on those before.

  def batches(epoch: int, done: int) -> Iterator[np.ndarray]:
    nonlocal num_drawn
    while num_drawn <= epoch:
      order = generator.permutation(count)
      num_drawn += 1
    for start in range(done * batch_size, count, batch_size):
      yield order[start : start + batch_size]

  return batches


EVALUATOR = Evaluator(run, needs=("train", "test", "keeper"))
