"""Files of weights, and the recipe that each one was trained with."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.models import Encoder, Projector
from imsvd_jax.models.vit import grid
from imsvd_jax.objectives import OBJECTIVES

logger = logging.getLogger(__name__)

# Data settings of files that name none: torchvision's ResNets and the official
# models of IMSVD, VICReg and Barlow Twins.
IMAGENET_DATA = {
  "channels": 3,
  "resize": 256,
  "crop": 224,
  "interpolation": "bicubic",
  "mean": (0.485, 0.456, 0.406),
  "std": (0.229, 0.224, 0.225),
}


def _is_size(value: Any) -> bool:
  return isinstance(value, int) and 0 < value <= _MAX_SIZE


def _are_numbers(value: Any) -> bool:
  return (
    isinstance(value, list | tuple)
    and len(value) > 0
    and all(isinstance(number, int | float) for number in value)
  )


_LEAST_SIZE = 96  # Nobody trains for ImageNet with smaller images.
_MAX_SIZE = 2**14  # Pixels of a side; also channels.
# The keys of a recipe that functions of images need, and what each may be: the
# file may come from a stranger.
_RECIPE: dict[str, dict[str, Callable[[Any], bool]]] = {
  "model": {"dtype": lambda value: value in ("float32", "bfloat16")},
  "data": {
    "channels": _is_size,
    "resize": _is_size,
    "crop": _is_size,
    "interpolation": lambda value: isinstance(value, str),
    "mean": _are_numbers,
    "std": _are_numbers,
  },
  "objective": {"name": lambda value: value == "" or value in [*OBJECTIVES]},
}


class WeightFile(NamedTuple):
  """A network read from a file.

  Attributes:
    config: The recipe, or the part of it that functions of images need.
    variables: {"params", "batch_stats"}.
    step: Training steps behind the weights; 0 if unknown.
    model: The network.
    metadata: The file's own metadata.
  """

  config: ConfigDict
  variables: dict[str, Any]
  step: int
  model: Encoder
  metadata: Mapping[str, Any] | None


def read(path: str, config: Mapping[str, Any] | None) -> WeightFile:
  """Reads a file of weights.

  Args:
    path: A file in any format that `formats.read_file` reads.
    config: The recipe, for files that hold none.

  Raises:
    UserError: The file cannot be read, or does not fit the config.
  """
  imported = formats.read_file(path)
  architecture = imported.architecture
  config = config or stored_config(path, imported)
  recipe = as_config(path, config or _imagenet_config(path, architecture))
  if recipe.data.channels != architecture.channels:
    raise UserError(
      f"{path} is for images of {architecture.channels} channels, the config"
      f" for {recipe.data.channels}."
    )
  return WeightFile(
    recipe,
    imported.variables,
    stored_step(imported),
    _network(architecture, recipe.model.dtype),
    imported.metadata,
  )


def stored_config(
  path: str, imported: formats.Imported
) -> dict[str, Any] | None:
  """Returns the recipe that a file carries, or None.

  Raises:
    UserError: The recipe is incomplete, or one of these keys is no recipe's.
  """
  config = (imported.metadata or {}).get("config")
  if not isinstance(config, Mapping) or not _RECIPE.keys() <= config.keys():
    return None
  for part, keys in _RECIPE.items():
    found = config[part] if isinstance(config[part], Mapping) else {}
    missing = [f"{part}.{key}" for key in keys if key not in found]
    if missing:
      raise UserError(
        f"The recipe in {path} lacks {', '.join(missing)}; give another one as"
        " the config."
      )
    for key, is_valid in keys.items():
      if not is_valid(found[key]):
        shown = formats.one_line(repr(found[key]), 100)
        raise UserError(
          f"The recipe in {path} has {part}.{key} = {shown}, which is not"
          " valid; give another one as the config."
        )
  data = config["data"]
  if {len(data["mean"]), len(data["std"])} - {1, data["channels"]}:
    raise UserError(
      f"The recipe in {path} has another number of data.mean or data.std than"
      f" of data.channels, {data['channels']}; give another one as the config."
    )
  return dict(config)


def as_config(path: str, recipe: Mapping[str, Any]) -> ConfigDict:
  """Returns a file's recipe.

  Raises:
    UserError: It has names that no recipe has.
  """
  try:
    return ConfigDict(recipe)
  except (TypeError, ValueError) as error:
    raise UserError(
      f"The recipe in {path} cannot be read"
      f" ({formats.one_line(str(error), 100)}); give another one as the config."
    ) from error


def stored_step(imported: formats.Imported) -> int:
  """Returns the training steps in the metadata; 0 without a whole number.

  The metadata of other projects may say "12k".
  """
  step = str((imported.metadata or {}).get("step", ""))
  return int(step) if step.isdecimal() and len(step) < 10 else 0


def _imagenet_config(
  path: str, architecture: formats.Architecture
) -> dict[str, Any]:
  """Returns the part of a recipe that functions of images need."""
  settings, size = dict(IMAGENET_DATA), _image_size(architecture)
  if size:  # Positions were learned for it.
    settings |= {"crop": size, "resize": round(size * 256 / 224)}
  if not _is_imagenets(architecture, size):
    raise UserError(
      f"{path} does not say how to prepare its images, and"
      f" {architecture.describe()} is not ImageNet's; give config=, or import"
      " it with `python -m imsvd_jax import_weights --config=...`."
    )
  logger.info(
    "%s does not say how to prepare its images: taking ImageNet's mean and"
    " standard deviation, shorter side %d, center crop %d.",
    path,
    settings["resize"],
    settings["crop"],
  )
  return {
    "model": {"dtype": "float32"},
    "data": settings,
    "objective": {"name": ""},
  }


def _image_size(architecture: formats.Architecture) -> int:
  """Returns for what images a ViT has positions; 0 for other networks."""
  if not architecture.is_vit:
    return 0
  return architecture.patch_size * grid(architecture.positions)[0]


def _is_imagenets(architecture: formats.Architecture, size: int) -> bool:
  if (architecture.stem, architecture.channels) != ("imagenet", 3):
    return False
  return size >= _LEAST_SIZE if size else architecture.patch_size in (0, 4)


def _network(architecture: formats.Architecture, dtype: str) -> Encoder:
  return Encoder(
    backbone=architecture.network(dtype=jnp.dtype(dtype)),
    projector=Projector(
      widths=architecture.projector,
      hidden_bias=architecture.hidden_bias,
      last_bias=architecture.last_bias,
      dtype=jnp.dtype(dtype),
    ),
  )
