"""Colored, textured shapes drawn from independent factors.

Six shapes in four textures; the colors of shape and background, position, size
and rotation are random. The label is shape x texture (24 classes). Color
dominates the pixels and is independent of the label, so raw pixels and random
features are near chance: an encoder scores well only if it has learned.

Image i of a split is the same in every run and for any number of images.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.data import stateless
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import drawn

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("solid", "stripes", "checks", "dots")
_COLORS = ("red", "green", "blue")
FACTORS = (
  *("shape", "texture"),
  *(f"{layer}_{c}" for layer in ("foreground", "background") for c in _COLORS),
  *("x", "y", "size", "rotation"),
)
_SUPERSAMPLING = 3  # Samples per pixel along each side.
_CHUNK_SAMPLES = 1 << 21  # Samples drawn at once, to stay in the cache.


def make(settings: ConfigDict, split: str) -> Source:
  """Returns `data.num_examples` drawings; a quarter as many for evaluation."""
  return drawn.make(
    settings,
    split,
    draw_factors=draw_factors,
    render=render,
    masks_of=masks_of,
    labels_of=lambda factors: factors[:, 0] * len(TEXTURES) + factors[:, 1],
    name="shapes",
    num_classes=len(SHAPES) * len(TEXTURES),
    label_names=tuple(f"{s}/{t}" for s in SHAPES for t in TEXTURES),
    factor_names=FACTORS,
    factor_values={"shape": SHAPES, "texture": TEXTURES},
  )


def draw_factors(num_examples: int, seed: int) -> np.ndarray:
  """Returns float32 [num_examples, len(FACTORS)], one row per image.

  Shape and texture are class numbers, colors are in [0, 1], x, y and size are
  fractions of the image's side, rotation is in radians.
  """
  keys = stateless.fold_in(stateless.key(seed), np.arange(num_examples))
  factors = stateless.uniform(keys, len(FACTORS))
  factors[:, 0] = np.floor(factors[:, 0] * len(SHAPES))
  factors[:, 1] = np.floor(factors[:, 1] * len(TEXTURES))
  factors[:, 8:10] = 0.4 + 0.2 * factors[:, 8:10]
  factors[:, 10] = 0.33 + 0.1 * factors[:, 10]
  factors[:, 11] *= 2 * np.pi
  return factors


def render(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Draws uint8 [n, size, size, channels] from `factors` [n, len(FACTORS)]."""
  return in_chunks(_render_chunk, factors, size, channels)


def in_chunks(
  draw: Callable[[np.ndarray, int, int], np.ndarray],
  factors: np.ndarray,
  size: int,
  channels: int,
) -> np.ndarray:
  """Returns what `draw` makes of all rows, a few at a time."""
  chunk = max(1, _CHUNK_SAMPLES // (size * _SUPERSAMPLING) ** 2)
  parts = [
    draw(factors[start : start + chunk], size, channels)
    for start in range(0, len(factors), chunk)
  ]
  return np.concatenate(parts)


def masks_of(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Draws the shapes alone, white on black and without texture.

  Arguments and result are those of `render`: the same shapes at the same place.
  """
  plain = factors.copy()
  plain[:, 1] = TEXTURES.index("solid")
  plain[:, 2:5], plain[:, 5:8] = 1, 0
  return render(plain, size, channels)


def _render_chunk(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  covered = coverage(
    *(
      factors[:, FACTORS.index(name)]
      for name in ("shape", "texture", "x", "y", "size", "rotation")
    ),
    side=size,
  )[..., None]
  foreground = as_channels(factors[:, 2:5], channels)
  background = as_channels(factors[:, 5:8], channels)
  image = covered * foreground + (1 - covered) * background
  return np.round(image * 255).astype(np.uint8)


def coverage(
  shape: np.ndarray,
  texture: np.ndarray,
  x: np.ndarray,
  y: np.ndarray,
  size: np.ndarray,
  rotation: np.ndarray,
  *,
  side: int,
) -> np.ndarray:
  """Returns the share of each pixel that a painted shape covers.

  Args:
    shape: Numbers of `SHAPES`, [n], as all others.
    texture: Numbers of `TEXTURES`.
    x: Of the center, as a fraction of the image's side; from the left.
    y: The same, from the top.
    size: Radius, as a fraction of the image's side.
    rotation: Radians.
    side: Of the image, pixels.

  Returns:
    float32 [n, side, side].
  """
  samples = side * _SUPERSAMPLING
  grid = (np.arange(samples, dtype=np.float32) + 0.5) / samples
  column = lambda values: values[:, None, None]
  # Coordinates in the shape's own frame, where its radius is 1.
  dx = (grid[None, None, :] - column(x)) / column(size)
  dy = (grid[None, :, None] - column(y)) / column(size)
  cos, sin = np.cos(column(rotation)), np.sin(column(rotation))
  u, v = cos * dx + sin * dy, cos * dy - sin * dx  # [n, samples, samples]

  covered = np.empty(u.shape, bool)
  for value, inside in enumerate(_INSIDE):
    rows = shape == value
    covered[rows] = inside(u[rows], v[rows])
  for value, painted in enumerate(_PAINTED):
    rows = texture == value
    covered[rows] &= painted(u[rows], v[rows])

  # The mean over a pixel's samples is its coverage: antialiased edges.
  blocks = (len(shape), side, _SUPERSAMPLING, side, _SUPERSAMPLING)
  return covered.reshape(blocks).mean(axis=(2, 4), dtype=np.float32)


def as_channels(color: np.ndarray, channels: int) -> np.ndarray:
  """Repeats the three components of [n, 3] to [n, 1, 1, channels]."""
  return color[:, np.arange(channels) % 3][:, None, None, :]


# Each takes coordinates in the shape's frame and returns which are inside.


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Five tips; the radius falls linearly with the angle from each tip."""
  angle = np.arctan2(x, -y) * (5 / (2 * np.pi))
  from_tip = 2 * np.abs(angle - np.round(angle))  # 0 at a tip, 1 between.
  return x * x + y * y < (1.1 - 0.7 * from_tip) ** 2


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  return (y < 0.6) & (np.abs(x) * np.sqrt(3) < y + 1.2)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  x, y = np.abs(x), np.abs(y)
  return (np.minimum(x, y) < 0.33) & (np.maximum(x, y) < 1.0)


_INSIDE: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
  lambda x, y: x * x + y * y < 0.95**2,
  lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85,
  _triangle,
  _star,
  _cross,
  lambda x, y: np.abs(x * x + y * y - 0.68) < 0.32,
)

_PAINTED: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
  lambda x, y: np.ones(x.shape, bool),
  lambda x, y: np.mod(y, 0.7) < 0.35,
  lambda x, y: (np.mod(x, 0.9) < 0.45) ^ (np.mod(y, 0.9) < 0.45),
  lambda x, y: (
    (np.mod(x, 0.7) - 0.35) ** 2 + (np.mod(y, 0.7) - 0.35) ** 2 > 0.22**2
  ),
)
