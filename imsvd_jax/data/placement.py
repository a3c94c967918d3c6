"""Where images in memory stay while a run trains: on the devices or the host.

On the devices every step takes its images from there: nothing but their numbers
and boxes travels. From the host the images of each batch travel, uncut. Both
give the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from imsvd_jax.base import agreement, console, devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import Source

# What "auto" may take of a device's memory; the rest is the network's.
SHARE = 0.25


def data_set(
  source: Source, placement: str, mesh: jax.sharding.Mesh
) -> jax.Array | None:
  """Puts all images on every device, or returns None: they stay on the host.

  Says what was chosen, and why.

  Args:
    source: Where images come from.
    placement: "auto", "device" or "host".
    mesh: The devices.

  Raises:
    UserError: They cannot be put there.
  """
  images = source.images
  if images is None:
    if placement == "device":
      raise UserError(
        f"data.placement is 'device', but {source.name} reads its images one"
        " by one; expected 'auto' or 'host', or images in memory, of one size."
      )
    return None
  size, room = images.nbytes, SHARE * _device_memory(mesh)
  fits = bool(np.all(agreement.of_everyone(np.bool_(size <= room))))
  on_devices = {"auto": fits, "device": True, "host": False}[placement]
  reason = "as data.placement says"
  if placement == "auto":
    than = "not more" if fits else "more"
    reason = f"{than} than {SHARE:.0%} of a device's memory, {_shown(room)}"
  where = "every device" if on_devices else "the host"
  console.say(f"Images stay on {where}: {_shown(size)}, {reason}.")
  return _on_every_device(images, mesh) if on_devices else None


def with_images(
  batches: Iterator[dict[str, Any]], images: np.ndarray
) -> Iterator[dict[str, Any]]:
  """Adds their images, uint8 [b, height, width, C], to batches of indices."""
  for batch in batches:
    yield batch | {"images": images[batch["index"]]}


def _on_every_device(images: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
  try:
    placed = jax.make_array_from_process_local_data(
      devices.replicated(mesh), np.asarray(images), images.shape
    )
    return jax.block_until_ready(placed)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"The images, {_shown(images.nbytes)}, do not fit a device's memory;"
      " use data.placement='host'."
    ) from error


def _device_memory(mesh: jax.sharding.Mesh) -> float:
  """Returns the bytes of a device; of CPUs, its part of the machine's."""
  device = mesh.local_devices[0]
  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit:
    return limit
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return memory / jax.local_device_count()


def _shown(num_bytes: float) -> str:
  return f"{num_bytes / 1e6:,.1f} MB"
