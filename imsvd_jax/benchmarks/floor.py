"""The matrix products of the entropy terms alone, which no kernel can avoid.

Value and gradient of the off-diagonal term take three products of 2 N D^2
FLOP: A'B, B G' and A G. Their time in the same run is the floor.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imsvd_jax.base.devices import AXIS

# Size of the part of a D x D matrix that is computed, and whose time is scaled
# up: the whole matrix does not fit for a wide embedding.
_MAX_BYTES = 2**29

P = jax.sharding.PartitionSpec


def products(
  num_images: int, num_entries: int, mesh: jax.sharding.Mesh, precision: str
) -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that runs the products, and the factor of its time.

  There are N images and D entries. Each device takes its share of the rows,
  without communication.
  """
  share = -(-num_entries // mesh.size)
  rows = max(1, min(share, _MAX_BYTES // (4 * num_entries)))
  shapes = {
    "a": ((num_images, rows * mesh.size), P(None, AXIS)),
    "b": ((num_images, num_entries), P()),
    "g": ((rows * mesh.size, num_entries), P(AXIS, None)),
  }
  a, b, g = (
    jax.device_put(
      jnp.full(shape, 0.5, jnp.float32), jax.sharding.NamedSharding(mesh, spec)
    )
    for shape, spec in shapes.values()
  )
  dot = functools.partial(
    jax.lax.dot_general, precision=precision, preferred_element_type=jnp.float32
  )

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=tuple(spec for _, spec in shapes.values()),
    out_specs=(P(AXIS, None), P(None, AXIS), P(AXIS, None)),
  )
  def three(a: jax.Array, b: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return (
      dot(a, b, (((0,), (0,)), ((), ()))),  # A'B: [rows, D]
      dot(b, g, (((1,), (1,)), ((), ()))),  # B G': [N, rows]
      dot(a, g, (((1,), (0,)), ((), ()))),  # A G: [N, D]
    )

  run = jax.jit(three)
  return lambda: run(a, b, g), share / rows
