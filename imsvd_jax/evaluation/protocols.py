"""The named evaluation protocols: every hyper-parameter is data.

A protocol says which evaluator runs it (`evaluators.EVALUATORS`) and with what.
`dataclasses.asdict` of one is what goes into `results.json`, and
`dataclasses.replace` makes a variant.
"""

import ast
import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError, lookup, suggestion


def _each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
  """A condition on every entry of a list that is not empty."""
  return lambda values: bool(values) and all(map(fits, values))


def _is_range(low: float, high: float) -> Callable[[Any], bool]:
  return lambda pair: len(pair) == 2 and low < pair[0] <= pair[1] <= high


_POSITIVE = ("a number above 0", lambda v: v > 0)
_NOT_NEGATIVE = ("0 or more", lambda v: v >= 0)
_PART = ("a number above 0 and below 1", lambda v: 0 < v < 1)

# What a hyper-parameter may be, in words and as a condition; a name means the
# same in every protocol. Numbers are finite besides.
_LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
  "num_neighbors": ("whole numbers from 1", _each(lambda v: v >= 1)),
  "temperatures": ("numbers above 0", _each(lambda v: v > 0)),
  "inverse_penalties": ("numbers above 0", _each(lambda v: v > 0)),
  "learning_rates": ("numbers above 0", _each(lambda v: v > 0)),
  "learning_rate": _POSITIVE,
  "backbone_learning_rate": _NOT_NEGATIVE,
  "head_learning_rate": _POSITIVE,
  "tolerance": _POSITIVE,
  "trust_coefficient": _POSITIVE,
  "lidar_delta": _POSITIVE,
  "weight_decay": _NOT_NEGATIVE,
  "initial_deviation": _NOT_NEGATIVE,
  "momentum": ("from 0 and below 1", lambda v: 0 <= v < 1),
  "held_out": _PART,
  "saturated_share": _PART,
  "fraction": ("a number above 0, at most 1", lambda v: 0 < v <= 1),
  "flip_probability": ("from 0 to 1", lambda v: 0 <= v <= 1),
  "scale": ("two parts of the area, the smaller first", _is_range(0, 1)),
  "ratio": ("two numbers above 0, the smaller first", _is_range(0, math.inf)),
  "seed": ("from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32),
  "optimizer": ("one of sgd, lars", lambda v: v in ("sgd", "lars")),
  "schedule": ("one of cosine, steps", lambda v: v in ("cosine", "steps")),
}


class _Checked:
  """Settings whose values are possible; others raise UserError."""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name = field.name
      if name not in _LIMITS:
        continue
      expected, fits = _LIMITS[name]
      value = getattr(self, name)
      numbers = value if isinstance(value, tuple) else (value,)
      finite = all(
        math.isfinite(v) for v in numbers if isinstance(v, float | int)
      )
      if not finite or not fits(value):
        raise UserError(f"{name}={_shown(value)!r}; expected {expected}.")


@dataclasses.dataclass(frozen=True)
class Knn(_Checked):
  """Weighted k-NN on L2-normalized features; all of train is the bank.

  With several pairs (k, T) the first is the one reported as final.
  """

  num_neighbors: tuple[int, ...]
  temperatures: tuple[float, ...]
  evaluator: ClassVar[str] = "knn"


@dataclasses.dataclass(frozen=True)
class Lbfgs(_Checked):
  """L2 logistic regression on frozen features, C chosen on part of train."""

  inverse_penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
  metric: str = "top1"
  held_out: float = 0.2
  max_iterations: int = 1000
  tolerance: float = 1e-5
  seed: int = 0
  evaluator: ClassVar[str] = "lbfgs"


@dataclasses.dataclass(frozen=True)
class Probe(_Checked):
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
class Crops(_Checked):
  """The images of a protocol: random crops to train, central ones to test."""

  size: int
  scale: tuple[float, float] = (0.08, 1.0)  # random-resized-crop, of the area
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  flip_probability: float = 0.5
  test_resize: int = 256  # the shorter side, before the central crop of `size`


@dataclasses.dataclass(frozen=True)
class Linear(_Checked):
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
class FineTune(_Checked):
  """Semi-supervised training of backbone and head: a training run.

  It is data only (`imsvd_jax.finetuning` runs it); the part of train is
  `subsets.subset(labels, fraction, seed=seed)`. Learning rates are VICReg's
  published ones, for 256 images and as they are, cosine per epoch.
  """

  fraction: float
  backbone_learning_rate: float
  head_learning_rate: float
  crops: Crops
  momentum: float = 0.9
  weight_decay: float = 0.0
  batch_size: int = 256
  epochs: int = 20
  initial_deviation: float = 0.01  # head ~ N(0, .01), bias 0
  seed: int = 0
  evaluator: ClassVar[str] = "finetune"


@dataclasses.dataclass(frozen=True)
class Collapse(_Checked):
  """Numbers without labels: how much of its space an embedding uses."""

  max_images: int = 25_600  # RankMe's own choice; more changes little
  lidar_groups: int = 1_000  # images ...
  lidar_views: int = 50  # ... and augmented views of each; an even number
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
  # Those of the online numbers during pretraining.
  "linear/online": Probe(learning_rates=(0.03, 0.1, 0.3, 1.0), epochs=10),
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
  "collapse/online": Collapse(max_images=1024, lidar_groups=128, lidar_views=8),
}


def with_settings(
  chosen: Mapping[str, Protocol],
  settings: Sequence[str],
  *,
  run_crops: Crops | None = None,
) -> dict[str, Protocol]:
  """Returns the protocols with some hyper-parameters set to other values.

  Args:
    chosen: Protocols by name.
    settings: Each "KEY=VALUE", for every protocol that has the key, or
      "PROTOCOL:KEY=VALUE", for one. "crops.size=32" sets one value of the
      crops; "crops=run" takes those that the run itself was trained with.
    run_crops: The crops of the run, where it says.

  Raises:
    UserError: No protocol has such a key, or the value is of another type.
  """
  result = dict(chosen)
  for setting in settings:
    path, equals, text = setting.partition("=")
    name, colon, key = path.rpartition(":")
    if not equals or not key:
      raise UserError(
        f"--set={setting} is not KEY=VALUE, such as --set=epochs=10."
      )
    names = [name] if colon else list(result)
    if colon:
      lookup(result, name, "protocol in --set")
    having = [n for n in names if key.partition(".")[0] in _keys(result[n])]
    if not having:
      known = sorted({k for n in names for k in _keys(result[n])})
      raise UserError(
        f"--set={setting}: {' and '.join(names)} have no {key!r}."
        f"{suggestion(key, known)} Known: {', '.join(known)}."
      )
    for n in having:
      result[n] = _with_value(result[n], key, text, run_crops)
  return result


def describe(protocols: Mapping[str, Protocol]) -> Iterator[str]:
  """Yields each protocol's name and every hyper-parameter, in lines of 80."""
  for name, protocol in protocols.items():
    settings = flatten(dataclasses.asdict(protocol))
    values = [f"{k}={_shown(v)}" for k, v in settings.items() if v != ()]
    yield textwrap.fill(
      " ".join([f"{name:15}", *values]), 80, subsequent_indent=" " * 16
    )


def _keys(settings: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(settings)]


def _shown(value: Any) -> str:
  if isinstance(value, tuple):
    return ",".join(map(_shown, value))
  return f"{value:g}" if isinstance(value, float) else str(value)


def _with_value(
  settings: Any, key: str, text: str, run_crops: Crops | None
) -> Any:
  """Returns a protocol, or its crops, with one value replaced."""
  first, _, rest = key.partition(".")
  if first not in _keys(settings):
    known = _keys(settings)
    raise UserError(
      f"--set: crops have no {first!r}.{suggestion(first, known)} Known:"
      f" {', '.join(known)}."
    )
  value = getattr(settings, first)
  if rest and dataclasses.is_dataclass(value):
    value = _with_value(value, rest, text, run_crops)
  elif dataclasses.is_dataclass(value) and text == "run":
    if run_crops is None:
      raise UserError(
        "--set=crops=run: these weights do not say with what crops they were"
        " trained; set crops.size and crops.test_resize instead."
      )
    value = run_crops
  elif dataclasses.is_dataclass(value):
    raise UserError(
      f"--set: {key}={text!r}; expected 'run', or one of"
      f" {', '.join(f'{key}.{k}' for k in _keys(value))}."
    )
  else:
    value = _parsed(key, text, value)
  return dataclasses.replace(settings, **{first: value})


def _parsed(key: str, text: str, like: Any) -> Any:
  """Returns `text` as a value of the type that `like` has."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(like, tuple) and not isinstance(value, tuple):
    value = tuple(value) if isinstance(value, list) else (value,)
  if isinstance(like, tuple):
    kind = type(like[0]) if like else int
    if all(_fits(v, kind) for v in value):
      return tuple(kind(v) for v in value)
  elif _fits(value, type(like)) and not _too_small(value, like):
    return type(like)(value)
  raise UserError(
    f"--set: {key}={text!r}; expected a value like {_shown(like)!r}."
  )


def _too_small(value: Any, like: Any) -> bool:
  """Numbers of epochs, images and pixels are at least 1; a seed may be 0."""
  return isinstance(like, int) and like > 0 and value < 1


def _fits(value: Any, kind: type) -> bool:
  if isinstance(value, bool) or kind is bool:
    return isinstance(value, bool) and kind is bool
  return isinstance(value, kind) or (kind is float and isinstance(value, int))
