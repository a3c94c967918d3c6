"""Where images in memory stay while a run trains: on the devices or the host.

On the devices every step takes its images from there: nothing but their numbers
and boxes travels from the host. Every device has all images; or, where they are
too many, its part of them, and the devices send each other the images of each
batch. From the host the images of each batch travel, uncut. All of these give
the same numbers.
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
from imsvd_jax.data.squares import Squares

# What "auto" may take of a device's memory; the rest is the network's.
SHARE = 0.25


def data_set(
  source: Source, placement: str, mesh: jax.sharding.Mesh
) -> jax.Array | None:
  """Puts images on the devices, or returns None: they stay on the host.

  Every device gets all of them if they take no more than its `SHARE`, else a
  part. Says what was chosen, and why.

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
  fitting = np.array([size <= room, size <= room * mesh.size])
  whole_fits, part_fits = agreement.of_everyone(fitting).reshape(-1, 2).all(0)
  if placement == "host" or (placement == "auto" and not part_fits):
    where, sharding = "the host", None
  elif whole_fits or mesh.size == 1:
    where, sharding = "every device", devices.replicated(mesh)
  else:
    where = f"{mesh.size} devices, a part on each"
    sharding = devices.batch_sharded(mesh)
  needed = f"a device has room for {_shown(room)} of them"
  reason = "as data.placement says" if placement != "auto" else needed
  console.say(f"Images stay on {where}: {_shown(size)}, {reason}.")
  return None if sharding is None else _on_devices(images, sharding)


def with_images(
  batches: Iterator[dict[str, Any]], images: np.ndarray | Squares
) -> Iterator[dict[str, Any]]:
  """Adds their images, uint8 [b, height, width, C], to batches of indices."""
  for batch in batches:
    yield batch | {"images": images[batch["index"]]}


def _on_devices(
  images: np.ndarray | Squares, sharding: jax.sharding.NamedSharding
) -> jax.Array:
  """Places images; parts are filled up with black ones to equal sizes."""
  count, *rest = images.shape
  padded = count
  if not sharding.is_fully_replicated:
    padded += -count % sharding.mesh.size

  def part(where: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = where[0].indices(padded)
    rows = np.asarray(images[start:stop])
    # Padding copies, and all images may be a quarter of a device's memory.
    missing = stop - start - len(rows)
    return devices.pad_rows(rows, stop - start) if missing else rows

  try:
    return jax.block_until_ready(
      jax.make_array_from_callback((padded, *rest), sharding, part)
    )
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"The images, {_shown(images.nbytes)}, do not fit the devices' memory;"
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
