"""The matrix products of the entropy terms alone: what no kernel can avoid.

Value and gradient of the off-diagonal term take three products of 2 N D^2
FLOP: A'B, B G' and A G. Their time in the same run is the floor.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imsvd_jax.base import devices

# Rows of the D x D matrices that the floor computes, and then scales up: whole
# ones would not fit for a wide embedding.
_MOST_BYTES = 2**29

P = jax.sharding.PartitionSpec


def products(
  num_images: int,
  num_entries: int,
  mesh: jax.sharding.Mesh,
  precision: jax.lax.PrecisionLike,
) -> tuple[Callable[[], jax.Array], float]:
  """Returns a function that runs the products, and what to multiply it by.

  Args:
    num_images: N.
    num_entries: D.
    mesh: Each device takes its share of the rows, without communication.
    precision: Of the products.
  """
  share = -(-num_entries // mesh.size)
  rows = max(1, min(share, _MOST_BYTES // (4 * num_entries)))
  axis = devices.AXIS
  shapes = {
    "a": ((num_images, rows * mesh.size), P(None, axis)),
    "b": ((num_images, num_entries), P()),
    "g": ((rows * mesh.size, num_entries), P(axis, None)),
  }
  a, b, g = (
    jax.device_put(
      jnp.full(shape, 0.5, jnp.float32), jax.sharding.NamedSharding(mesh, spec)
    )
    for shape, spec in shapes.values()
  )
  dot = functools.partial(
    jax.lax.dot_general,
    precision=precision,
    preferred_element_type=jnp.float32,
  )

  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=tuple(spec for _, spec in shapes.values()),
    out_specs=(P(axis, None), P(None, axis), P(axis, None)),
  )
  def three(a, b, g):
    return (
      dot(a, b, (((0,), (0,)), ((), ()))),  # A'B: [rows, D]
      dot(b, g, (((1,), (1,)), ((), ()))),  # B G': [N, rows]
      dot(a, g, (((1,), (0,)), ((), ()))),  # A G: [N, D]
    )

  run = jax.jit(three)
  return lambda: run(a, b, g), share / rows
