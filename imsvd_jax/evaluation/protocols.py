"""The named evaluation protocols: every hyper-parameter is data.

A protocol names its evaluator (`registry.EVALUATORS`) and holds every
hyper-parameter of it, each with its limit. `dataclasses.asdict` of a protocol
is what goes into `results.json`; `dataclasses.replace` makes a variant.
"""

import ast
import dataclasses
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import ml_collections

from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError, lookup, suggestion
from imsvd_jax.evaluation.scores import METRICS
from imsvd_jax.evaluation.transfer_sets import TRANSFER

# --- Limits -------------------------------------------------------------------


class Limit(NamedTuple):
  """What a hyper-parameter may be, in words and as a condition."""

  expected: str
  fits: Callable[[Any], bool]


def _one_of(*names: str) -> Limit:
  return Limit(f"one of {', '.join(names)}", lambda v: v in names)


def _list_of(
  expected: str, limit: Limit, *, may_be_empty: bool = False
) -> Limit:
  """The limit of a tuple whose every entry has a limit."""
  return Limit(
    expected,
    lambda values: (
      (bool(values) or may_be_empty) and all(limit.fits(v) for v in values)
    ),
  )


def _range(expected: str, low: float, high: float) -> Limit:
  return Limit(
    expected, lambda pair: len(pair) == 2 and low < pair[0] <= pair[1] <= high
  )


_COUNT = Limit("a whole number from 1", lambda v: v >= 1)
_SEED = Limit("from 0 to 2^32 - 1", lambda v: 0 <= v < 2**32)
_POSITIVE = Limit("a number above 0", lambda v: v > 0)
_NOT_NEGATIVE = Limit("0 or more", lambda v: v >= 0)
_PART = Limit("a number above 0 and below 1", lambda v: 0 < v < 1)
_FRACTION = Limit("a number above 0, at most 1", lambda v: 0 < v <= 1)
_PROBABILITY = Limit("from 0 to 1", lambda v: 0 <= v <= 1)
_MOMENTUM = Limit("from 0 and below 1", lambda v: 0 <= v < 1)
_COUNTS = _list_of("whole numbers from 1", _COUNT)
_ANY_COUNTS = _list_of("whole numbers from 1", _COUNT, may_be_empty=True)
_POSITIVES = _list_of("numbers above 0", _POSITIVE)
_AREAS = _range("two parts of the area, the smaller first", 0, 1)
_RATIOS = _range("two numbers above 0, the smaller first", 0, math.inf)


def _field(limit: Limit, default: Any = dataclasses.MISSING) -> Any:
  """Returns a field whose values have a limit; numbers must also be finite."""
  return dataclasses.field(default=default, metadata={"limit": limit})


class Settings:
  """Fields with limits: a value beyond its limit raises UserError."""

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):  # type: ignore[arg-type]
      value = getattr(self, field.name)
      if isinstance(value, bool | Settings):
        continue
      if "limit" not in field.metadata:
        raise TypeError(
          f"{type(self).__name__}.{field.name} has no limit; declare it with"
          " `_field`."
        )
      _check(field.name, value, field.metadata["limit"])


def _check(name: str, value: Any, limit: Limit) -> None:
  numbers = value if isinstance(value, tuple) else (value,)
  finite = all(math.isfinite(v) for v in numbers if isinstance(v, float | int))
  if not finite or not limit.fits(value):
    raise UserError(f"{name}={_shown(value)!r}; expected {limit.expected}.")


# --- The kinds of protocols ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Knn(Settings):
  """Weighted k-NN on L2-normalized features; all of train is the bank.

  With several pairs (k, T) the first is the one reported as final.
  """

  num_neighbors: tuple[int, ...] = _field(_COUNTS)
  temperatures: tuple[float, ...] = _field(_POSITIVES)
  evaluator: ClassVar[str] = "knn"


@dataclasses.dataclass(frozen=True)
class Lbfgs(Settings):
  """L2 logistic regression on frozen features, C chosen on part of train."""

  inverse_penalties: tuple[float, ...] = _field(
    _POSITIVES, (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
  )
  metric: str = _field(_one_of(*METRICS), "top1")
  held_out: float = _field(_PART, 0.2)
  max_iterations: int = _field(_COUNT, 1000)
  tolerance: float = _field(_POSITIVE, 1e-5)
  seed: int = _field(_SEED, 0)
  evaluator: ClassVar[str] = "lbfgs"


@dataclasses.dataclass(frozen=True)
class Transfer(Lbfgs):
  """`Lbfgs` on another data set than the run's own."""

  data_set: str = _field(_one_of(*TRANSFER), "cifar10")
  evaluator: ClassVar[str] = "transfer"


@dataclasses.dataclass(frozen=True)
class Probe(Settings):
  """Linear heads on cached features, one per learning rate, all at once.

  The learning rate is chosen on a held-out part of train, not on test.
  """

  learning_rates: tuple[float, ...] = _field(
    _POSITIVES, (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
  )
  weight_decay: float = _field(_NOT_NEGATIVE, 0.0)
  momentum: float = _field(_MOMENTUM, 0.9)
  batch_size: int = _field(_COUNT, 256)
  epochs: int = _field(_COUNT, 100)
  held_out: float = _field(_PART, 0.2)
  seed: int = _field(_SEED, 0)
  evaluator: ClassVar[str] = "probe"


@dataclasses.dataclass(frozen=True)
class Crops(Settings):
  """The images of a protocol: random crops to train, central ones to test."""

  size: int = _field(_COUNT)
  scale: tuple[float, float] = _field(_AREAS, (0.08, 1.0))  # of the area
  ratio: tuple[float, float] = _field(_RATIOS, (3 / 4, 4 / 3))
  flip_probability: float = _field(_PROBABILITY, 0.5)
  # The shorter side of a test image, before the central crop of `size`.
  test_resize: int = _field(_COUNT, 256)


@dataclasses.dataclass(frozen=True)
class Linear(Settings):
  """A linear head trained by SGD on crops of a frozen backbone."""

  crops: Crops
  # Per 256 images if scale_by_batch, otherwise as it is.
  learning_rate: float = _field(_POSITIVE)
  scale_by_batch: bool = False
  optimizer: str = _field(_one_of("sgd", "lars"), "sgd")
  trust_coefficient: float = _field(_POSITIVE, 1e-3)  # of LARS
  momentum: float = _field(_MOMENTUM, 0.9)
  weight_decay: float = _field(_NOT_NEGATIVE, 0.0)
  batch_size: int = _field(_COUNT, 256)
  epochs: int = _field(_COUNT, 100)
  # "cosine" goes to 0 in steps of an epoch.
  schedule: str = _field(_one_of("cosine", "steps"), "cosine")
  # Epochs at which "steps" divides by 10.
  milestones: tuple[int, ...] = _field(_ANY_COUNTS, ())
  # Of the head's initial weights; its bias starts at 0.
  initial_deviation: float = _field(_NOT_NEGATIVE, 0.01)
  seed: int = _field(_SEED, 0)
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
class FineTune(Settings):
  """Semi-supervised training of backbone and head.

  The part of train is `subsets.subset(labels, fraction, seed=seed)`. Learning
  rates are VICReg's published ones, for 256 images and unscaled, on a cosine in
  steps of an epoch.
  """

  crops: Crops
  fraction: float = _field(_FRACTION)
  backbone_learning_rate: float = _field(_NOT_NEGATIVE)
  head_learning_rate: float = _field(_POSITIVE)
  momentum: float = _field(_MOMENTUM, 0.9)
  weight_decay: float = _field(_NOT_NEGATIVE, 0.0)
  batch_size: int = _field(_COUNT, 256)
  epochs: int = _field(_COUNT, 20)
  # Of the head's initial weights; its bias starts at 0.
  initial_deviation: float = _field(_NOT_NEGATIVE, 0.01)
  seed: int = _field(_SEED, 0)
  evaluator: ClassVar[str] = "finetune"


@dataclasses.dataclass(frozen=True)
class Collapse(Settings):
  """Numbers without labels: how much of its space an embedding uses."""

  # RankMe's own choice of the number of images; more changes little.
  max_images: int = _field(_COUNT, 25_600)
  lidar_groups: int = _field(_COUNT, 1_000)  # images ...
  lidar_views: int = _field(_COUNT, 50)  # ... and augmented views of each
  lidar_delta: float = _field(_POSITIVE, 1e-4)
  # A bin with at least this share of the images is saturated.
  saturated_share: float = _field(_PART, 0.9)
  seed: int = _field(_SEED, 0)
  evaluator: ClassVar[str] = "collapse"


Protocol = Knn | Lbfgs | Transfer | Probe | Linear | FineTune | Collapse

# --- The named protocols ------------------------------------------------------

_IMAGENET = Crops(size=224)
_CIFAR = Crops(size=32, scale=(0.8, 1.0), test_resize=36)

PROTOCOLS: dict[str, Protocol] = {
  **dict.fromkeys(
    ("linear/imsvd", "linear/vicreg"),
    Linear(_IMAGENET, 0.02, weight_decay=1e-6),
  ),
  "linear/barlow": Linear(_IMAGENET, 0.3, weight_decay=1e-6),
  "linear/simsiam": Linear(
    _IMAGENET,
    0.1,
    scale_by_batch=True,
    optimizer="lars",
    batch_size=4096,
    epochs=90,
  ),
  "linear/cifar": Linear(_CIFAR, 30.0, schedule="steps", milestones=(60, 80)),
  "linear/lbfgs": Lbfgs(),
  "linear/probe": Probe(),
  # Measured during pretraining.
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
  **{
    f"transfer/{name}": Transfer(data_set=name, metric=chosen.metric)
    for name, chosen in TRANSFER.items()
  },
  "collapse": Collapse(),
  "collapse/online": Collapse(max_images=1024, lidar_groups=128, lidar_views=8),
}

# Names that stand for several protocols.
SUITES: dict[str, tuple[str, ...]] = {
  "transfer": tuple(f"transfer/{name}" for name in TRANSFER)
}

# The closing table of a training run.
FINAL = ("knn/final", "linear/final")


def online(settings: ml_collections.ConfigDict) -> dict[str, Protocol]:
  """Returns the protocols of one online evaluation of a recipe's `eval`."""
  chosen: dict[str, Protocol] = {"knn/online": _knn_of(settings)}
  if settings.linear_epochs:
    chosen["linear/online"] = dataclasses.replace(
      PROTOCOLS["linear/online"], epochs=settings.linear_epochs
    )
  count = settings.collapse_images
  if count:
    chosen["collapse/online"] = dataclasses.replace(
      PROTOCOLS["collapse/online"],
      max_images=count,
      lidar_groups=max(2, count // 8),
    )
  return chosen


def final(settings: ml_collections.ConfigDict) -> dict[str, Protocol]:
  """Returns the protocols of the closing table of a recipe's `eval`."""
  return dict(zip(FINAL, (_knn_of(settings), Lbfgs()), strict=True))


def _knn_of(settings: ml_collections.ConfigDict) -> Knn:
  return Knn((settings.num_neighbors,), (settings.temperature,))


def choose(
  names: Sequence[str],
  settings: Sequence[str] = (),
  *,
  seed: int | None = None,
  run_crops: Crops | None = None,
) -> dict[str, Protocol]:
  """Returns the named protocols with their settings.

  Args:
    names: Names in `PROTOCOLS` or `SUITES`.
    settings: Hyper-parameters to change; see `with_settings`.
    seed: Replaces the seed of every protocol that has one.
    run_crops: The crops that "crops=run" stands for; None if unknown.

  Raises:
    UserError: A name, key or value is unknown.
  """
  known = {name: (name,) for name in PROTOCOLS} | SUITES
  members = [m for name in names for m in lookup(known, name, "protocol")]
  chosen = {name: PROTOCOLS[name] for name in members}
  if not chosen:
    raise UserError("--protocol names none; --protocol=help lists them.")
  if seed is not None:
    chosen = {name: _seeded(p, seed) for name, p in chosen.items()}
  return with_settings(chosen, settings, run_crops=run_crops)


def _seeded(protocol: Any, seed: int) -> Any:
  has_seed = "seed" in _keys(protocol)
  return dataclasses.replace(protocol, seed=seed) if has_seed else protocol


def with_settings(
  chosen: Mapping[str, Protocol],
  settings: Sequence[str],
  *,
  run_crops: Crops | None = None,
) -> dict[str, Protocol]:
  """Returns the protocols with some hyper-parameters set to other values.

  Args:
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
        f"--set={setting}: {' and '.join(names)}"
        f" {'has' if len(names) == 1 else 'have'} no {key!r}."
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
  known = _keys(settings)
  if first not in known:
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
  elif _fits(value, type(like)):
    return type(like)(value)
  raise UserError(
    f"--set: {key}={text!r}; expected a value like {_shown(like)!r}."
  )


def _fits(value: Any, kind: type) -> bool:
  if isinstance(value, bool) or kind is bool:
    return isinstance(value, bool) and kind is bool
  return isinstance(value, kind) or (kind is float and isinstance(value, int))
