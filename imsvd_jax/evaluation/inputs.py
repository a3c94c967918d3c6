"""What an evaluator is given: arrays and functions, never a model."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.features import Embed, Features


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Whatever of a run the chosen protocols need; the rest stays None.

  Attributes:
    train: Features of the training images, from central crops.
    test: Features of the test images, from central crops.
    num_classes: Classes of the labels.
    embed: From uint8 [B, H, W, C] to features float32 [B, F].
    train_epoch: From an epoch to batches of random crops, as `sgd.TrainEpoch`.
    embeddings: float32 [N, 2, D]: two augmented views of N images, as the
      objective sees them (after the projector).
    view_groups: float32 [n, V, D]: many views of fewer images.
    codes: float32 [N, V, M, b]: the probabilities of M variables of b bins.
    report: Takes progress lines.
  """

  train: Features | None = None
  test: Features | None = None
  num_classes: int | None = None
  embed: Embed | None = None
  train_epoch: Callable[[int], Iterable[Mapping[str, np.ndarray]]] | None = None
  embeddings: np.ndarray | None = None
  view_groups: np.ndarray | None = None
  codes: np.ndarray | None = None
  report: Callable[[str], None] = console.print_line

  def need(self, *names: str) -> tuple:
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
