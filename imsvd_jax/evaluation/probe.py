"""A linear probe on cached features: a grid of learning rates in one run.

The quick look that `linear/imsvd` and its kin are too slow for: no
augmentation, features standardized by train. The learning rate is chosen on a
held-out part of train; the heads are then trained again on all of it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import (
  input_checks,
  linear_heads,
  logistic,
  protocols,
  scores,
  subsets,
)
from imsvd_jax.evaluation.inputs import Inputs


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
  result = linear_probe(
    train.features,
    train.labels,
    test.features,
    test.labels,
    **dataclasses.asdict(protocol),
    report=inputs.report,
  )
  yield from scores.headline(result.accuracy, result.best_top1)
  yield "top1", result.accuracy.top1
  yield "top5", result.accuracy.top5
  yield "learning_rate", result.learning_rate
  for rate, top1 in result.test_top1.items():
    yield f"lr{rate:g}/top1", top1


def linear_probe(
  train_features: np.ndarray,
  train_labels: np.ndarray | None,
  test_features: np.ndarray,
  test_labels: np.ndarray | None,
  *,
  learning_rates: Sequence[float] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  batch_size: int = 256,
  epochs: int = 100,
  held_out: float = 0.2,
  seed: int = 0,
  report: Callable[[str], None] = console.print_line,
) -> ProbeResult:
  """Trains a linear head per learning rate; cosine per epoch to zero.

  Args:
    train_features: [N, F].
    train_labels: int [N].
    test_features: [Q, F].
    test_labels: int [Q].
    learning_rates: Values to choose from, as they are (not scaled).
    weight_decay: Of SGD.
    momentum: Of SGD.
    batch_size: Images per step; the last batch of an epoch may be smaller.
    epochs: Passes over train.
    held_out: Fraction of each class of train used to choose.
    seed: Chooses the held-out part and the order of images.
    report: Takes a progress line every few seconds.

  Raises:
    UserError: Features or labels are unusable.
  """
  train, test = input_checks.check_pair(train_features, test_features)
  train_labels = input_checks.check_labels(train_labels, len(train), "train")
  test_labels = input_checks.check_labels(test_labels, len(test), "test")
  num_classes = input_checks.check_classes(train_labels, test_labels)
  train, test = logistic.standardize(train, test)
  rates = [float(rate) for rate in learning_rates]
  if not rates or epochs < 1 or batch_size < 1:
    raise UserError(
      "A probe needs a learning rate, an epoch and a batch of one or more."
    )

  def fit(rows, features, labels, every_epoch):
    return _fit(
      train[rows],
      train_labels[rows],
      features,
      labels,
      rates=np.asarray(rates, np.float32),
      num_classes=num_classes,
      weight_decay=weight_decay,
      momentum=momentum,
      batch_size=batch_size,
      epochs=epochs,
      seed=seed,
      every_epoch=every_epoch,
      report=report,
    )

  held_out_top1: dict[float, float] = {}
  chosen = 0
  if len(rates) > 1:
    stay, away = subsets.split_classes(train_labels, held_out, seed=seed)
    ranks = fit(stay, train[away], train_labels[away], False)[-1]
    held_out_top1 = _top1(rates, ranks)
    chosen = int(np.argmax(list(held_out_top1.values())))
  history = fit(np.arange(len(train)), test, test_labels, True)
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
  rates: np.ndarray,
  num_classes: int,
  weight_decay: float,
  momentum: float,
  batch_size: int,
  epochs: int,
  seed: int,
  every_epoch: bool,
  report: Callable[[str], None],
) -> list[np.ndarray]:
  """Trains on `train` and ranks `features`: one [G, Q] per epoch, or the last.

  Every process does the same work on its own devices: cached features are few
  enough, and nothing has to be agreed upon.
  """
  mesh = linear_heads.make_local_mesh()
  state = linear_heads.create_heads(
    len(rates),
    train.shape[1],
    num_classes,
    seed=seed,
    deviation=0.01,
    mesh=mesh,
  )
  generator = np.random.default_rng(seed)
  meter = console.Progress("Linear probe", epochs * len(train), report=report)
  history = []
  for epoch in range(epochs):
    decay = 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    order = generator.permutation(len(train))
    for start in range(0, len(train), batch_size):
      rows = order[start : start + batch_size]
      weights = np.ones(len(rows), np.float32)
      batch = (train[rows], train_labels[rows], weights)
      batch = linear_heads.place_batch(mesh, *batch, size=batch_size)
      state, _ = linear_heads.train_step(
        state,
        *batch,
        rates * np.float32(decay),
        momentum=momentum,
        weight_decay=weight_decay,
      )
      meter.add(len(rows))
    if every_epoch or epoch == epochs - 1:
      history.append(linear_heads.rank_classes(state.heads, features, labels))
  return history
