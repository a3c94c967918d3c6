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


def _brightness(planes: jax.Array, factor: float) -> jax.Array:
  return pixels.adjust_brightness(planes, _constant(planes, factor))


def _contrast(planes: jax.Array) -> jax.Array:
  return pixels.adjust_contrast(planes, _constant(planes, 0.6))


def _solarize(planes: jax.Array) -> jax.Array:
  return pixels.adjust_solarize(planes, 127.5 / 255)


def _blur(planes: jax.Array) -> jax.Array:
  """Blurs with a sigma of 1/50 of the image's height."""
  sigma = planes.shape[2] / 50
  return pixels.gaussian_blur(
    planes,
    _constant(planes, sigma),
    radius=max(1, math.ceil(3 * sigma)),
    edges="edge",
  )


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


def roll_channels(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Red to green to blue to red: another hue, the same shapes."""
  return jnp.roll(_float(images), 1, axis=-1)


def invert(keys: jax.Array, images: jax.Array) -> jax.Array:
  """255 - x."""
  return 255 - _float(images)


def noise(keys: jax.Array, images: jax.Array) -> jax.Array:
  """Gaussian noise of standard deviation 16."""
  draw = lambda key: jax.random.normal(key, images.shape[1:])
  return jnp.clip(_float(images) + 16 * jax.vmap(draw)(keys), 0, 255)


darken = _of_planes(functools.partial(_brightness, factor=0.6))
blur = _of_planes(_blur)

PROBES: dict[str, Probe] = {
  "mirror": flip,
  "crop 50%": crop,
  "darker": darken,
  "brighter": _of_planes(functools.partial(_brightness, factor=1.4)),
  "low contrast": _of_planes(_contrast),
  "grayscale": _of_planes(pixels.grayscale),
  "channel roll": roll_channels,
  "invert": invert,
  "solarize": _of_planes(_solarize),
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
