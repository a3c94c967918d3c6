"""The mesh, and how host batches and state get onto it.

One program over all devices: the batch is split along the mesh axis "data",
the state is replicated or split too (`training.sharding`), and XLA inserts the
collectives.
"""

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imsvd_jax.base.errors import UserError

AXIS = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """Returns a 1-d mesh over all devices (or the given ones), axis "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),),
    (AXIS,),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a full copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of a batch: axis 0 split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def check_batch_size(batch_size: int, num_devices: int, name: str) -> None:
  """Raises UserError unless the batch divides evenly over the devices."""
  if batch_size % num_devices:
    low = batch_size // num_devices * num_devices
    near = f"{low} or {low + num_devices}" if low else f"{num_devices}"
    raise UserError(
      f"{name}={batch_size} does not divide over {num_devices} devices;"
      f" use a multiple of {num_devices}, such as {near}."
    )


def shard_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts this process's part of a batch on its devices.

  Args:
    batch: Tree of arrays [B / processes, ...].
    mesh: The mesh.

  Returns:
    Tree of global arrays [B, ...].
  """
  sharding = batch_sharded(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def pad_rows(rows: np.ndarray, count: int) -> np.ndarray:
  """Appends rows of zeros: [n, ...] to [count, ...]."""
  return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def whole(tree: Any) -> Any:
  """Returns the same arrays with a full copy on every device.

  With several processes, all must call it: it gathers what is split.
  """

  def gathered(x: jax.Array) -> jax.Array:
    if x.is_fully_replicated:
      return x
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))

  return jax.tree.map(gathered, tree)


def local_view(tree: Any, mesh: Mesh) -> Any:
  """Returns replicated global arrays as arrays of this process's devices.

  This process can then compute on them without the others.

  Args:
    tree: Tree of arrays, each a full copy on every device.
    mesh: Over this process's devices alone.

  Returns:
    The same tree; nothing is copied.
  """

  def local(x: jax.Array) -> jax.Array:
    if x.is_fully_addressable:
      return x
    copies = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(
      x.shape, replicated(mesh), copies
    )

  return jax.tree.map(local, tree)


def prefetch(
  batches: Iterable[Any], mesh: Mesh, size: int = 2
) -> Iterator[Any]:
  """Yields sharded batches, transferring `size` of them ahead.

  Transfers are asynchronous: the next batches travel while the devices compute
  on this one.
  """
  source = (shard_batch(batch, mesh) for batch in batches)
  queue = collections.deque(itertools.islice(source, size))
  while queue:
    yield queue.popleft()
    queue.extend(itertools.islice(source, 1))
