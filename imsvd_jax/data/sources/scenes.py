"""Two shapes side by side, on a pattern and in a light, from 24 factors.

Every factor is independent of all others: shape, texture, color, place, size
and rotation of the object on the left and of the one on the right, pattern and
color of the ground, and direction and strength of the light. The label is the
pair of shapes (36 classes); a mirrored scene is another scene.

Image i of a split is the same in every run and for any number of images.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.data import stateless
from imsvd_jax.data.source import Source
from imsvd_jax.data.sources import drawn, shapes

PATTERNS = ("plain", "gradient", "stripes", "checks")
_COLOR = ("color_red", "color_green", "color_blue")
_OF_AN_OBJECT = ("shape", "texture", *_COLOR, "x", "y", "size", "rotation")
_SIDES = ("left", "right")
FACTORS = (
  *(f"{side}_{name}" for side in _SIDES for name in _OF_AN_OBJECT),
  *("ground_pattern", *(f"ground_{name}" for name in _COLOR)),
  *("light_direction", "light_strength"),
)
# Range of each factor that is a number; they are drawn evenly within it. No
# object reaches beyond its half: a corner is up to 1.2 times the size away.
_RANGES = {
  "left_x": (0.22, 0.27),
  "right_x": (0.73, 0.78),
  **{f"{side}_y": (0.3, 0.7) for side in _SIDES},
  **{f"{side}_size": (0.15, 0.19) for side in _SIDES},
  **{f"{side}_rotation": (0, 2 * np.pi) for side in _SIDES},
  "light_direction": (0, 2 * np.pi),
  "light_strength": (0, 0.7),
}
# Names of each factor that is one of several.
_VALUES = {
  **{f"{side}_shape": shapes.SHAPES for side in _SIDES},
  **{f"{side}_texture": shapes.TEXTURES for side in _SIDES},
  "ground_pattern": PATTERNS,
}
_PERIOD = 0.25  # Of stripes and checks, as a fraction of the image's side.


def make(settings: ConfigDict, split: str) -> Source:
  """Returns `data.num_examples` scenes; a quarter as many for evaluation."""
  return drawn.make(
    settings,
    split,
    draw_factors=draw_factors,
    render=render,
    masks_of=masks_of,
    labels_of=_pair_of_shapes,
    name="scenes",
    num_classes=len(shapes.SHAPES) ** 2,
    label_names=tuple(
      f"{left}/{right}" for left in shapes.SHAPES for right in shapes.SHAPES
    ),
    factor_names=FACTORS,
    factor_values=_VALUES,
  )


def _pair_of_shapes(factors: np.ndarray) -> np.ndarray:
  left, right = (_column(factors, f"{side}_shape") for side in _SIDES)
  return left * len(shapes.SHAPES) + right


def draw_factors(num_examples: int, seed: int) -> np.ndarray:
  """Returns float32 [num_examples, len(FACTORS)], one row per image.

  Shapes, textures and patterns are class numbers, colors are in [0, 1], x, y
  and size are fractions of the image's side, angles are in radians. The light
  darkens by up to its strength.
  """
  keys = stateless.fold_in(stateless.key(seed), np.arange(num_examples))
  factors = stateless.uniform(keys, len(FACTORS))
  for number, name in enumerate(FACTORS):
    if name in _VALUES:
      factors[:, number] = np.floor(factors[:, number] * len(_VALUES[name]))
    elif name in _RANGES:
      least, most = _RANGES[name]
      factors[:, number] = least + (most - least) * factors[:, number]
  return factors


def render(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Draws uint8 [n, size, size, channels] from `factors` [n, len(FACTORS)]."""
  return shapes.in_chunks(_render_chunk, factors, size, channels)


def masks_of(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Draws both objects, white on black, without texture and light.

  Arguments and result are those of `render`: the same objects at the same
  places.
  """
  plain = factors.copy()
  for number, name in enumerate(FACTORS):
    if name.endswith("_texture"):
      plain[:, number] = shapes.TEXTURES.index("solid")
    elif "_color_" in name:
      plain[:, number] = 0 if name.startswith("ground") else 1
  plain[:, FACTORS.index("light_strength")] = 0
  return render(plain, size, channels)


def _render_chunk(factors: np.ndarray, size: int, channels: int) -> np.ndarray:
  places = (np.arange(size, dtype=np.float32) + 0.5) / size
  x, y = places[None, None, :], places[None, :, None]
  dark = _darkness(_column(factors, "ground_pattern"), x, y)[..., None]
  image = _color(factors, "ground", channels) * (1 - 0.5 * dark)
  for side in _SIDES:
    covered = shapes.coverage(
      *(
        _column(factors, f"{side}_{name}")
        for name in ("shape", "texture", "x", "y", "size", "rotation")
      ),
      side=size,
    )[..., None]
    image = covered * _color(factors, side, channels) + (1 - covered) * image
  angle, strength = (
    _column(factors, f"light_{name}")[:, None, None]
    for name in ("direction", "strength")
  )
  # From -1 where the light comes from to 1 on the other side.
  away = np.cos(angle) * (2 * x - 1) + np.sin(angle) * (2 * y - 1)
  shade = strength * (1 + away / np.sqrt(2)) / 2
  return np.round(image * (1 - shade[..., None]) * 255).astype(np.uint8)


def _darkness(pattern: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns [n, size, size], 1 where the ground has half of its brightness."""
  half = _PERIOD / 2
  across, down = (np.mod(place, _PERIOD) < half for place in (x, y))
  every = {
    "plain": np.zeros_like(x + y),
    "gradient": y + 0 * x,
    "stripes": down & np.ones_like(across),
    "checks": across ^ down,
  }
  drawn = np.concatenate([every[name] for name in PATTERNS])
  return drawn[pattern.astype(np.int32)].astype(np.float32)


def _color(factors: np.ndarray, of: str, channels: int) -> np.ndarray:
  columns = [FACTORS.index(f"{of}_{name}") for name in _COLOR]
  return shapes.as_channels(factors[:, columns], channels)


def _column(factors: np.ndarray, name: str) -> np.ndarray:
  return factors[:, FACTORS.index(name)]
