"""The best speed of a device: matrix products, and memory traffic."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (side of the square matrices, bytes of the array that is copied): large enough
# for a device's full speed, and on a CPU larger than its caches.
_SIZES = {"cpu": (2048, 2**28), "default": (8192, 2**30)}


def ceilings(
  device: jax.Device, dtype: Any
) -> dict[str, tuple[Callable[[], Any], float]]:
  """Returns work that reaches the best speed: (its start, its amount).

  "matmul" is a product of two matrices, exact for float32; its amount is FLOP.
  "memory" is a pass over an array, in and out; its amount is bytes.
  """
  side, size = _SIZES.get(device.platform, _SIZES["default"])
  matrix = jax.device_put(jnp.full((side, side), 0.5, dtype), device)
  array = jax.device_put(jnp.zeros(size // 4, jnp.float32), device)
  product = jax.jit(lambda x: jax.lax.dot(x, x, precision="highest"))
  copy = jax.jit(lambda x: x + 1)
  return {
    "matmul": (functools.partial(product, matrix), 2.0 * side**3),
    "memory": (functools.partial(copy, array), 2.0 * size),
  }
