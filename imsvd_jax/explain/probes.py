"""Single augmentations at a stated strength, and what they do to the codes.

Training mixes augmentations at random; to ask which one a variable answers
to, each is applied alone. A probe is (keys [B], images [B, H, W, C] in
0..255) -> pixels of the same shape and range, float32.
"""

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, analysis
from imsvd_jax.explain.subject import Subject

Probe = Callable[[jax.Array, jax.Array], jax.Array]
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _luma(images):
  if images.shape[-1] != 3:
    return images.mean(-1, keepdims=True)
  return (images * LUMA).sum(-1, keepdims=True)


def _float(images):
  return images.astype(jnp.float32)


def _blend(images, other, strength):
  return jnp.clip(other + strength * (images - other), 0, 255)


def identity(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Nothing; its flip rate must be zero."""
  return _float(images)


def flip(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Left-right mirror."""
  return _float(images)[:, :, ::-1]


def crop(keys: jax.Array, images: jax.Array) -> jax.Array:
  """A random square of half the area, resized back."""
  size = jnp.array(images.shape[1:3], jnp.float32)
  scale = jnp.sqrt(2.0)

  def one(key, image):
    start = jax.random.uniform(key, (2,)) * (1 - 1 / scale) * size
    return jax.image.scale_and_translate(
      image,
      image.shape,
      (0, 1),
      jnp.stack([scale, scale]),
      -start * scale,
      method="linear",
    )

  return jax.vmap(one)(keys, _float(images))


def darken(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Brightness x 0.6."""
  return _float(images) * 0.6


def brighten(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Brightness x 1.4."""
  return jnp.clip(_float(images) * 1.4, 0, 255)


def low_contrast(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Contrast x 0.6 about the mean luminance."""
  images = _float(images)
  mean = _luma(images).mean((1, 2, 3), keepdims=True)
  return _blend(images, mean, 0.6)


def grayscale(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Luminance in every channel."""
  images = _float(images)
  return jnp.broadcast_to(_luma(images), images.shape)


def channels(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Red to green to blue to red: another hue, the same shapes."""
  return jnp.roll(_float(images), 1, axis=-1)


def invert(keys: jax.Array, images: jax.Array) -> jax.Array:
  """255 - x."""
  return 255 - _float(images)


def solarize(keys: jax.Array, images: jax.Array) -> jax.Array:
  """255 - x where x >= 128."""
  images = _float(images)
  return jnp.where(images >= 128, 255 - images, images)


def blur(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Gaussian blur whose sigma is 1/50 of the image's height."""
  images = _float(images)
  sigma = images.shape[1] / 50
  radius = max(1, int(np.ceil(3 * sigma)))
  taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
  taps = (taps / taps.sum()).astype(np.float32)
  for axis in (1, 2):
    pad = [(0, 0)] * 4
    pad[axis] = (radius, radius)
    padded = jnp.pad(images, pad, mode="edge")
    images = sum(
      weight
      * jax.lax.slice_in_dim(padded, i, i + images.shape[axis], axis=axis)
      for i, weight in enumerate(taps)
    )
  return images


def noise(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Gaussian noise of standard deviation 16."""
  draw = lambda key: jax.random.normal(key, images.shape[1:])
  return jnp.clip(_float(images) + 16 * jax.vmap(draw)(keys), 0, 255)


PROBES: dict[str, Probe] = {
  "mirror": flip,
  "crop 50%": crop,
  "darker": darken,
  "brighter": brighten,
  "low contrast": low_contrast,
  "grayscale": grayscale,
  "channel roll": channels,
  "invert": invert,
  "solarize": solarize,
  "blur": blur,
  "noise": noise,
}


def flip_rates(
  subject: Subject,
  batches: Iterable[Mapping[str, np.ndarray]],
  *,
  probes: Mapping[str, Probe] | None = None,
  key: jax.Array | None = None,
  num_images: int | None = None,
  mesh: Mesh | None = None,
  progress: Callable[[str], None] | None = None,
) -> dict[str, np.ndarray]:
  """How often the most probable bin changes under each augmentation alone.

  Args:
    subject: The functions of images.
    batches: As for `analyse`; all of their images count. To look at fewer,
      give some from everywhere in the data set: it may be sorted by class.
    probes: Augmentations by name; by default `PROBES`.
    key: Random key; an image's draw depends on the key and its index.
    num_images: For the time left.
    mesh: Devices, along axis "data".
    progress: Called with a line of text every few seconds.

  Returns:
    By name, [M] float64: the share of images whose bin changed.
  """
  probes = dict(PROBES if probes is None else probes)
  mesh = accumulate.data_mesh() if mesh is None else mesh
  key = jax.random.key(0) if key is None else key
  changed = _compile_changes(subject, probes)
  sharding = NamedSharding(mesh, P(accumulate.AXIS))
  variables = jax.device_put(subject.variables, NamedSharding(mesh, P()))
  meter = analysis.Progress("augmentations", num_images, progress)
  total = None
  for batch in analysis.padded_batches(batches, mesh.size):
    index = batch["index"].astype(np.int32)
    data = jax.device_put((batch["image"], index, batch["mask"]), sharding)
    counts = np.asarray(changed(variables, key, *data), np.int64)
    total = counts if total is None else total + counts
    meter.update(int(batch["mask"].sum()))
  if not meter.done:
    raise UserError("Found no images to augment. Give at least one image.")
  meter.finish()
  rates = total / meter.done
  return dict(zip(probes, rates, strict=True))


def _compile_changes(subject, probes):
  """(variables, key, images, indices, mask) -> [A, M] int32 changed images."""

  def codes(variables, images):
    q = subject.encode(variables, images).probabilities
    if q is None:
      raise UserError("Flip rates need a discrete code; this encoder has none.")
    return jnp.argmax(q, -1)  # [B, M]

  def changed(variables, key, images, indices, mask):
    # float32 for the clean images too: the encoder then runs the same
    # program on both, and the identity changes nothing.
    clean = codes(variables, _float(images))
    counts = []
    for number, probe in enumerate(probes.values()):
      keys = accumulate.view_keys(key, indices, number)
      moved = codes(variables, probe(keys, images)) != clean
      counts.append((moved & mask[:, None]).sum(0, dtype=jnp.int32))
    return jnp.stack(counts)

  return jax.jit(changed)
