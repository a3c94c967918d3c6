"""The device half of augmentation: pixel arithmetic, in JAX and float32.

The definitions are torchvision's, on float images in [0, 1]: color jitter
(brightness, contrast, saturation and hue in random order), grayscale, Gaussian
blur, solarize. Two more operations are for images whose color must carry no
information: a random permutation of the channels, and inversion. The order is:
jitter, permutation, inversion, grayscale, blur, solarize, normalize.

Every random number is a function of one key per example, so an example's view
depends on (seed, epoch, index, view) and not on the batch that it is in. An
operation whose probability or strength is 0 is not compiled at all.

Saturation, hue and grayscale are defined on three channels; for another number
of channels they are skipped, brightness and contrast apply, and contrast takes
the plain mean of all channels.

Internally, images are planes [C, B, H, W]: with the three channels last, XLA
could not vectorize.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from imsvd_jax.base import pixels

# Uniform numbers in [0, 1) by name, one for each example.
_Draws = dict[str, jax.Array]

_Operation = Callable[[_Draws, jax.Array], jax.Array]


class Augmentation(NamedTuple):
  """Photometric recipes of all views of an image.

  Attributes:
    groups: Recipes (`config.views.view1`, ...) by resolution: of the two global
      views, then of the local crops.
    mean: Mean of each channel, or one number for all.
    std: Standard deviation of each channel, likewise.
  """

  groups: tuple[tuple[ConfigDict, ...], ...]
  mean: Sequence[float]
  std: Sequence[float]


def augment_views(
  augmentation: Augmentation, rng: jax.Array, batch: dict[str, Any]
) -> list[jax.Array]:
  """Returns a batch's views, augmented and normalized.

  Args:
    augmentation: A recipe for each view.
    rng: The run's key.
    batch: See `step.train_step`.

  Returns:
    One float32 array [V, B, S, S, C] per resolution: the two global views,
    then the local crops if there are any.
  """
  first, groups = 0, []
  for group, images in zip(augmentation.groups, batch["views"], strict=False):
    augmented = []
    for v, recipe in enumerate(group):
      keys = view_keys(rng, batch["epoch"], batch["index"], first + v)
      augmented.append(
        augment(
          keys,
          images[:, v],
          recipe,
          mean=augmentation.mean,
          std=augmentation.std,
        )
      )
    groups.append(jnp.stack(augmented))
    first += len(group)
  return groups


def view_keys(
  key: jax.Array, epoch: jax.Array, index: jax.Array, view: int
) -> jax.Array:
  """Returns one key per example: a function of (seed, epoch, index, view).

  Args:
    key: The run's augmentation key.
    epoch: int32 [B], the epoch that each example belongs to.
    index: int32 [B], the example's index in the data set.
    view: Number of the view.

  Returns:
    Typed keys [B].
  """
  fold = jax.random.fold_in
  one = lambda e, i: fold(fold(fold(key, e), i), view)
  return jax.vmap(one)(epoch, index)


def normalize(
  images: jax.Array, *, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
  """Returns (images / 255 - mean) / std.

  Args:
    images: uint8 [..., C].
    mean: Mean of each channel, C numbers or one for all.
    std: Standard deviation of each channel, likewise.
  """
  mean, std = (jnp.asarray(x, jnp.float32) for x in (mean, std))
  return (images.astype(jnp.float32) / 255 - mean) / std


def augment(
  keys: jax.Array,
  images: jax.Array,
  settings: Any,
  *,
  mean: Sequence[float],
  std: Sequence[float],
) -> jax.Array:
  """Returns randomly augmented, normalized images.

  Args:
    keys: Typed keys [B], see `view_keys`.
    images: uint8 [B, H, W, C].
    settings: One view's settings, read by attribute: jitter_prob, brightness,
      contrast, saturation, hue, permute_prob, invert_prob, gray_prob,
      blur_prob, blur_sigma, solarize_prob, solarize_threshold (0 to 255).
    mean: Mean of each channel for the normalization.
    std: Standard deviation of each channel.

  Returns:
    float32 [B, H, W, C].
  """
  planes = jnp.moveaxis(images, -1, 0).astype(jnp.float32) / 255
  channels = planes.shape[0]
  recipe = [step for step in _recipe(settings, channels) if step[1] > 0]
  draws = _draw(keys, channels) if recipe else {}
  for coin, prob, operation in recipe:
    changed = operation(draws, planes)
    if prob < 1:
      chosen = pixels.per_example(draws[coin] < prob)
      changed = jnp.where(chosen, changed, planes)
    planes = changed
  shape = (-1, 1, 1, 1)
  mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (mean, std))
  return jnp.moveaxis((planes - mean) / std, 0, -1)


def _recipe(
  settings: Any, channels: int
) -> list[tuple[str, float, _Operation]]:
  """Returns (coin's name, probability, operation(draws, planes)) in order."""
  gray_prob = settings.gray_prob if channels == 3 else 0.0
  strengths = _strengths(settings, channels)
  jitter = functools.partial(_jitter, strengths=strengths)
  blur = functools.partial(_random_blur, limits=settings.blur_sigma)
  solarize = lambda _, planes: pixels.adjust_solarize(
    planes, (settings.solarize_threshold - 0.5) / 255
  )
  return [
    ("jitter_coin", settings.jitter_prob if strengths else 0.0, jitter),
    ("permute_coin", settings.permute_prob, _permute_channels),
    ("invert_coin", settings.invert_prob, lambda _, planes: 1 - planes),
    ("gray_coin", gray_prob, _gray),
    ("blur_coin", settings.blur_prob, blur),
    ("solarize_coin", settings.solarize_prob, solarize),
  ]


# --- Random numbers -----------------------------------------------------------

# Every example draws the same numbers whatever the settings are, so that
# changing one operation does not change the others.
_DRAWS = (
  "jitter_coin",
  "brightness",
  "contrast",
  "saturation",
  "hue",
  "brightness_turn",
  "contrast_turn",
  "saturation_turn",
  "hue_turn",
  "permute_coin",
  "invert_coin",
  "gray_coin",
  "blur_coin",
  "blur_sigma",
  "solarize_coin",
)


def _draw(keys: jax.Array, channels: int) -> _Draws:
  """Returns uniform numbers in [0, 1) by name: [B]; "permutation": [B, C].

  Calls the generator once per example: many small calls cost more to compile
  and to run.
  """
  count = len(_DRAWS) + channels
  numbers = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys)
  draws = {name: numbers[:, i] for i, name in enumerate(_DRAWS)}
  return draws | {"permutation": numbers[:, len(_DRAWS) :]}


# --- Color jitter -------------------------------------------------------------

_BLENDS = ("brightness", "contrast", "saturation")


def _strengths(settings: Any, channels: int) -> dict[str, float]:
  """The operations of the jitter that do something, with their strengths."""
  names = (*_BLENDS, "hue") if channels == 3 else ("brightness", "contrast")
  strengths = {name: getattr(settings, name) for name in names}
  return {name: value for name, value in strengths.items() if value > 0}


def _jitter(
  draws: _Draws, planes: jax.Array, *, strengths: dict[str, float]
) -> jax.Array:
  """Brightness, contrast, saturation and hue in a random order per example."""
  return jax.lax.platform_dependent(
    draws,
    planes,
    cuda=functools.partial(_jitter_pixels, strengths=strengths),
    default=functools.partial(
      _in_turns, strengths=strengths, make_blends=_blend_images
    ),
  )


def _jitter_pixels(
  draws: _Draws, planes: jax.Array, *, strengths: dict[str, float]
) -> jax.Array:
  """The jitter in two passes over the images, for GPUs.

  Contrast needs the mean of an image as the operations before it leave it. The
  first pass computes those and stores only the mean. Then every operation works
  on single pixels, so the second pass makes all of them. CPUs and TPUs are
  slower this way.
  """
  mean = jnp.zeros(planes.shape[1])
  if "contrast" in strengths:
    others = {n: value for n, value in strengths.items() if n != "contrast"}
    make = functools.partial(_blend_pixels, mean=mean)
    before = lambda name: draws[f"{name}_turn"] < draws["contrast_turn"]
    mean = pixels.mean_luminance(
      _in_turns(draws, planes, strengths=others, make_blends=make, who=before)
    )
  make = functools.partial(_blend_pixels, mean=mean)
  return _in_turns(draws, planes, strengths=strengths, make_blends=make)


# From random numbers, planes, strengths of the blends by name, and whether each
# example makes the blend of a name, to planes.
_MakeBlends = Callable[..., Any]


def _in_turns(
  draws: _Draws,
  planes: jax.Array,
  *,
  strengths: dict[str, float],
  make_blends: _MakeBlends,
  who: Callable[[str], jax.Array | bool] = lambda name: True,
) -> jax.Array:
  """Makes each operation on the examples `who` tells, in their turns.

  Evaluating all four in each of four turns would cost sixteen operations per
  pixel, four of them hue, the slowest. Brightness, contrast and saturation are
  one operation with three parameters: a blend with black, with the mean and
  with the gray image. So hue is evaluated once, between two rounds of blends:
  each example makes a blend in the first round if its turn is before hue's,
  else in the second, and blends with weight 1 (nothing) in the other.
  """
  blends = {name: strengths[name] for name in _BLENDS if name in strengths}
  if "hue" not in strengths:
    return jnp.stack(list(make_blends(draws, planes, blends, who)))
  before = lambda name: draws[f"{name}_turn"] < draws["hue_turn"]
  first = make_blends(draws, planes, blends, lambda n: who(n) & before(n))
  shift = (2 * draws["hue"] - 1) * strengths["hue"]
  turned = pixels.adjust_hue(first, jnp.where(who("hue"), shift, 0.0))
  return jnp.stack(
    list(make_blends(draws, turned, blends, lambda n: who(n) & ~before(n)))
  )


def _factor(draw: jax.Array, strength: float) -> jax.Array:
  low, high = max(0.0, 1.0 - strength), 1.0 + strength
  return low + (high - low) * draw


def _blend_images(
  draws: _Draws,
  planes: jax.Array | list[jax.Array],
  strengths: dict[str, float],
  who: Callable[[str], jax.Array],
) -> jax.Array:
  """Makes blends in their turns, each on whole images."""
  planes = jnp.stack(list(planes))
  if not strengths:
    return planes

  def blend(planes: jax.Array, turn: jax.Array) -> tuple[jax.Array, None]:
    factor, now = _blend_of_turn(draws, strengths, who, turn)
    mean = None
    if "contrast" in now:
      mean = jnp.where(now["contrast"], pixels.mean_luminance(planes), 0.0)
    return pixels.blend(planes, factor, mean, now.get("saturation")), None

  # A loop, so that each blend is computed once: unrolled, XLA's CPU backend
  # fuses every blend into all later ones and computes it again for each.
  return jax.lax.scan(blend, planes, jnp.arange(len(strengths)))[0]


def _blend_pixels(
  draws: _Draws,
  planes: jax.Array | list[jax.Array],
  strengths: dict[str, float],
  who: Callable[[str], jax.Array],
  *,
  mean: jax.Array,
) -> Sequence[jax.Array]:
  """Makes blends in their turns, where the mean for contrast [B] is known."""
  planes = list(planes)
  for turn in range(len(strengths)):
    factor, now = _blend_of_turn(draws, strengths, who, turn)
    base = None
    if "contrast" in now:
      base = jnp.where(now["contrast"], mean, 0.0)
    planes = pixels.blend(planes, factor, base, now.get("saturation"))
  return planes


def _blend_of_turn(
  draws: _Draws,
  strengths: dict[str, float],
  who: Callable[[str], jax.Array],
  turn: jax.Array | int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the image's weight [B], and who makes which blend now, bool [B]."""
  now = {
    name: (_rank(draws, name, strengths) == turn) & who(name)
    for name in strengths
  }
  factor = 1.0 + sum(
    jnp.where(now[name], _factor(draws[name], strength) - 1, 0.0)
    for name, strength in strengths.items()
  )
  return factor, now


def _rank(draws: _Draws, name: str, names: Iterable[str]) -> jax.Array:
  """How many of the others come before `name`; ties go by position."""
  names = list(names)
  mine, before = draws[f"{name}_turn"], names.index(name)
  return sum(
    (draws[f"{other}_turn"] < mine)
    | ((draws[f"{other}_turn"] == mine) & (i < before))
    for i, other in enumerate(names)
  ).astype(jnp.int32)


# --- The other operations -----------------------------------------------------


def _permute_channels(draws: _Draws, planes: jax.Array) -> jax.Array:
  """A uniformly random order of the channels of each example."""
  order = jnp.argsort(draws["permutation"], axis=-1)  # [B, C]
  channels = planes.shape[0]
  take = jax.nn.one_hot(order, channels, dtype=planes.dtype)  # [B, out, in]
  return jnp.stack(
    [
      sum(
        pixels.per_example(take[:, o, i]) * planes[i] for i in range(channels)
      )
      for o in range(channels)
    ]
  )


def _gray(draws: _Draws, planes: jax.Array) -> jax.Array:
  del draws
  return pixels.grayscale(planes)


def _random_blur(
  draws: _Draws, planes: jax.Array, *, limits: Sequence[float]
) -> jax.Array:
  low, high = limits
  side = min(planes.shape[-2:])
  # 3 sigma, as PIL's; a twentieth of the side, as SimCLR's kernel of 23 at 224,
  # where that is more. Beyond the side there are only repeated reflections.
  radius = min(max(side // 20, math.ceil(3 * high)), side - 1)
  sigma = low + (high - low) * draws["blur_sigma"]
  return pixels.gaussian_blur(planes, sigma, radius=radius)
