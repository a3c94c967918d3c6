"""Pixel arithmetic that training's augmentation and explain's probes share.

Images are planes [C, B, H, W] of float32 in [0, 1]: the channel comes first
because three channels next to each other would defeat vectorization.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

# An array [C, ...], or a list of planes: operations on such a list that follow
# each other compile into one pass over the image on a GPU.
Planes = TypeVar("Planes", jax.Array, Sequence[jax.Array])

_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, what "L" means in PIL.


def per_example(values: jax.Array) -> jax.Array:
  """Reshapes [B] to [B, 1, 1], which broadcasts against planes."""
  return values[:, None, None]


def blend(
  planes: Planes,
  factor: jax.Array,
  mean: jax.Array | None = None,
  with_gray: jax.Array | None = None,
) -> Planes:
  """Returns clip(factor x + (1 - factor) base, 0, 1).

  Args:
    planes: float32 [C, B, H, W] or [B, H, W] of each channel, x.
    factor: float32 [B], the weight of the image.
    mean: float32 [B], the base of each image; black by default.
    with_gray: bool [B], whose base is the gray image instead.
  """
  base: jax.Array | float = 0.0
  if with_gray is not None:
    gray = luminance(planes)  # [B, H, W]
    base = jnp.where(per_example(with_gray), gray, base)
  if mean is not None:
    base += per_example(mean)
  factor = per_example(factor)
  mix = lambda x: jnp.clip(factor * x + (1 - factor) * base, 0.0, 1.0)
  return jax.tree.map(mix, planes)


def luminance(planes: Planes) -> jax.Array:
  """Returns PIL's L of three channels, the plain mean of any other number.

  Args:
    planes: [C, ...] or [...] of each channel.

  Returns:
    [...].
  """
  if len(planes) != 3:
    return sum(planes) / len(planes)
  return sum(w * p for w, p in zip(_LUMINANCE, planes, strict=True))


def mean_luminance(planes: Planes) -> jax.Array:
  """Returns each image's mean luminance: [B]."""
  return luminance(planes).mean(axis=(1, 2))


def grayscale(planes: jax.Array) -> jax.Array:
  """Returns the luminance in every channel."""
  return jnp.broadcast_to(luminance(planes), planes.shape)


def adjust_brightness(planes: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends planes [C, B, H, W] with black; `factor` [B] is their weight."""
  return blend(planes, factor)


def adjust_contrast(planes: jax.Array, factor: jax.Array) -> jax.Array:
  """Blends with the mean luminance of the whole image."""
  return blend(planes, factor, mean_luminance(planes))


def adjust_hue(planes: Planes, shift: jax.Array) -> list[jax.Array]:
  """Turns the hue of HSV and keeps value and saturation.

  Args:
    planes: float32 in [0, 1], [3, B, H, W] or [B, H, W] of each channel.
    shift: float32 [B]; 1 is the whole circle.

  Returns:
    float32 [B, H, W] of each channel.
  """
  red, green, blue = planes
  # Not planes.max(axis=0): XLA's CPU backend does not vectorize a reduction of
  # three elements, which makes the hue ten times as slow.
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  divisor = jnp.where(chroma > 0, chroma, 1.0)
  sixths = jnp.where(
    value == red,
    (green - blue) / divisor,
    jnp.where(
      value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor
    ),
  )
  sixths = sixths + 6 * per_example(shift)

  def channel(offset: int) -> jax.Array:
    # A channel holds `value` for two sixths of the circle, falls for one,
    # stays at value - chroma for two, and rises for one.
    k = sixths + offset
    k = k - 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

  return [channel(5), channel(3), channel(1)]


def adjust_solarize(planes: jax.Array, threshold: float) -> jax.Array:
  """Inverts pixels at or above the threshold."""
  return jnp.where(planes >= threshold, 1 - planes, planes)


def gaussian_blur(
  planes: jax.Array,
  sigma: jax.Array,
  *,
  radius: int,
  edges: str = "reflect",
) -> jax.Array:
  """Convolves each example with a Gaussian.

  Args:
    planes: float32 [C, B, H, W].
    sigma: float32 [B], in pixels; 0 changes nothing.
    radius: Pixels on each side of the center: 3 sigma or more, else the image
      is blurred less than sigma says.
    edges: How to continue the image, a mode of `jnp.pad`.
  """
  sigma = jnp.maximum(sigma, 1e-6)  # 0 / 0 is not a number.
  distance = jnp.arange(radius + 1, dtype=jnp.float32)
  weights = jnp.exp(-0.5 * (distance / sigma[:, None]) ** 2)
  weights = weights / (2 * weights.sum(-1, keepdims=True) - weights[:, :1])
  weights = [per_example(weights[:, k]) for k in range(radius + 1)]

  def blur(planes: jax.Array) -> jax.Array:
    for axis in (-2, -1):
      planes = _convolve(planes, weights, axis, edges)
    return planes

  # What came before is computed once, and not again for every tap: a GPU stores
  # it. Elsewhere a loop over channels does the same in less memory.
  return jax.lax.platform_dependent(
    planes,
    cuda=lambda planes: blur(jax.lax.optimization_barrier(planes)),
    default=functools.partial(jax.lax.map, blur),
  )


def _convolve(
  planes: jax.Array, weights: list[jax.Array], axis: int, edges: str
) -> jax.Array:
  """Convolves one axis with a symmetric kernel, given from its center out."""
  radius, length = len(weights) - 1, planes.shape[axis]
  padding = [(0, 0)] * planes.ndim
  padding[axis] = (radius, radius)
  # The barrier keeps XLA from computing the padding again for every tap.
  padded = jax.lax.optimization_barrier(jnp.pad(planes, padding, mode=edges))
  at = lambda shift: jax.lax.slice_in_dim(
    padded, radius + shift, radius + shift + length, axis=axis
  )
  taps = [w * (at(-k) + at(k)) for k, w in enumerate(weights[1:], 1)]
  return weights[0] * at(0) + sum(taps)
