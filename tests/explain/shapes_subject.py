"""Colored shapes whose factors are known, and a hand-made encoder for them.

Nothing is trained: the encoder computes moments of the foreground (how much,
where, which color, how round) and cuts each into bins, so that its variables
mean something and a test can say what.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.explain import probes
from imsvd_jax.explain.images import Images, TwoViews
from imsvd_jax.explain.subject import Encoding, Subject

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")


def factors_of(indices):
  """Shape, hue, radius and center of each image, from its index alone."""
  columns = []
  for salt in range(6):
    rng = np.random.default_rng(salt)
    table = rng.random(65_536)
    columns.append(table[(np.asarray(indices) * 40_503 + salt * 977) % 65_536])
  shape = (columns[0] * len(SHAPES)).astype(np.int32)
  return {
    "shape": shape,
    "hue": columns[1],
    "radius": 0.16 + 0.16 * columns[2],
    "x": 0.35 + 0.3 * columns[3],
    "y": 0.35 + 0.3 * columns[4],
    "light": columns[5],
  }


def render(indices, size=32):
  """uint8 [n, size, size, 3] and the factors."""
  factors = factors_of(indices)
  grid = (np.arange(size) + 0.5) / size
  column = lambda name: factors[name][:, None, None]
  x = (grid[None, None, :] - column("x")) / column("radius")
  y = (grid[None, :, None] - column("y")) / column("radius")
  distance = np.hypot(x, y)
  square = np.maximum(abs(x), abs(y))
  fields = np.stack(
    np.broadcast_arrays(
      1 - distance,
      0.85 - square,
      np.minimum(0.7 - y, 0.55 * y + 0.75 - abs(x) * 0.9),
      np.minimum(1 - square, 0.33 - np.minimum(abs(x), abs(y))),
      0.25 - abs(distance - 0.75),
      np.minimum(0.3 - abs(y), 1.1 - abs(x)),
    )
  )
  field = fields[factors["shape"], np.arange(len(x))]
  mask = np.clip(field * column("radius") * size + 0.5, 0, 1)[..., None]
  phase = factors["hue"][:, None] * 2 * np.pi
  phase = phase + np.array([0, 2, 4]) * np.pi / 3
  color = (0.55 + 0.4 * np.cos(phase))[:, None, None, :]
  shade = 0.25 + 0.5 * column("light") + 0.15 * (grid[None, :, None] - 0.5)
  ground = np.broadcast_to(shade, mask.shape[:3])[..., None]
  pixels = mask * color + (1 - mask) * ground
  return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8), factors


def batches(num_images, batch_size, *, size=32):
  """Batches as the evaluation pipeline gives them: padded and masked."""
  for first in range(0, num_images, batch_size):
    indices = np.arange(first, min(first + batch_size, num_images))
    images, factors = render(indices, size)
    pad = batch_size - len(indices)
    yield {
      "image": np.pad(images, ((0, pad), (0, 0), (0, 0), (0, 0))),
      "index": np.pad(indices, (0, pad)).astype(np.int32),
      "mask": np.pad(np.ones(len(indices), bool), (0, pad)),
      "label": np.pad(factors["shape"], (0, pad), constant_values=-1),
    }


def images_of(num_images, batch_size, *, size=32, **options):
  """The same batches as a data set, with two views of every image."""
  again = lambda: batches(num_images, batch_size, size=size)
  return Images(
    again, **{"views": two_views(again, probes.crop, probes.flip)} | options
  )


def two_views(batches_again, *functions):
  """Two views of whole images, each by a function of (keys, images)."""

  def crops():
    for batch in batches_again():
      views = np.stack([batch["image"]] * 2, axis=1)
      rest = {n: batch[n] for n in ("index", "mask") if n in batch}
      yield {"views": views, **rest}

  def augment(views, indices):
    keys = lambda number: probes.image_keys(jax.random.key(0), indices, number)
    return jnp.stack(
      [view(keys(k), views[:, k]) for k, view in enumerate(functions)]
    )

  return TwoViews(crops, augment)


def _maps(_, images):
  """[B, 8, 8, 12]: foreground and its moments, averaged over patches."""
  x = images.astype(jnp.float32) / 255
  height, width = x.shape[1:3]
  # In pairs: the gradient of `max` divides by how many entries equal it, and
  # where XLA computes x twice with other rounding that is none of them.
  red, green, blue = (x[..., k] for k in range(3))
  spread = jnp.maximum(jnp.maximum(red, green), blue)
  spread -= jnp.minimum(jnp.minimum(red, green), blue)
  mask = jax.nn.sigmoid((spread - 0.15) * 30)
  u = (jnp.arange(width) + 0.5) / width * jnp.ones((height, 1))
  v = u.T if height == width else (jnp.arange(height)[:, None] + 0.5) / height
  planes = [mask, mask * u, mask * v, mask * u * u, mask * v * v, mask * u * v]
  planes += [mask * x[..., k] for k in range(3)]
  planes += [mask * u**3, mask * v**3, (1 - mask) * x.mean(-1)]
  stacked = jnp.stack(planes, -1)
  patches = stacked.reshape(-1, 8, height // 8, 8, width // 8, len(planes))
  return patches.mean((2, 4))


def _moments(maps):
  """[B, 12] interpretable numbers of order one."""
  m = maps.mean((1, 2))
  area = m[:, 0] + 1e-4
  mean = m / area[:, None]
  var_x, var_y = mean[:, 3] - mean[:, 1] ** 2, mean[:, 4] - mean[:, 2] ** 2
  skew_y = (mean[:, 10] - 3 * mean[:, 2] * var_y - mean[:, 2] ** 3) * 2e3
  roundness = area / (jnp.sqrt(jnp.abs(var_x * var_y)) * 12 + 1e-4)
  return jnp.stack(
    [
      area * 8 - 0.8,
      (mean[:, 1] - 0.5) * 8,
      (mean[:, 2] - 0.5) * 8,
      jnp.log(jnp.abs(var_x) + 1e-5) - jnp.log(jnp.abs(var_y) + 1e-5),
      skew_y,
      (mean[:, 6] - 0.5 * (mean[:, 7] + mean[:, 8])) * 2,
      0.87 * (mean[:, 7] - mean[:, 8]) * 2,
      (roundness - 0.8) * 4,
      (m[:, 11] - 0.4) * 6,
    ],
    -1,
  )


@functools.cache
def make_subject(num_variables=8, num_bins=6, sharpness=12.0):
  """Each variable cuts one direction of the moments into soft bins."""
  rng = np.random.default_rng(7)
  direction = rng.normal(size=(9, num_variables)).astype(np.float32) * 0.25
  direction[np.arange(num_variables) % 9, np.arange(num_variables)] += 1
  offset = rng.normal(size=num_variables).astype(np.float32) * 0.1
  order = rng.permuted(np.tile(np.arange(num_bins), (num_variables, 1)), axis=1)
  centers = (np.linspace(-1.2, 1.2, num_bins)[order]).astype(np.float32)
  variables = {"direction": direction, "offset": offset, "centers": centers}

  def log_probabilities(variables, maps):
    moments = jnp.tanh(_moments(maps) * 0.7) * 1.4
    position = moments @ variables["direction"] + variables["offset"]
    gap = position[..., None] - variables["centers"]
    return jax.nn.log_softmax(-sharpness * num_bins / 4 * gap**2, -1)

  def encode(variables, images):
    maps = _maps(variables, images)
    return Encoding(_moments(maps), jnp.exp(log_probabilities(variables, maps)))

  def patch_codes(variables, images):
    maps = _maps(variables, images)
    alone = maps.reshape(-1, 1, 1, maps.shape[-1])
    bins = log_probabilities(variables, alone).argmax(-1)
    return bins.reshape(*maps.shape[:3], num_variables)

  return Subject(
    encode=encode,
    feature_maps=_maps,
    patch_codes=patch_codes,
    attention=lambda v, x: _maps(v, x)[..., 0],
    bin_log_probabilities=log_probabilities,
    variables=variables,
    name="Colored shapes",
    objective="IMSVD",
  )


def make_continuous_subject():
  """The same encoder without discrete code."""
  return dataclasses.replace(
    make_subject(),
    encode=lambda v, x: Encoding(_moments(_maps(v, x))),
    bin_log_probabilities=None,
    patch_codes=None,
    name="Colored shapes, continuous",
    objective="VICReg",
  )
