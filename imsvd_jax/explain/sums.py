"""Sums over a data set, on the devices, that keep their digits.

A float32 sum over a million images loses three to four digits. Every sum here
is a pair (total, error): the rounding error of each addition is computed
exactly (Knuth's two-sum) and carried along. Products of a batch are formed in
short chunks at the highest matmul precision for the same reason.

Functions whose name ends in "_of_devices" run inside `shard_map` over the mesh
axis of the data. The rows of matrices are spread over the devices, so that
nothing of size D^2 crosses the network or is held twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base.devices import AXIS
from imsvd_jax.explain.images import NO_IMAGE

# Rows of one matmul. Measured on CPU: a product over 256 rows errs by 1e-6
# relative in its worst cell, one over 64 rows by half of that.
CHUNK = 64


class Sums(NamedTuple):
  """A compensated sum; its value is total + error."""

  total: jax.Array
  error: jax.Array

  def value(self) -> np.ndarray:
    """Returns the sum as float64, on the host."""
    total = np.asarray(self.total, np.float64)
    return total + np.asarray(self.error, np.float64)


def zeros(*shape: int) -> Sums:
  """Returns an empty sum."""
  return Sums(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def padded_rows(rows: int, mesh: Mesh) -> int:
  """Returns the number of rows, rounded up to a multiple of the devices."""
  return rows + -rows % mesh.size


def zeros_of_rows(dimension: int, mesh: Mesh) -> Sums:
  """Returns an empty square matrix whose rows divide over the devices."""
  return zeros(padded_rows(dimension, mesh), dimension)


def add(sums: Sums, update: jax.Array) -> Sums:
  """Adds `update` and the exact rounding error of the addition."""
  total = sums.total + update
  back = total - sums.total
  error = (sums.total - (total - back)) + (update - back)
  return Sums(total, sums.error + error)


def add_product(sums: Sums, left: jax.Array, right: jax.Array) -> Sums:
  """Adds left^T right for [B, r] and [B, D], a few rows at a time."""
  batch = left.shape[0]
  pad = -batch % CHUNK
  left, right = (jnp.pad(x, ((0, pad), (0, 0))) for x in (left, right))
  chunks = (batch + pad) // CHUNK

  def body(sums: Sums, rows: tuple[jax.Array, jax.Array]) -> tuple[Sums, None]:
    return add(
      sums, jnp.matmul(rows[0].T, rows[1], precision=jax.lax.Precision.HIGHEST)
    ), None

  rows = tuple(x.reshape(chunks, CHUNK, -1) for x in (left, right))
  return jax.lax.scan(body, sums, rows)[0]


def add_rows_of_devices(sums: Sums, mask: jax.Array, rows: jax.Array) -> Sums:
  """Adds the sum over the images of all devices of [B, k], without padding."""
  masked = jnp.where(mask[:, None], rows, 0)
  return add(sums, jax.lax.psum(masked.sum(0), AXIS))


def add_product_of_devices(
  sums: Sums, left: jax.Array, right: jax.Array
) -> Sums:
  """Adds left^T right over the images of all devices to this device's rows."""
  left, right = (gather(x) for x in (left, right))
  return add_product(sums, own_columns(left, sums.total.shape[0]), right)


def gather(rows: jax.Array) -> jax.Array:
  """Returns the rows of all devices."""
  return jax.lax.all_gather(rows, AXIS, tiled=True)


def own_columns(gathered: jax.Array, count: int) -> jax.Array:
  """Returns this device's `count` columns of [B, D], padded with zeros."""
  total = count * jax.lax.axis_size(AXIS)
  padded = jnp.pad(gathered, ((0, 0), (0, total - gathered.shape[1])))
  start = jax.lax.axis_index(AXIS) * count
  return jax.lax.dynamic_slice_in_dim(padded, start, count, axis=1)


def merge_top(
  scores: jax.Array,
  indices: jax.Array,
  columns: jax.Array,
  column_indices: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merges a batch into lists of the n best: high score, then low index.

  Args:
    scores: [r, n] so far.
    indices: [r, n] so far.
    columns: [r, B] scores of the batch, -1 where masked.
    column_indices: [B] int32, ascending (top_k then breaks ties as we do).

  Returns:
    The new (scores, indices).
  """
  num_top = scores.shape[1]
  best, place = jax.lax.top_k(columns, min(num_top, columns.shape[1]))
  best_indices = jnp.where(best < 0, NO_IMAGE, column_indices[place])
  keys = (
    -jnp.concatenate([scores, best], 1),
    jnp.concatenate([indices, best_indices], 1),
  )
  negative, merged = jax.lax.sort(keys, dimension=1, num_keys=2)
  return -negative[:, :num_top], merged[:, :num_top]


def mean_matrix(sums: Sums, rows: int, count: int) -> np.ndarray:
  """Returns (total + error) / count as float32, one device's rows at a time."""
  result = np.empty((rows, sums.total.shape[1]), np.float32)
  errors = {s.index[0].start or 0: s for s in sums.error.addressable_shards}
  for shard in sums.total.addressable_shards:
    start = shard.index[0].start or 0
    value = np.asarray(shard.data, np.float64)
    value += np.asarray(errors[start].data)
    value /= count
    stop = min(start + len(value), rows)
    result[start:stop] = value[: max(stop - start, 0)]
  return result
