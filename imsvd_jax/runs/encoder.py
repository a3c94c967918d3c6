"""A trained encoder as functions of images.

`load_encoder(workdir_or_file)` is the entry for Python users, and for the
commands `evaluate`, `export`, `embed` and `explain`.
"""

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.data import named
from imsvd_jax.data.source import value_range_of
from imsvd_jax.models import Encoder
from imsvd_jax.objectives import OBJECTIVES, soft_discretize
from imsvd_jax.runs import weight_files, weights
from imsvd_jax.training import augment, experiment

logger = logging.getLogger(__name__)


class LoadedEncoder:
  """A frozen encoder: jitted functions of uint8 images.

  Each function takes any number of images and runs them in blocks, split over
  all devices of this process. A run with `data.value_range` has float32 images:
  levels of 0 to 255, which the values of that range are scaled to.

  Attributes:
    config: The run's recipe.
    model: The Flax module.
    variables: {"params", "batch_stats"} of the chosen weights, float32.
    step: Training steps behind the weights.
    metadata: What the file of the weights says about itself; {} for a run.
    has_projector: Whether there are embeddings beside the features.
    discrete: Whether embeddings are soft discrete variables.
  """

  def __init__(
    self,
    config: ml_collections.ConfigDict,
    variables: dict[str, Any],
    step: int,
    *,
    model: Encoder | None = None,
    metadata: Mapping[str, Any] | None = None,
    batch_size: int = 256,
  ) -> None:
    """Binds weights to a recipe.

    Args:
      config: The recipe; without an objective (name "") there are no codes.
      variables: {"params", "batch_stats"} with a "backbone" and perhaps a
        "projector".
      step: Training steps behind the weights.
      model: The network, if it is not the one that config.model describes.
      metadata: What the file of the weights says about itself.
      batch_size: Images in a block, over all devices.
    """
    name = config.objective.name
    objective = lookup(OBJECTIVES, name, "objective") if name else None
    if model is None:
      model = experiment.make_model(config.model, OBJECTIVES[name])
    self.config = config
    self.model = model
    self.step = step
    self.metadata = dict(metadata or {})
    self.has_projector = "projector" in variables["params"]
    self.discrete = (
      self.has_projector and objective is not None and objective.discrete
    )
    self._mesh = devices.make_mesh(jax.local_devices())
    # Rounded up to the devices: a batch has to split evenly.
    self._batch_size = math.ceil(batch_size / self._mesh.size) * self._mesh.size
    self.variables = jax.device_put(variables, devices.replicated(self._mesh))
    self._features = jax.jit(self._pure_features)
    self._features_and_codes = jax.jit(self._pure_features_and_codes)
    self._embeddings = jax.jit(self._pure_embeddings)
    self._probabilities = jax.jit(self._pure_probabilities)
    self._feature_maps = jax.jit(self._pure_feature_maps)
    self._feature_maps_and_codes = jax.jit(self._pure_feature_maps_and_codes)
    self._fit = jax.jit(
      functools.partial(
        fit_images, resize=config.data.resize, crop=config.data.crop
      )
    )

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 images [B, H, W, C] of any size to features [B, F].

    Images are resized (shorter side to data.resize, antialiased bicubic) and
    cropped to the center first, as in evaluation.
    """
    return self._in_blocks(self._features, self.preprocess(images))

  def preprocess(self, images: np.ndarray) -> np.ndarray:
    """Resizes and crops uint8 [B, H, W, C] to the recipe's evaluation size."""
    images = self._check(images)
    resize, crop = self.config.data.resize, self.config.data.crop
    if images.shape[1:3] == (resize, resize) == (crop, crop):
      return images
    return self._in_blocks(self._fit, images)

  def features(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [B, S, S, C], as they are, to features float32 [B, F]."""
    return self._in_blocks(self._features, self._check(images))

  def embeddings(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [B, S, S, C] to the projector's output float32 [B, D].

    Raises:
      UserError: These weights have no projector.
    """
    self.check_projector()
    return self._in_blocks(self._embeddings, self._check(images))

  def probabilities(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [B, S, S, C] to soft variables q float32 [B, M, b].

    Raises:
      UserError: The run's objective has no discrete code.
    """
    self.check_discrete()
    return self._in_blocks(self._probabilities, self._check(images))

  def codes(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [B, S, S, C] to the likeliest bin int32 [B, M] of each."""
    return np.argmax(self.probabilities(images), axis=-1).astype(np.int32)

  def features_and_codes(
    self, images: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns `features` and `codes`, from one pass."""
    self.check_discrete()
    return self._in_blocks(self._features_and_codes, self._check(images))

  def feature_maps(self, images: np.ndarray) -> np.ndarray:
    """Maps uint8 [B, S, S, C] to float32 [B, h, w, F], before pooling."""
    return self._in_blocks(self._feature_maps, self._check(images))

  def feature_maps_and_codes(
    self, images: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns `feature_maps` and codes per patch, from one pass.

    The projector is applied to each position as if it were the features of an
    image; the statistics of its batch norms are those of pooled features.

    Returns:
      float32 [B, h, w, F], and the likeliest bins [B, h, w, M] in the smallest
      unsigned type that holds them.

    Raises:
      UserError: The run's objective has no discrete code.
    """
    self.check_discrete()
    return self._in_blocks(self._feature_maps_and_codes, self._check(images))

  @property
  def pixel_type(self) -> type[np.generic]:
    """The type of images: uint8, or float32 levels of 0 to 255."""
    has_range = value_range_of(self.config.data) is not None
    return np.float32 if has_range else np.uint8

  def images_of(self, batch: Any) -> jax.ShapeDtypeStruct:
    """Returns the shape and type of a batch, as `apply` takes it."""
    size, channels = self.config.data.crop, self.config.data.channels
    return jax.ShapeDtypeStruct((batch, size, size, channels), self.pixel_type)

  # --- Pure functions of (variables, images), for callers that compose them ---

  def apply(
    self, variables: Any, images: jax.Array, *, projector: bool = False
  ) -> jax.Array | dict[str, jax.Array]:
    """Returns everything about images, as a function for jit and export.

    Args:
      variables: As `self.variables`.
      images: uint8 [B, S, S, C].
      projector: Whether to return the projector's side too.

    Returns:
      Features float32 [B, F]; with the projector {"features", "embeddings"
      float32 [B, D], and if they are discrete "codes" int32 [B, M]}.
    """
    if not projector:
      return self._pure_features(variables, images)
    self.check_projector()
    features, embeddings = self.model.apply(
      variables, self._normalized(images), train=False
    )
    outputs = {"features": features, "embeddings": embeddings}
    if self.discrete:
      outputs["codes"] = self._likeliest(embeddings)
    return outputs

  def _normalized(self, images: jax.Array) -> jax.Array:
    return normalized(images, self.config.data)

  def _pure_features(self, variables: Any, images: jax.Array) -> jax.Array:
    return features_of(self.model, self.config.data, variables, images)

  def _pure_embeddings(self, variables: Any, images: jax.Array) -> jax.Array:
    return self.model.apply(variables, self._normalized(images), train=False)[1]

  def _pure_probabilities(self, variables: Any, images: jax.Array) -> jax.Array:
    return self._discretized(self._pure_embeddings(variables, images))

  def _pure_features_and_codes(
    self, variables: Any, images: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    outputs = self.apply(variables, images, projector=True)
    return outputs["features"], outputs["codes"]

  def _discretized(self, embeddings: jax.Array) -> jax.Array:
    settings = experiment.hyperparameters(self.config)
    return soft_discretize(
      embeddings,
      num_bins=settings["num_bins"],
      temperature=settings["temperature"],
    )

  def _likeliest(self, embeddings: jax.Array) -> jax.Array:
    bins = jnp.argmax(self._discretized(embeddings), axis=-1)
    return bins.astype(jnp.int32)

  def _pure_feature_maps(self, variables: Any, images: jax.Array) -> jax.Array:
    return self.model.apply(
      variables,
      self._normalized(images),
      train=False,
      method=self.model.feature_maps,
    )

  def _pure_feature_maps_and_codes(
    self, variables: Any, images: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    maps, embeddings = self.model.apply(
      variables, self._normalized(images), method=self.model.patch_embeddings
    )
    bins = self._likeliest(embeddings.reshape(-1, embeddings.shape[-1]))
    settings = experiment.hyperparameters(self.config)
    smallest = np.min_scalar_type(settings["num_bins"] - 1)
    return maps, bins.reshape(*maps.shape[:3], -1).astype(smallest)

  # --- Blocks -----------------------------------------------------------------

  def _in_blocks(
    self, function: Callable[[Any, jax.Array], Any], images: np.ndarray
  ) -> Any:
    """Runs a function on blocks of one size, and joins what it returns."""
    size = self._batch_size
    blocks: list[Any] = []
    pending = None
    for start in range(0, len(images), size):
      block = images[start : start + size]
      padding = [(0, size - len(block))] + [(0, 0)] * (images.ndim - 1)
      batch = jax.device_put(
        np.pad(block, padding), devices.batch_sharded(self._mesh)
      )
      result = (function(self.variables, batch), len(block))
      if pending is not None:  # Fetched while the device works on the next.
        blocks.append(_fetch(*pending))
      pending = result
    if pending is not None:
      blocks.append(_fetch(*pending))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)

  def _check(self, images: np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    channels = self.config.data.channels
    expected = f"uint8 [B, H, W, {channels}]"
    if images.ndim != 4 or images.shape[-1] != channels or not len(images):
      raise UserError(
        f"Images have shape {images.shape}; expected {expected}, B >= 1."
      )
    if images.dtype not in (np.uint8, self.pixel_type):
      raise UserError(
        f"Images are {images.dtype}; expected {expected} with values 0 to 255."
      )
    return images

  def check_projector(self) -> None:
    """Raises UserError if there are no embeddings."""
    if not self.has_projector:
      raise UserError(
        "These weights are a backbone alone: they give features, but neither"
        " embeddings nor codes."
      )

  def check_discrete(self) -> None:
    """Raises UserError if there are no codes."""
    self.check_projector()
    if not self.discrete:
      known = [name for name, o in OBJECTIVES.items() if o.discrete]
      raise UserError(
        f"Objective {self.config.objective.name!r} has no discrete code; only"
        f" {' and '.join(sorted(known))} runs do."
      )


def _fetch(result: Any, count: int) -> Any:
  """Copies the first `count` rows to the host."""
  return jax.tree.map(lambda x: np.asarray(x)[:count], result)


def normalized(
  images: jax.Array, settings: ml_collections.ConfigDict
) -> jax.Array:
  """Returns uint8 images as the network takes them; `settings`: `data`."""
  return augment.normalize(
    images, mean=tuple(settings.mean), std=tuple(settings.std)
  )


def features_of(
  model: Encoder,
  settings: ml_collections.ConfigDict,
  variables: Any,
  images: jax.Array,
) -> jax.Array:
  """Maps uint8 [B, S, S, C] to features float32 [B, F].

  Args:
    model: The network.
    settings: The recipe's `data`.
    variables: {"params", "batch_stats"}.
    images: As they are.
  """
  return model.apply(
    variables, normalized(images, settings), train=False, method=model.features
  )


def data_settings(
  config: ml_collections.ConfigDict, chosen: str = ""
) -> ml_collections.ConfigDict:
  """Returns the run's data settings, for another data set if one is chosen.

  Args:
    config: The recipe of a run or a file.
    chosen: As `named.name_and_path` has it; the run's own data set if empty.

  Returns:
    Settings like config.data; the name is empty if none is known.
  """
  data = config.copy_and_resolve_references().data.to_dict()
  settings = ml_collections.ConfigDict(
    {
      "name": "",
      "path": "",
      "train_split": "train",
      "eval_split": "test",
      "num_examples": 0,
      "image_size": data["crop"],
      "on_bad_image": "replace",
      **data,
    }
  )
  if chosen:
    named.choose(settings, chosen)
  return settings


def data_to_read(
  config: ml_collections.ConfigDict, chosen: str = ""
) -> ml_collections.ConfigDict:
  """Returns `data_settings` of images that can be read.

  Raises:
    UserError: None is chosen, and the run has no images of its own.
  """
  settings = data_settings(config, chosen)
  if settings.name in named.IN_FILES and not settings.path:
    raise UserError(
      "The run has no images of its own, as of imported weights (data.path is"
      " empty); give --data, such as --data=folder:~/images."
    )
  return settings


def fit_images(
  variables: Any, images: jax.Array, *, resize: int, crop: int
) -> jax.Array:
  """Resizes the shorter side to `resize` and cuts the center `crop`.

  Args:
    variables: Ignored; every function of an encoder takes them.
    images: uint8 or float32 levels [B, H, W, C].
    resize: Shorter side after resizing, in pixels.
    crop: Side of the result, in pixels.

  Returns:
    [B, crop, crop, C] of the same type.
  """
  del variables
  dtype = images.dtype
  batch, height, width, channels = images.shape
  scale = resize / min(height, width)
  if scale != 1:
    height, width = round(height * scale), round(width * scale)
    images = jax.image.resize(
      images.astype(jnp.float32),
      (batch, height, width, channels),
      method="cubic",
      antialias=True,
    )
  top, left = (height - crop) // 2, (width - crop) // 2
  images = images[:, top : top + crop, left : left + crop]
  images = jnp.clip(images, 0, 255)
  return images if dtype != jnp.uint8 else jnp.round(images).astype(jnp.uint8)


def load_encoder(
  workdir: str | os.PathLike[str],
  step: int | str | None = None,
  *,
  use_target: bool = False,
  config: Mapping[str, Any] | None = None,
  batch_size: int = 256,
  check: Callable[[ml_collections.ConfigDict], None] | None = None,
) -> LoadedEncoder:
  """Loads an encoder: `encoder(images uint8 [B, H, W, 3]) -> [B, F]`.

  Args:
    workdir: A run's directory; or a file of weights, in any format that
      `formats.read_file` reads.
    step: Which checkpoint, or "best"; the newest good one by default.
    use_target: Take the EMA target network's weights.
    config: The recipe, for files that hold none; ImageNet's by default.
    batch_size: Images that are computed together, over all devices.
    check: Called with the recipe; of a run, before the weights are read.

  Raises:
    UserError: There is no such run or step, it has no target network, or the
      file cannot be read.
  """
  path = os.path.expanduser(os.fspath(workdir))
  if os.path.isfile(path):
    if step is not None or use_target:
      raise UserError(
        f"{path} is a file and holds one set of weights; a step or the EMA"
        " target network is chosen in the run's directory."
      )
    file = weight_files.read(path, config)
    if check is not None:
      check(file.config)
    return LoadedEncoder(**file._asdict(), batch_size=batch_size)
  if config is not None:
    raise UserError(f"{path} is a run and has its own config; leave it out.")
  as_config = ml_collections.ConfigDict
  check_recipe = check and (lambda recipe: check(as_config(recipe)))
  stored = weights.load_variables(path, step, check_recipe)
  params, batch_stats = stored.params, stored.batch_stats
  if use_target:
    if stored.target is None:
      raise UserError(
        f"The run in {path} has no EMA target network; its objective keeps"
        " none."
      )
    params = stored.target["params"]
    batch_stats = stored.target.get("batch_stats", {})
  return LoadedEncoder(
    as_config(stored.config),
    {"params": params, "batch_stats": batch_stats},
    stored.step,
    batch_size=batch_size,
  )
