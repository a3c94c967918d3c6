"""A batch in micro-batches that one device can hold.

Micro-batch k of K holds the images k, k + K, k + 2 K, ...: each device takes
its part of every micro-batch from the images that it has, and nothing travels.
"""

from typing import Any

import jax

from imsvd_jax.base.errors import UserError


def check(batch_size: int, count: int, num_devices: int) -> None:
  """Raises UserError unless a batch divides into micro-batches on devices."""
  unit = count * num_devices
  if count > 1 and (batch_size % unit or batch_size < 2 * count):
    unit = max(unit, 2 * count)  # BatchNorm needs two images.
    near = max(unit, batch_size // unit * unit)
    raise UserError(
      f"batch_size={batch_size} does not divide into accumulate_steps={count}"
      f" micro-batches of two images or more over {num_devices} device(s); use"
      f" a multiple of {unit}, such as {near}."
    )


def take(batch: dict[str, Any], number: jax.Array, count: int) -> Any:
  """Returns one of `count` micro-batches; a "data_set" stays whole."""
  return {
    name: value
    if name == "data_set"
    else jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(
        _columns(x, count), number, axis=1, keepdims=False
      ),
      value,
    )
    for name, value in batch.items()
  }


def split(rows: jax.Array, count: int) -> jax.Array:
  """Returns all micro-batches [count, B / count, ...] of rows [B, ...]."""
  return _columns(rows, count).swapaxes(0, 1)


def join(parts: jax.Array) -> jax.Array:
  """Returns the rows [B, ...] that `split` has divided."""
  return parts.swapaxes(0, 1).reshape(-1, *parts.shape[2:])


def _columns(rows: jax.Array, count: int) -> jax.Array:
  return rows.reshape(-1, count, *rows.shape[1:])
