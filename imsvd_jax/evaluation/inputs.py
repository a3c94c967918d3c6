"""What an evaluator is, and what it is given: never a model."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.epochs import Keeper
from imsvd_jax.evaluation.features import Embed, Features

# Batches of this process: "image" uint8 [B, S, S, C] and perhaps "label" int32
# [B], "index" int32 [B] and "mask" bool [B], which is False for padding.
Batches = Iterable[Mapping[str, np.ndarray]]


class TrainEpoch(Protocol):
  """The batches of training epochs, asked for in turn."""

  def __call__(self, epoch: int, done: int = 0) -> Batches:
    """Returns the batches of an epoch, counted from 0, but the first `done`.

    The first epoch to be asked for may be any, and alone may have some done.
    """


# (params, batch_stats, images uint8 [B, S, S, C], train) -> (features float32
# [B, F], updated batch_stats)
Apply = Callable[[Any, Any, jax.Array, bool], tuple[jax.Array, Any]]


class Backbone(NamedTuple):
  """A backbone to be trained: a pure function and the initial weights."""

  apply: Apply  # Changes nothing.
  params: Any  # On the host.
  batch_stats: Any  # On the host.
  num_features: int  # F.


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What an evaluator declares that it needs; everything else stays None.

  Attributes:
    train: Features of the training images, from central crops.
    test: Features of the test images, from central crops.
    test_crops: The same of the central crops that the protocol's `crops` name.
    num_classes: Classes of the labels.
    embed: From uint8 [B, H, W, C] to features float32 [B, F].
    train_labels: () -> the labels of the training images, int32 [N] (see
      `Source.labels`); reads the records of a stream.
    test_labels: The same of the test images.
    train_epochs: From indices of training images, increasing, or None for all
      of them, to the epochs of random crops by the protocol's `crops`,
      `batch_size` and `seed`.
    test_batches: () -> central crops of the test images, by `crops`.
    backbone: The network to fine-tune.
    sample: Features of at most `max_images` training images.
    embeddings: float32 [N, 2, D]: two augmented views of each image of the
      sample, as the objective sees them (after the projector).
    view_groups: float32 [n, V, D]: `lidar_views` views of `lidar_groups` images
      of the sample.
    codes: float32 [N, V, M, b]: the probabilities of M variables of b bins.
    keeper: Keeps long training on disk; without it nothing is kept.
  """

  train: Features | None = None
  test: Features | None = None
  test_crops: Features | None = None
  num_classes: int | None = None
  embed: Embed | None = None
  train_labels: Callable[[], np.ndarray] | None = None
  test_labels: Callable[[], np.ndarray] | None = None
  train_epochs: Callable[[np.ndarray | None], TrainEpoch] | None = None
  test_batches: Callable[[], Batches] | None = None
  backbone: Backbone | None = None
  sample: Features | None = None
  embeddings: np.ndarray | None = None
  view_groups: np.ndarray | None = None
  codes: np.ndarray | None = None
  keeper: Keeper | None = None

  def need(self, *names: str) -> tuple[Any, ...]:
    """Returns the named fields.

    Raises:
      UserError: One of them was not given.
    """
    absent = [name for name in names if getattr(self, name) is None]
    if absent:
      raise UserError(
        f"This protocol needs {' and '.join(absent)}, which this data set or "
        "command did not provide: choose another protocol."
      )
    return tuple(getattr(self, name) for name in names)


class Evaluator(NamedTuple):
  """One way to measure an encoder, and what it needs.

  Attributes:
    run: From inputs and a protocol to named numbers. "final", "best", "low" and
      "high" are the headline (see `scores.headline`). An exception in place of
      a number says why there is none; the others count.
    needs: Fields of `Inputs`. What a run cannot provide stays None.
    labels: Whether predictions are compared with labels of a test split.
    joint: Whether all processes compute together: then a failure of one cannot
      be passed over.
    check: Called with the protocol and the number of training images before
      any image is read; raises UserError where they do not fit each other.
    own_data: From the protocol, the run's `config.data` and --data_dir to the
      `config.data` of the protocol and what to do if it cannot be read, beside
      what the error says; the protocol is skipped then. None if it is measured
      on the run's data.
  """

  run: Callable[[Inputs, Any], Iterator[tuple[str, float | Exception]]]
  needs: tuple[str, ...]
  labels: bool = True
  joint: bool = False
  check: Callable[[Any, int], None] | None = None
  own_data: Callable[[Any, ConfigDict, str], tuple[ConfigDict, str]] | None = (
    None
  )
