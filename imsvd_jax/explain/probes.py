"""Single edits of images at a stated strength, and what they do to the codes.

Training mixes augmentations at random; to ask which one a variable answers
to, each is applied alone, and so are edits that training may not have. A probe
is (keys [B], images [B, H, W, C] in 0..255) -> pixels of the same shape and
range, float32.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices, pixels
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import interventions
from imsvd_jax.explain.images import Batches, padded_batches
from imsvd_jax.explain.interventions import Interventions
from imsvd_jax.explain.subject import Subject

Probe = Callable[[jax.Array, jax.Array], jax.Array]


def _float(images: jax.Array) -> jax.Array:
  return images.astype(jnp.float32)


def _of_planes(change: Callable[[jax.Array], jax.Array]) -> Probe:
  """Makes a probe of a function of planes [C, B, H, W] in [0, 1]."""

  def probe(keys: jax.Array, images: jax.Array) -> jax.Array:
    del keys
    planes = jnp.moveaxis(_float(images) / 255, -1, 0)
    return 255 * jnp.moveaxis(change(planes), 0, -1)

  return probe


def _constant(planes: jax.Array, value: float) -> jax.Array:
  """Returns `value` for each image of planes [C, B, H, W]."""
  return jnp.full(planes.shape[1], value, jnp.float32)


def _blur(planes: jax.Array) -> jax.Array:
  """Blurs with a sigma of 1/50 of the image's height."""
  sigma = planes.shape[2] / 50
  return pixels.gaussian_blur(
    planes,
    _constant(planes, sigma),
    radius=max(1, math.ceil(3 * sigma)),
    edges="edge",
  )


def flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Mirrors left and right."""
  return _float(images)[:, :, ::-1]


def crop(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Cuts a random part of half the area and resizes it back."""
  size = jnp.array(images.shape[1:3], jnp.float32)
  scale = jnp.sqrt(2.0)

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    start = jax.random.uniform(key, (2,)) * (1 - 1 / scale) * size
    return jax.image.scale_and_translate(
      image,
      image.shape,
      (0, 1),
      jnp.stack([scale, scale]),
      -start * scale,
      "linear",
    )

  return jax.vmap(one)(keys, _float(images))


def noise(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Adds Gaussian noise of standard deviation 16."""
  draw = lambda key: jax.random.normal(key, images.shape[1:])
  return jnp.clip(_float(images) + 16 * jax.vmap(draw)(keys), 0, 255)


def occlude(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Covers a random rectangle of half the sides with the image's mean color."""
  height, width = images.shape[1:3]
  rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    top, left = jax.random.uniform(key, (2,)) * jnp.array([height, width]) / 2
    is_covered = (rows >= top) & (rows < top + height / 2)
    is_covered &= (columns >= left) & (columns < left + width / 2)
    return jnp.where(is_covered[..., None], image.mean((0, 1)), image)

  return jax.vmap(one)(keys, _float(images))


def rotate(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Turns by 30 degrees, to the left or to the right; edges are repeated."""
  height, width = images.shape[1:3]
  y, x = jnp.meshgrid(
    jnp.arange(height) - (height - 1) / 2,
    jnp.arange(width) - (width - 1) / 2,
    indexing="ij",
  )

  def one(key: jax.Array, image: jax.Array) -> jax.Array:
    angle = jnp.where(jax.random.bernoulli(key), 1, -1) * math.pi / 6
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    places = [
      cos * y + sin * x + (height - 1) / 2,
      cos * x - sin * y + (width - 1) / 2,
    ]
    turn = lambda plane: jax.scipy.ndimage.map_coordinates(
      plane, places, order=1, mode="nearest"
    )
    return jax.vmap(turn, in_axes=-1, out_axes=-1)(image)

  return jax.vmap(one)(keys, _float(images))


PROBES: dict[str, Probe] = {
  "mirror": flip,
  "crop 50%": crop,
  "rotate 30°": rotate,
  "occlude 25%": occlude,
  "darker": _of_planes(
    lambda x: pixels.adjust_brightness(x, _constant(x, 0.6))
  ),
  "brighter": _of_planes(
    lambda x: pixels.adjust_brightness(x, _constant(x, 1.4))
  ),
  "low contrast": _of_planes(
    lambda x: pixels.adjust_contrast(x, _constant(x, 0.6))
  ),
  "grayscale": _of_planes(pixels.grayscale),
  # Red to green to blue to red: another hue, the same shapes.
  "channel roll": lambda keys, images: jnp.roll(_float(images), 1, axis=-1),
  "invert": lambda keys, images: 255 - _float(images),
  "solarize": _of_planes(lambda x: pixels.adjust_solarize(x, 127.5 / 255)),
  "blur": _of_planes(_blur),
  "noise": noise,
}

# They change nothing of gray images, and are left out there.
_OF_COLORS = ("grayscale", "channel roll")


def measure(
  subject: Subject,
  batches: Batches,
  *,
  mesh: Mesh,
  probes: Mapping[str, Probe] | None = None,
  key: jax.Array | None = None,
  num_images: int | None = None,
  report: Callable[[str], None] = console.print_line,
) -> Interventions:
  """Measures which variables change their most probable bin by each edit alone.

  Args:
    batches: As in `images.Images`; all of their images count. To look at fewer,
      give some from everywhere in the data set, which may be sorted by class.
    probes: Edits by name; by default `PROBES`.
    key: Random key; an image's draw depends on the key and its index.
    num_images: For the time left.

  Raises:
    UserError: There are no images, or no discrete code.
  """
  probes = PROBES if probes is None else probes
  key = jax.random.key(0) if key is None else key
  changed = _compile_changes(subject, probes)
  variables = jax.device_put(subject.variables, devices.replicated(mesh))
  meter = console.Progress("single edits", num_images, report=report)
  flips, channels = [], 0
  for batch in padded_batches(batches, mesh.size):
    index = batch["index"].astype(np.int32)
    arrays = (batch["image"], index)
    channels = arrays[0].shape[-1]
    placed = jax.device_put(arrays, devices.batch_sharded(mesh))
    flips.append(np.asarray(changed(variables, key, *placed))[:, batch["mask"]])
    meter.add(int(batch["mask"].sum()))
  if not meter.done:
    raise UserError("Found no images to edit. Give at least one image.")
  meter.finish()
  by_edit = dict(zip(probes, np.concatenate(flips, axis=1), strict=True))
  left_out = _OF_COLORS if channels == 1 else ()
  return interventions.judge(
    {name: flip for name, flip in by_edit.items() if name not in left_out}
  )


def _compile_changes(
  subject: Subject, probes: Mapping[str, Probe]
) -> Callable[..., jax.Array]:
  """Compiles (variables, key, images, indices) -> [A, B, M], what flips."""

  def codes(variables: Any, images: jax.Array) -> jax.Array:
    q = subject.encode(variables, images).probabilities
    if q is None:
      raise UserError("Edits need a discrete code; this encoder has none.")
    return jnp.argmax(q, -1)  # [B, M]

  def changed(
    variables: Any, key: jax.Array, images: jax.Array, indices: jax.Array
  ) -> jax.Array:
    # float32 for the clean images too: the encoder then runs the same
    # program on both, and the identity changes nothing.
    clean = codes(variables, _float(images))
    return jnp.stack(
      [
        codes(variables, probe(image_keys(key, indices, number), images))
        != clean
        for number, probe in enumerate(probes.values())
      ]
    )

  return jax.jit(changed)


def image_keys(key: jax.Array, indices: jax.Array, number: int) -> jax.Array:
  """Returns one key per image: of the key, the index and the probe's number."""
  fold = lambda i: jax.random.fold_in(jax.random.fold_in(key, i), number)
  return jax.vmap(fold)(indices)
