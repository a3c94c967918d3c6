"""From a config to the objects of a training step; the check of a config."""

import fnmatch
import itertools
import math
from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from imsvd_jax.base import devices
from imsvd_jax.base.config import ADDED_KEYS, flatten
from imsvd_jax.base.errors import UserError, lookup, pair
from imsvd_jax.models import (
  OPTIONS,
  Encoder,
  Projector,
  check_size,
  make_backbone,
)
from imsvd_jax.models.resnet import MAX_POOL_GRID
from imsvd_jax.objectives import OBJECTIVES, Objective
from imsvd_jax.training import micro_batches, verdict
from imsvd_jax.training.augment import Augmentation
from imsvd_jax.training.optim import SCHEDULES, Plan, make_optimizer
from imsvd_jax.training.sharding import MODES, REPLICATED

NUM_GLOBAL = 2  # Global views per image; local crops come after them.
_PLACEMENTS = ("auto", "device", "host")
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Progress(NamedTuple):
  """How far a run has come; each checkpoint records it.

  Attributes:
    images: Images seen.
    learning_rate: Of the last update.
    changed_at: Images seen when epochs or schedule last changed; 0: never.
    changed_from: Learning rate at that change.
  """

  images: int = 0
  learning_rate: float = 0.0
  changed_at: int = 0
  changed_from: float = 0.0


BEGINNING = Progress()


class Experiment(NamedTuple):
  """What a config means: the objects that the step is made of.

  Attributes:
    config: The recipe, for logs and evaluation. The step does not read it.
    model: The encoder with the objective's head.
    objective: The objective.
    hyperparameters: Keyword arguments of its loss.
    optimizer: The optax transformation.
    schedule: Update -> learning rate.
    augmentation: Recipes of the views, on the device.
    view_sizes: Side of each view, in pixels.
    interpolation: How views are cut out of images that are decoded.
    image_shape: (height, width, channels) of a global view.
    embedding_size: Dimensions of an embedding, without those of its noise.
    target_momentum: Of the EMA target network, at the first step.
    state_sharding: What of the state is split; see `training.sharding`.
    accumulate_steps: Micro-batches of a step.
    seed: Seed of weights, augmentation and noise.
    total_steps: Length of the run, in batches of this size.
    steps_per_epoch: May be fractional.
    offset: What to add to a step, which counts updates, for its position in
      the run, in batches of this size: not 0 after a change of the batch size.
    resolutions: Batches of the run after which global views have another size,
      and that size; the first after 0.
  """

  config: ConfigDict
  model: Encoder
  objective: Objective
  hyperparameters: dict[str, Any]
  optimizer: optax.GradientTransformation
  schedule: optax.Schedule
  augmentation: Augmentation
  view_sizes: tuple[int, ...]
  interpolation: str
  image_shape: tuple[int, int, int]
  embedding_size: int
  target_momentum: float
  state_sharding: str
  accumulate_steps: int
  seed: int
  total_steps: int
  steps_per_epoch: float
  offset: int
  resolutions: tuple[tuple[int, int], ...]

  @property
  def last_step(self) -> int:
    """The step at which the run ends."""
    return self.total_steps - self.offset

  @property
  def evaluation_steps(self) -> int:
    """Steps between two online evaluations; 0: none."""
    epochs = self.config.eval.every_epochs
    return epochs_to_steps(epochs, self.steps_per_epoch) if epochs else 0

  def epoch(self, step: int) -> float:
    """Returns the epochs that a run has seen after a step."""
    return (step + self.offset) / self.steps_per_epoch

  def view_size(self, step: int) -> int:
    """Returns the side of the global views of a step, in pixels."""
    done = step - 1 + self.offset
    return [size for start, size in self.resolutions if start <= done][-1]

  def phases(self, steps: range) -> list[tuple[range, int]]:
    """Divides steps by the size of their global views: (steps, size)."""
    starts = [1 - self.offset + done for done, _ in self.resolutions]
    ends = [*starts[1:], steps.stop]
    parts = [
      range(max(start, steps.start), min(end, steps.stop))
      for start, end in zip(starts, ends, strict=True)
    ]
    sizes = [size for _, size in self.resolutions]
    return [
      (part, size) for part, size in zip(parts, sizes, strict=True) if part
    ]

  def at_size(self, size: int) -> "Experiment":
    """Returns the experiment with global views of one size."""
    local = self.view_sizes[NUM_GLOBAL:]
    return self._replace(view_sizes=(size,) * NUM_GLOBAL + local)

  def progress(
    self, step: int, learning_rate: Any, start: Progress
  ) -> Progress:
    """Returns how far the run has come, given where it was continued."""
    images = (step + self.offset) * self.config.batch_size
    return start._replace(images=images, learning_rate=float(learning_rate))


def build(
  config: ConfigDict,
  num_examples: int,
  *,
  step: int = 0,
  progress: Progress = BEGINNING,
) -> Experiment:
  """Checks a config and makes its model, objective and optimizer.

  Args:
    config: A recipe (see configs/common.py).
    num_examples: Images in the train split, which defines the epoch.
    step: Updates of the run that is continued.
    progress: How far it has come.

  Raises:
    UserError: See `check`; or the warm-up is longer than the run.
  """
  check(config)
  objective = OBJECTIVES[config.objective.name]
  steps_per_epoch = num_examples / config.batch_size
  total_steps = epochs_to_steps(config.epochs, steps_per_epoch)
  offset = round(progress.images / config.batch_size) - step
  optimizer, schedule = make_optimizer(
    config.optimizer,
    batch_size=config.batch_size,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
    plan=Plan(
      config.optimizer.schedule,
      offset,
      round(progress.changed_at / config.batch_size),
      progress.changed_from,
    ),
  )
  size = config.views.view1.size
  return Experiment(
    config=config,
    model=make_model(config.model, objective),
    objective=objective,
    hyperparameters=hyperparameters(config),
    optimizer=optimizer,
    schedule=schedule,
    augmentation=augmentation(config),
    view_sizes=view_sizes(config),
    interpolation=config.data.get("train_interpolation", "")
    or config.data.interpolation,
    image_shape=(size, size, config.data.channels),
    embedding_size=config.model.projector[-1],
    target_momentum=config.target_momentum,
    state_sharding=state_sharding(config),
    accumulate_steps=accumulate_steps(config),
    seed=config.seed,
    total_steps=total_steps,
    steps_per_epoch=steps_per_epoch,
    offset=offset,
    resolutions=tuple(
      (round(epoch * steps_per_epoch), size)
      for epoch, size in resolution_schedule(config)
    ),
  )


def ends(config: ConfigDict, state: str) -> bool:
  """Returns whether a verdict ends the run; see config.stop."""
  return state != "" and state == config.get("stop", {}).get("when", "")


def epochs_to_steps(epochs: float, steps_per_epoch: float) -> int:
  """Returns epochs in steps, rounded, at least one."""
  return max(1, round(epochs * steps_per_epoch))


def hyperparameters(config: ConfigDict) -> dict[str, Any]:
  """Returns the keyword arguments of the config's objective."""
  return dict(config.objective[config.objective.name])


def augmentation(config: ConfigDict) -> Augmentation:
  """Returns the photometric recipes of the config's views."""
  views = config.views
  return Augmentation(
    groups=((views.view1, views.view2), (views.local,) * views.num_local),
    mean=config.data.mean,
    std=config.data.std,
  )


def view_sizes(config: ConfigDict) -> tuple[int, ...]:
  """Returns the side of each view: of two global ones, then the local ones."""
  views = config.views
  local = [views.local.size] * views.num_local
  return (views.view1.size, views.view2.size, *local)


def resolution_schedule(config: ConfigDict) -> list[tuple[float, int]]:
  """Returns the epochs from which global views have a size, and that size."""
  added = ADDED_KEYS["views.resolution_schedule"]
  given = config.views.get("resolution_schedule", added)
  return [(epoch, size) for epoch, size in given] or [
    (0, config.views.view1.size)
  ]


def at_size(config: ConfigDict, size: int) -> ConfigDict:
  """Returns a copy of a config whose global views have one size."""
  config = config.copy_and_resolve_references()
  config.views.view1.size = config.views.view2.size = size
  if "resolution_schedule" in config.views:
    config.views.resolution_schedule = ()
  return config


def make_model(settings: ConfigDict, objective: Objective) -> Encoder:
  """Returns the encoder of `config.model` with the objective's head."""
  dtype = lookup(_DTYPES, settings.dtype, "dtype")
  *hidden, out = settings.projector
  return Encoder(
    backbone=make_backbone(
      settings.backbone,
      changed_options(settings),
      width_multiplier=settings.width_multiplier,
      stem=settings.stem,
      dtype=dtype,
      remat=settings.remat,
      zero_init_residual=settings.zero_init_residual,
      kernel_init=settings.get("init", ADDED_KEYS["model.init"]),
    ),
    projector=Projector(
      widths=(*hidden, out * objective.embedding_factor),
      hidden_bias=settings.projector_bias,
      last_bias=settings.get(
        "projector_last_bias", ADDED_KEYS["model.projector_last_bias"]
      ),
      dtype=dtype,
    ),
  )


def changed_options(settings: ConfigDict) -> dict[str, Any]:
  """Returns the options in `config.model` that only some backbones have."""
  defaults = {name: ADDED_KEYS[f"model.{name}"] for name in OPTIONS}
  given = {name: settings.get(name, old) for name, old in defaults.items()}
  return {name: v for name, v in given.items() if v != defaults[name]}


def accumulate_steps(config: ConfigDict) -> int:
  """Returns accumulate_steps; its default for a recipe that lacks it."""
  return config.get("accumulate_steps", ADDED_KEYS["accumulate_steps"])


def placement(config: ConfigDict) -> str:
  """Returns data.placement; its default for a recipe that lacks it."""
  return config.data.get("placement", "auto")


def state_sharding(config: ConfigDict) -> str:
  """Returns sharding.state; its default for a recipe that lacks it."""
  return config.get("sharding", {}).get("state", REPLICATED)


def abstract_batch(
  config: ConfigDict, sharding: jax.sharding.Sharding | None = None
) -> dict[str, Any]:
  """Returns the shapes and types of a global batch, for compiling ahead."""
  views, size = config.views, config.batch_size

  def images(count: int, side: int) -> jax.ShapeDtypeStruct:
    shape = (size, count, side, side, config.data.channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=sharding)

  groups = [images(NUM_GLOBAL, views.view1.size)]
  if views.num_local:
    groups.append(images(views.num_local, views.local.size))
  numbers = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=sharding)
  return {"views": tuple(groups), "index": numbers, "epoch": numbers}


def random_batch(config: ConfigDict) -> dict[str, Any]:
  """Returns a global batch of random pixels, for measurements of speed."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.integers(0, 256, x.shape, x.dtype), abstract_batch(config)
  )


# -----------------------------------------------------------------------------
# The check of a config.
# -----------------------------------------------------------------------------

_POSITIVE = math.ulp(0.0)  # The smallest number above zero.
_ANY = math.inf
MAX_HOLDOUT = 0.9  # Of a class.
_MOST_SIZES = 4  # Of a resolution schedule: each one is a compiled program.
# The smallest and the largest value of each number of a recipe. An objective
# checks its own hyper-parameters.
_LIMITS = {
  "batch_size": (2, _ANY),  # Objectives are statistics over the batch.
  "accumulate_steps": (1, _ANY),
  "epochs": (_POSITIVE, 1e9),
  "target_momentum": (0, 1),
  "model.width_multiplier": (_POSITIVE, _ANY),
  "model.patch_size": (0, _ANY),
  "model.pool_grid": (1, MAX_POOL_GRID),
  "model.registers": (0, _ANY),
  "model.layer_scale": (0, _ANY),
  "model.drop_path": (0, 1 - math.ulp(0.5)),  # Less than all.
  "optimizer.base_learning_rate": (0, _ANY),
  "optimizer.warmup_epochs": (0, _ANY),
  "optimizer.final_fraction": (0, 1),
  "optimizer.momentum": (0, 1),
  "optimizer.weight_decay": (0, _ANY),
  "optimizer.trust_coefficient": (_POSITIVE, _ANY),
  "optimizer.b[12]": (0, 1),
  "optimizer.eps": (0, _ANY),
  "data.num_examples": (0, _ANY),
  "data.image_size": (1, _ANY),
  "data.channels": (1, _ANY),
  "data.resize": (1, _ANY),
  "data.crop": (1, _ANY),
  "data.max_pixels": (1, 2**31),
  "data.background": (-1, 255),
  "data.holdout": (0, MAX_HOLDOUT),
  "data.holdout_seed": (0, _ANY),
  "views.num_local": (0, _ANY),
  "views.*.size": (1, _ANY),
  "views.*_prob": (0, 1),
  "views.*.brightness": (0, _ANY),
  "views.*.contrast": (0, _ANY),
  "views.*.saturation": (0, _ANY),
  "views.*.hue": (0, 0.5),  # Of the color circle, in both directions.
  "views.*.solarize_threshold": (0, 256),
  "log.every_steps": (1, _ANY),
  "log.progress_seconds": (0, _ANY),
  "checkpoint.every_steps": (0, _ANY),
  "checkpoint.every_minutes": (0, _ANY),
  "checkpoint.keep_last": (1, _ANY),
  "checkpoint.keep_every": (0, _ANY),
  "checkpoint.keep_best": (0, _ANY),
  "checkpoint.deadline_minutes": (_POSITIVE, 1e6),
  "not_finite.max_in_a_row": (0, _ANY),
  "eval.every_epochs": (0, _ANY),
  "eval.batch_size": (1, _ANY),
  "eval.num_neighbors": (1, _ANY),
  "eval.temperature": (_POSITIVE, _ANY),
  "eval.bank_examples": (0, _ANY),
  "eval.linear_epochs": (0, _ANY),
  "eval.collapse_images": (0, _ANY),
}
# The same, of ranges: two numbers, smallest first.
_RANGES = {
  "views.*.crop_scale": (_POSITIVE, 1),
  "views.*.crop_ratio": (_POSITIVE, _ANY),
  "views.*.blur_sigma": (0, _ANY),
}


def check(config: ConfigDict, num_devices: int = 1) -> None:
  """Checks a config, before anything is compiled or written.

  Args:
    config: A recipe (see configs/common.py).
    num_devices: Devices that share a batch.

  Raises:
    UserError: A name is unknown, a number is out of its limits, or values
      contradict each other.
  """
  _check_numbers(config)
  if config.not_finite.policy not in ("skip", "stop"):
    raise UserError(
      f"not_finite.policy={config.not_finite.policy!r}; expected 'skip' or"
      " 'stop'."
    )
  if config.optimizer.schedule not in SCHEDULES:
    raise UserError(
      f"optimizer.schedule={config.optimizer.schedule!r}; expected one of"
      f" {', '.join(SCHEDULES)}."
    )
  _check_choice(config, "checkpoint", "keep_best_by", verdict.SCORES)
  _check_choice(config, "stop", "when", ("", *verdict.STATES))
  _check_best(config)
  if placement(config) not in _PLACEMENTS:
    raise UserError(
      f"data.placement={placement(config)!r}; expected one of"
      f" {', '.join(_PLACEMENTS)}."
    )
  if state_sharding(config) not in MODES:
    raise UserError(
      f"sharding.state={state_sharding(config)!r}; expected one of"
      f" {', '.join(MODES)}."
    )
  check_batch(config, num_devices)
  devices.check_batch_size(
    config.eval.batch_size, num_devices, "eval.batch_size"
  )
  _check_views(config)
  _check_resolutions(config)
  _check_widths(config.model.projector)
  objective = lookup(OBJECTIVES, config.objective.name, "objective")
  if objective.discrete:
    _check_bins(config)
  _check_sizes(config, make_model(config.model, objective))
  jax.eval_shape(lambda: _trace_objective(config, objective))


def check_batch(config: ConfigDict, num_devices: int) -> None:
  """Raises UserError unless a batch divides over devices and micro-batches."""
  devices.check_batch_size(config.batch_size, num_devices, "batch_size")
  micro_batches.check(config.batch_size, accumulate_steps(config), num_devices)


def _check_numbers(config: ConfigDict) -> None:
  for key, value in flatten(config).items():
    for pattern, limits in _LIMITS.items():
      if fnmatch.fnmatchcase(key, pattern) and not _within(limits, value):
        raise UserError(f"{key}={value!r}; expected {_described(limits)}.")
    for pattern, limits in _RANGES.items():
      if fnmatch.fnmatchcase(key, pattern):
        _check_range(key, value, limits)


def _check_choice(
  config: ConfigDict, section: str, key: str, known: Collection[str]
) -> None:
  """Checks a name; a recipe of an earlier version may lack it."""
  value = config.get(section, {}).get(key, next(iter(known)))
  if value not in known:
    raise UserError(
      f"{section}.{key}={value!r}; expected one of"
      f" {', '.join(map(repr, known))}."
    )


def _check_best(config: ConfigDict) -> None:
  """Checks that the score of `checkpoint.keep_best` is measured."""
  if not config.checkpoint.get("keep_best", 0):
    return
  by = config.checkpoint.get("keep_best_by", verdict.LABEL_FREE)
  needed = ["every_epochs"]
  needed += {
    verdict.LABEL_FREE: ["collapse_images"],
    "online/linear": ["linear_epochs"],
  }.get(by, [])
  for key in needed:
    if not config.eval[key]:
      raise UserError(
        f"checkpoint.keep_best needs the score {by!r}, and eval.{key} is 0: it"
        f" is not measured. Set eval.{key}, or checkpoint.keep_best=0."
      )


def _within(limits: tuple[float, float], value: Any) -> bool:
  return isinstance(value, int | float) and limits[0] <= value <= limits[1]


def _described(limits: tuple[float, float]) -> str:
  least, most = limits
  if least == _POSITIVE:
    return "more than 0" + (f", at most {most:g}" if most < _ANY else "")
  return f"{least:g} or more" if most == _ANY else f"{least:g} to {most:g}"


def _check_range(key: str, value: Any, limits: tuple[float, float]) -> None:
  low, high = pair(key, value)
  if not (_within(limits, low) and _within(limits, high) and low <= high):
    raise UserError(
      f"{key} is {value!r}; expected two numbers, smallest first, each"
      f" {_described(limits)}."
    )


def _check_views(config: ConfigDict) -> None:
  first, second = config.views.view1.size, config.views.view2.size
  if first != second:
    raise UserError(
      f"views.view1.size={first} differs from views.view2.size={second}; the"
      " two global views need one size."
    )
  if config.data.crop > config.data.resize:
    raise UserError(
      f"data.crop is {config.data.crop}, larger than data.resize,"
      f" {config.data.resize}; expected crop <= resize."
    )
  for key in ("mean", "std"):
    count = len(config.data[key])
    if count not in (1, config.data.channels):
      raise UserError(
        f"data.{key} has {count} values, but data.channels is"
        f" {config.data.channels}; expected one value per channel, or a single"
        " one for all."
      )
  for key, least in (("mean", -_ANY), ("std", 0)):
    if not all(least < value < _ANY for value in config.data[key]):
      more = " more than 0" if key == "std" else ""
      raise UserError(
        f"data.{key}={config.data[key]!r}; expected finite numbers{more}."
      )


def _check_resolutions(config: ConfigDict) -> None:
  """Checks views.resolution_schedule."""
  given = config.views.get("resolution_schedule", ())
  expected = (
    f"expected up to {_MOST_SIZES} pairs of (epoch, size) such as"
    " ((0, 128), (50, 224)): both grow, the first epoch is 0, the last is less"
    f" than epochs={config.epochs:g}, and the last size is"
    f" views.view1.size={config.views.view1.size}; () for one size."
  )
  message = f"views.resolution_schedule is {given!r}; {expected}"
  try:
    epochs, sizes = zip(*given, strict=True) if given else ((), ())
  except (TypeError, ValueError):
    raise UserError(message) from None
  grows = lambda numbers: all(a < b for a, b in itertools.pairwise(numbers))
  if given and not (
    len(sizes) <= _MOST_SIZES
    and all(_within((0, _ANY), epoch) for epoch in epochs)
    and all(isinstance(size, int) and size > 0 for size in sizes)
    and grows(epochs)
    and grows(sizes)
    and epochs[0] == 0
    and epochs[-1] < config.epochs
    and sizes[-1] == config.views.view1.size
  ):
    raise UserError(message)


def _check_sizes(config: ConfigDict, model: Encoder) -> None:
  views = config.views
  local = {views.local.size} if views.num_local else set()
  scheduled = {size for _, size in resolution_schedule(config)}
  for size in {config.data.crop} | scheduled | local:
    check_size(model.backbone, size)


def _check_widths(widths: Any) -> None:
  is_list = isinstance(widths, list | tuple) and len(widths) > 0
  if not is_list or not all(isinstance(w, int) and w > 0 for w in widths):
    raise UserError(
      f"model.projector is {widths!r}; expected one or more widths, such as"
      ' "(2048,1024)".'
    )


def _check_bins(config: ConfigDict) -> None:
  name, width = config.objective.name, config.model.projector[-1]
  num_bins = config.objective[name].num_bins
  if num_bins < 2 or width % num_bins:
    raise UserError(
      f"The last width of model.projector ({width}) is not a multiple of"
      f" objective.{name}.num_bins ({num_bins}); an embedding is M variables"
      " of num_bins entries each."
    )


def _trace_objective(config: ConfigDict, objective: Objective) -> None:
  """Traces the objective, which checks its own hyper-parameters."""
  num_views = NUM_GLOBAL + config.views.num_local
  width = config.model.projector[-1] * objective.embedding_factor
  z = jnp.zeros((config.batch_size, width))
  objective.loss(
    [z] * num_views,
    num_global=NUM_GLOBAL,
    targets=[z] * NUM_GLOBAL if objective.uses_target else None,
    key=jax.random.key(0),
    **hyperparameters(config),
  )
