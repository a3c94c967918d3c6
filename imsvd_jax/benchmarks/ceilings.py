"""The best speed of a device: matrix products, and memory traffic."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# (side of the square matrices, bytes of the array that is copied): large enough
# for a device's full speed, and on a CPU larger than its caches.
_SIZES = {"cpu": (2048, 2**28), "default": (8192, 2**30)}


class Ceiling(NamedTuple):
  """A kernel that reaches the best speed.

  Attributes:
    run: Starts it.
    amount: FLOP or bytes of one run.
  """

  run: Callable[[], Any]
  amount: float


def matmul(device: jax.Device, dtype: Any) -> Ceiling:
  """Returns a product of two matrices; FLOP.

  Args:
    device: Where.
    dtype: Of the matrices. Products of float32 are exact ones.
  """
  side, _ = _sizes(device)
  matrix = jax.device_put(jnp.full((side, side), 0.5, dtype), device)
  run = jax.jit(lambda x: jax.lax.dot(x, x, precision="highest"))
  return Ceiling(lambda: run(matrix), 2.0 * side**3)


def memory(device: jax.Device) -> Ceiling:
  """Returns a pass over an array, in and out; bytes."""
  _, size = _sizes(device)
  array = jax.device_put(jnp.zeros(size // 4, jnp.float32), device)
  run = jax.jit(lambda x: x + 1)
  return Ceiling(lambda: run(array), 2.0 * size)


def _sizes(device: jax.Device) -> tuple[int, int]:
  return _SIZES.get(device.platform, _SIZES["default"])
