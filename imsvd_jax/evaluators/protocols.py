"""The named evaluation protocols: every hyper-parameter is data.

A protocol says which evaluator runs it (`evaluators.EVALUATORS`) and with what.
`dataclasses.asdict` of one is what goes into `results.json`, and
`dataclasses.replace` makes a variant.
"""

import dataclasses
import math
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Knn:
  """Weighted k-NN on L2-normalized features; all of train is the bank.

  With several pairs (k, T) the first is the one reported as final.
  """

  num_neighbors: tuple[int, ...]
  temperatures: tuple[float, ...]
  evaluator: ClassVar[str] = "knn"


@dataclasses.dataclass(frozen=True)
class Lbfgs:
  """L2 logistic regression on frozen features, C chosen on part of train."""

  inverse_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
  metric: str = "top1"
  held_out: float = 0.2
  max_iterations: int = 1000
  tolerance: float = 1e-5
  seed: int = 0
  evaluator: ClassVar[str] = "lbfgs"


@dataclasses.dataclass(frozen=True)
class Probe:
  """Linear heads on cached features, one per learning rate, all at once.

  The learning rate is chosen on a held-out part of train, not on test.
  """

  learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  weight_decay: float = 0.0
  momentum: float = 0.9
  batch_size: int = 256
  epochs: int = 100
  held_out: float = 0.2
  seed: int = 0
  evaluator: ClassVar[str] = "probe"


@dataclasses.dataclass(frozen=True)
class Crops:
  """The images of a protocol: random crops to train, central ones to test."""

  size: int
  scale: tuple[float, float] = (0.08, 1.0)  # random-resized-crop, of the area
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip_probability: float = 0.5
  test_resize: int = 256  # the shorter side, before the central crop of `size`


@dataclasses.dataclass(frozen=True)
class Linear:
  """A linear head trained by SGD on crops of a frozen backbone."""

  learning_rate: float  # per 256 images if scale_by_batch, else as it is
  crops: Crops
  scale_by_batch: bool = False
  optimizer: str = "sgd"  # or "lars"
  trust_coefficient: float = 1e-3  # of LARS
  momentum: float = 0.9
  weight_decay: float = 0.0
  batch_size: int = 256
  epochs: int = 100
  schedule: str = "cosine"  # per epoch to 0; or "steps"
  milestones: tuple[int, ...] = ()  # epochs at which "steps" divides by 10
  initial_deviation: float = 0.01  # head ~ N(0, .01), bias 0
  seed: int = 0
  evaluator: ClassVar[str] = "linear"

  def learning_rate_at(self, epoch: int) -> float:
    """Returns the learning rate of an epoch, counted from 0."""
    base = self.learning_rate
    if self.scale_by_batch:
      base *= self.batch_size / 256
    if self.schedule == "cosine":
      return base * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
    return base * 0.1 ** sum(epoch >= at for at in self.milestones)


@dataclasses.dataclass(frozen=True)
class FineTune:
  """Semi-supervised training of backbone and head: a training run.

  It is data only; the part of train is `subsets.subset(labels, fraction,
  seed=seed)`. Learning rates are VICReg's published ones, cosine per epoch.
  """

  fraction: float
  backbone_learning_rate: float
  head_learning_rate: float
  crops: Crops
  momentum: float = 0.9
  weight_decay: float = 0.0
  batch_size: int = 256
  epochs: int = 20
  seed: int = 0
  evaluator: ClassVar[str] = "finetune"


@dataclasses.dataclass(frozen=True)
class Collapse:
  """Numbers without labels: how much of its space an embedding uses."""

  max_images: int = 25_600  # RankMe's own choice; more changes little
  lidar_groups: int = 1_000  # images ...
  lidar_views: int = 50  # ... and augmented views of each
  lidar_delta: float = 1e-4
  saturated_share: float = 0.9  # of the images in one bin
  seed: int = 0
  evaluator: ClassVar[str] = "collapse"


Protocol = Knn | Lbfgs | Probe | Linear | FineTune | Collapse

_IMAGENET = Crops(size=224)
_CIFAR = Crops(size=32, scale=(0.8, 1.0), test_resize=36)

PROTOCOLS: dict[str, Protocol] = {
  "linear/imsvd": Linear(
    learning_rate=0.02, weight_decay=1e-6, crops=_IMAGENET
  ),
  "linear/vicreg": Linear(
    learning_rate=0.02, weight_decay=1e-6, crops=_IMAGENET
  ),
  "linear/barlow": Linear(
    learning_rate=0.3, weight_decay=1e-6, crops=_IMAGENET
  ),
  "linear/simsiam": Linear(
    learning_rate=0.1,
    scale_by_batch=True,
    optimizer="lars",
    batch_size=4096,
    epochs=90,
    crops=_IMAGENET,
  ),
  "linear/cifar": Linear(
    learning_rate=30.0, schedule="steps", milestones=(60, 80), crops=_CIFAR
  ),
  "linear/lbfgs": Lbfgs(),
  "linear/probe": Probe(),
  "knn/imsvd": Knn(num_neighbors=(20,), temperatures=(0.07,)),
  "knn/mveb": Knn(num_neighbors=(200,), temperatures=(0.1,)),
  # 20 stands first, so it is the one reported: DINO's paper recommends it.
  "knn/dino": Knn(num_neighbors=(20, 10, 100, 200), temperatures=(0.07,)),
  "finetune/1pct": FineTune(
    fraction=0.01,
    backbone_learning_rate=0.03,
    head_learning_rate=0.08,
    crops=_IMAGENET,
  ),
  "finetune/10pct": FineTune(
    fraction=0.1,
    backbone_learning_rate=0.01,
    head_learning_rate=0.1,
    crops=_IMAGENET,
  ),
  "collapse": Collapse(),
}
