"""Cuts and resizes batches of images of one size, in JAX, by matrix products.

The pixels are PIL's to one level: antialiased, with the weights of its filters.
Weights and what is between the two products have so few digits that float32
adds them without rounding: an image's view does not depend on the order of the
additions, which differs with the batch and the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from imsvd_jax.data import boxes as boxes_lib

# Parts of one: 9 + 2 + 13 bits of a product are a float32's 24.
_WEIGHT_STEPS, _LEVEL_STEPS = 2.0**13, 2.0**2


def _bicubic(x: jax.Array) -> jax.Array:
  """Returns Keys' cubic convolution kernel with a = -0.5, like PIL's."""
  x = jnp.abs(x)
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


KERNELS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "bicubic": _bicubic,
  "bilinear": lambda x: jnp.maximum(1 - jnp.abs(x), 0.0),
}


def cut_views(
  images: jax.Array, boxes: jax.Array, sizes: Sequence[int], kernel: str
) -> tuple[jax.Array, ...]:
  """Cuts every view of a batch.

  Args:
    images: uint8 [B, height, width, C].
    boxes: float32 [B, V, 5], see `boxes.random_boxes`.
    sizes: Side of each of the V views.
    kernel: "bicubic" or "bilinear".

  Returns:
    uint8 [B, 2, S, S, C] and, if V > 2, uint8 [B, V - 2, s, s, C].
  """
  views = [
    resample(images, boxes[:, number], size, kernel, clip_to_box=True)
    for number, size in enumerate(sizes)
  ]
  return tuple(jnp.stack(group, axis=1) for group in boxes_lib.by_size(views))


def resample(
  images: jax.Array,
  boxes: jax.Array,
  size: int,
  kernel: str,
  *,
  clip_to_box: bool,
) -> jax.Array:
  """Cuts one box out of each image and resizes it.

  Args:
    images: uint8 [B, height, width, C].
    boxes: float32 [B, 5], the parts of a `boxes.Box`.
    size: Height and width of the result.
    kernel: "bicubic" or "bilinear".
    clip_to_box: Whether pixels outside of the box have no weight, as if the box
      were cut out before it is resized.

  Returns:
    uint8 [B, size, size, C].
  """
  top, left, box_height, box_width, flip = boxes.T
  weights = functools.partial(_weights, kernel=kernel, clip_to_box=clip_to_box)
  out = jnp.arange(size, dtype=jnp.float32)
  rows = weights(top, box_height, out[None], images.shape[1])
  mirrored = jnp.where(flip[:, None] > 0, size - 1 - out, out)
  columns = weights(left, box_width, mirrored, images.shape[2])
  # Of full precision also where the device would round to TensorFloat-32.
  product = functools.partial(jnp.einsum, precision="highest")
  # With the channels inside, neither product has to move float32 pixels.
  pixels = images.swapaxes(2, 3).astype(jnp.float32)  # [B, height, C, width]
  pixels = product("bhcw,bjw->bhcj", pixels, columns)
  pixels = jnp.round(pixels * _LEVEL_STEPS) / _LEVEL_STEPS
  pixels = product("bih,bhcj->bicj", rows, pixels)
  pixels = jnp.clip(jnp.floor(pixels + 0.5), 0, 255).astype(jnp.uint8)
  return pixels.swapaxes(2, 3)


def _weights(
  start: jax.Array,
  length: jax.Array,
  out: jax.Array,
  in_size: int,
  *,
  kernel: str,
  clip_to_box: bool,
) -> jax.Array:
  """Returns the weight of each input pixel in each output pixel, for one axis.

  Where the image shrinks, the kernel widens with the scale.

  Args:
    start: First pixel of each box, [B].
    length: Pixels of each box, [B].
    out: Place of each output pixel, [B or 1, size].
    in_size: Pixels of the image.
    kernel: A key of KERNELS.
    clip_to_box: See `resample`.

  Returns:
    float32 [B, size, in_size]; rows sum to 1, but for rounding.
  """
  start, length = start[:, None, None], length[:, None, None]
  scale = length / out.shape[-1]
  pixels = jnp.arange(in_size, dtype=jnp.float32)
  centers = start + (out[..., None] + 0.5) * scale
  distance = (pixels + 0.5 - centers) / jnp.maximum(scale, 1.0)
  # Whole steps, so that the order of the sum does not matter either.
  weights = jnp.round(KERNELS[kernel](distance) * _WEIGHT_STEPS)
  if clip_to_box:
    inside = (pixels >= start) & (pixels < start + length)
    weights = jnp.where(inside, weights, 0.0)
  weights = weights / weights.sum(axis=-1, keepdims=True)
  return jnp.round(weights * _WEIGHT_STEPS) / _WEIGHT_STEPS
