"""The off-diagonal entropy term without the D x D matrix.

With A = q1 and B = q2 as matrices [N, D], Pc = A'B / N, and

    S = sum over entries (r, c) of different variables of  Pc log Pc,

S is a sum over cells of Pc, so it streams: a tile holds some rows and columns
of Pc and is gone when its sums have been taken. The gradient is, with
G(r, c) = log Pc + 1 where r and c are of different variables and 0 elsewhere,

    dS/dA = B G' / N        dS/dB = A G / N

Three choices make this cost no more than the plain formula:

* **Gradients in the forward pass.** S is one number, so its cotangent is one
  number too: the tile that gives S gives dS/dA and dS/dB while it is there,
  and the backward pass only multiplies them. Three matrix products in all, as
  in the plain formula, where recomputing tiles in a backward pass takes four.
  What is kept in between is [N, D] twice, as much as A and B themselves.
* **Rows over devices.** Each device takes an equal share of the rows of Pc,
  for all N images: it needs its columns of A (an all-to-all) and the whole of
  B (an all-gather); the gradients travel the same ways back (an all-to-all and
  a reduce-scatter). [N, D] moves, never the matrix.
* **Centring.** Near the optimum log Pc is -2 log b everywhere, and the softmax
  before this kernel removes that level from the gradient again. So tiles hold
  log Pc + 2 log b, small numbers, and the level is added after the product in
  closed form. It is the same gradient, with rounding errors at least two times
  smaller at every precision of the products (docs/benchmarks.md).

The sum over devices is outside the custom gradient on purpose: its own
transpose is what each idiom (jit, shard_map with and without check_vma, pmap)
needs, and an all-gather that autodiff never sees cannot be counted twice.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from imsvd_jax.objectives.collectives import AxisName, global_rows, global_sum

Precision: TypeAlias = jax.lax.PrecisionLike
Gradients: TypeAlias = tuple[jax.Array, jax.Array]
# Where tiles start in a padded array, and their first positions among all D.
Tiles: TypeAlias = tuple[jax.Array, jax.Array]

# Longest side of a tile: where longer ones stopped being faster
# (docs/benchmarks.md). Several tiles live at once: Pc, its logarithm, G.
TILE_SIDES = {"cpu": 1024, "default": 4096}

# TPU: three bfloat16 passes, with gradients 3e-6 off where float32 is 5e-7 off
# (docs/benchmarks.md), at half the cost of "highest". On a GPU "high" would be
# TF32, with gradients 3e-4 off: a choice for the user.
PRECISIONS: dict[str, Precision] = {"tpu": "high", "default": "highest"}

# What a side is rounded up to where there is more than one tile: the lanes of a
# TPU's registers. On a CPU the padding would cost more than it gives.
SIDE_MULTIPLES = {"cpu": 1, "default": 128}


class Plan(NamedTuple):
  """How to compute."""

  # Mapped axis over which the batch is split, or None.
  axis_name: AxisName = None
  # Longest side of a tile; None: by shape and device.
  tile_side: int | None = None
  # Of the products, as in `jax.lax.dot_general`; None: by device.
  precision: Precision = None


def off_diagonal_streamed(
  q1: jax.Array,
  q2: jax.Array,
  axis_name: AxisName = None,
  *,
  tile_side: int | None = None,
  precision: Precision = None,
) -> jax.Array:
  """Returns 1/(M(M-1)) sum_{m1 != m2} sum_{d1,d2} Pc log Pc, in nats.

  Reverse-mode derivatives only, and first ones only; the plain formula has
  the others.

  Args:
    q1: Soft variables of the first view [n, M, b], float32 or float64.
    q2: Soft variables of the second view [n, M, b].
    axis_name: Mapped axis over which the batch is split, or None.
    tile_side: Longest side of a tile; None: by shape and device.
    precision: Of the matrix products, as in `jax.lax.dot_general`; None: by
      device, see PRECISIONS.
  """
  share = _share(Plan(axis_name, tile_side, precision), q1, q2)
  return global_sum(share, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _share(plan: Plan, q1: jax.Array, q2: jax.Array) -> jax.Array:
  """Returns this device's share of S / (M (M-1))."""
  rows, columns, first = _exchange(plan, q1, q2)
  run = functools.partial(_sum_tiles, num_bins=q1.shape[2])
  return _on_this_platform(run, plan, rows, columns, first) / _pairs(q1)


def _share_fwd(
  plan: Plan, q1: jax.Array, q2: jax.Array
) -> tuple[jax.Array, Gradients]:
  rows, columns, first = _exchange(plan, q1, q2)
  # Here and not in the backward pass, where it would cost a pass over [N, D].
  scale = 1 / (_pairs(q1) * global_rows(q1, plan.axis_name))
  run = functools.partial(
    _sum_tiles_with_gradients, num_bins=q1.shape[2], scale=scale
  )
  value, d_rows, d_columns = _on_this_platform(run, plan, rows, columns, first)
  gradients = _exchange_back(plan, q1, q2, d_rows, d_columns, scale)
  return value / _pairs(q1), gradients


def _share_bwd(
  plan: Plan, gradients: Gradients, cotangent: jax.Array
) -> Gradients:
  del plan
  return cotangent * gradients[0], cotangent * gradients[1]


_share.defvjp(_share_fwd, _share_bwd)


def _pairs(q: jax.Array) -> int:
  """Returns M (M-1), the ordered pairs of variables of q [n, M, b]."""
  num_variables = q.shape[1]
  return max(num_variables * (num_variables - 1), 1)


# --- Over devices -------------------------------------------------------------


def _exchange(
  plan: Plan, q1: jax.Array, q2: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gathers what this device's rows of Pc need.

  Returns:
    rows: All images' entries of q1 that this device is responsible for
      [N, D / devices], D padded with zeros where it does not divide.
    columns: All of q2 [N, D].
    first: Position of the first of this device's entries.
  """
  axis = plan.axis_name
  rows = q1.reshape(q1.shape[0], -1)
  columns = q2.reshape(q2.shape[0], -1)
  if axis is None:
    return rows, columns, jnp.zeros((), jnp.int32)
  rows = _pad_columns(rows, jax.lax.axis_size(axis))
  rows = jax.lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
  columns = jax.lax.all_gather(columns, axis, tiled=True)
  return rows, columns, jax.lax.axis_index(axis) * rows.shape[1]


def _exchange_back(
  plan: Plan,
  q1: jax.Array,
  q2: jax.Array,
  d_rows: jax.Array,
  d_columns: jax.Array,
  scale: float,
) -> Gradients:
  """Returns the gradients [n, M, b] of this device's images, and finishes them.

  Args:
    plan: As before.
    q1: Soft variables [n, M, b].
    q2: Soft variables [n, M, b].
    d_rows: scale * B (log Pc + 2 log b)' for this device's entries
      [N, D / devices].
    d_columns: scale * A (log Pc + 2 log b) from this device's entries [N, D].
    scale: 1 / (M (M-1) N).
  """
  axis, shape = plan.axis_name, q1.shape
  if axis is not None:
    d_rows = jax.lax.all_to_all(
      d_rows, axis, split_axis=0, concat_axis=1, tiled=True
    )
    d_columns = jax.lax.psum_scatter(d_columns, axis, tiled=True)
  d_rows = d_rows[:, : shape[1] * shape[2]].reshape(shape)
  # log Pc + 1 is 1 - 2 log b plus the centred.
  level = scale * (1 - 2 * math.log(shape[2]))
  return (
    d_rows + level * _mass_elsewhere(q2),
    d_columns.reshape(shape) + level * _mass_elsewhere(q1),
  )


def _mass_elsewhere(q: jax.Array) -> jax.Array:
  """Returns the sum of q [n, M, b] over all other variables [n, M, 1]."""
  mass = jnp.sum(q, axis=2, keepdims=True)
  return jnp.sum(mass, axis=1, keepdims=True) - mass


def _pad_columns(x: jax.Array, multiple: int) -> jax.Array:
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


# --- On one device ------------------------------------------------------------


def tile_side(length: int, platform: str) -> int:
  """Returns the side of the tiles that divide `length` entries evenly.

  Args:
    length: Rows of Pc on this device, or its columns.
    platform: "cpu", "gpu", "tpu", ...
  """
  most = TILE_SIDES.get(platform, TILE_SIDES["default"])
  if length <= most:
    return length
  side = -(-length // -(-length // most))  # Tiles of equal size.
  multiple = SIDE_MULTIPLES.get(platform, SIDE_MULTIPLES["default"])
  return -(-side // multiple) * multiple


def _on_this_platform(
  run: Callable[..., Any],
  plan: Plan,
  rows: jax.Array,
  columns: jax.Array,
  first: jax.Array,
) -> Any:
  """Calls `run` with the plan's tiles and precision, or the platform's.

  The platform is known when the program is lowered, which may be on another
  machine, and not while it is traced.
  """

  def on(platform: str) -> Callable[..., Any]:
    return functools.partial(
      run,
      sides=tuple(
        min(plan.tile_side or tile_side(x.shape[1], platform), x.shape[1])
        for x in (rows, columns)
      ),
      precision=plan.precision
      or PRECISIONS.get(platform, PRECISIONS["default"]),
    )

  return jax.lax.platform_dependent(
    rows, columns, first, cpu=on("cpu"), tpu=on("tpu"), default=on("default")
  )


def _sum_tiles(
  rows: jax.Array,
  columns: jax.Array,
  first: jax.Array,
  *,
  num_bins: int,
  sides: tuple[int, int],
  precision: Precision,
) -> jax.Array:
  """Returns S over the given rows of Pc."""
  rows, row_tiles = _tiles(rows, sides[0], first)
  columns, column_tiles = _tiles(columns, sides[1], 0)

  def row_step(_: tuple, at_row: Tiles) -> tuple[tuple, jax.Array]:
    block = _read(rows, at_row[0], sides[0])

    def column_step(_: tuple, at_column: Tiles) -> tuple[tuple, jax.Array]:
      other = _read(columns, at_column[0], sides[1])
      at = (at_row[1], at_column[1])
      value, _ = _tile(block, other, at, num_bins, precision)
      return (), value

    return (), jax.lax.scan(column_step, (), column_tiles)[1]

  return jnp.sum(jax.lax.scan(row_step, (), row_tiles)[1])


def _sum_tiles_with_gradients(
  rows: jax.Array,
  columns: jax.Array,
  first: jax.Array,
  *,
  num_bins: int,
  scale: float,
  sides: tuple[int, int],
  precision: Precision,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns S, and its scaled, centred gradients by rows and by columns."""
  widths = rows.shape[1], columns.shape[1]
  rows, row_tiles = _tiles(rows, sides[0], first)
  columns, column_tiles = _tiles(columns, sides[1], 0)

  def row_step(carry: Gradients, at_row: Tiles) -> tuple[Gradients, jax.Array]:
    d_rows, d_columns = carry
    block = _read(rows, at_row[0], sides[0])

    def column_step(
      carry: Gradients, at_column: Tiles
    ) -> tuple[Gradients, jax.Array]:
      d_block, d_columns = carry
      other = _read(columns, at_column[0], sides[1])
      at = (at_row[1], at_column[1])
      value, g = _tile(block, other, at, num_bins, precision)
      d_block += scale * _dot(other, g, 1, 1, precision)
      d_other = _read(d_columns, at_column[0], sides[1])
      d_other += scale * _dot(block, g, 1, 0, precision)
      d_columns = _write(d_columns, d_other, at_column[0])
      return (d_block, d_columns), value

    (d_block, d_columns), values = jax.lax.scan(
      column_step, (jnp.zeros_like(block), d_columns), column_tiles
    )
    return (_write(d_rows, d_block, at_row[0]), d_columns), values

  carry = (jnp.zeros_like(rows), jnp.zeros_like(columns))
  (d_rows, d_columns), values = jax.lax.scan(row_step, carry, row_tiles)
  return jnp.sum(values), d_rows[:, : widths[0]], d_columns[:, : widths[1]]


def _tiles(
  x: jax.Array, side: int, first: jax.Array | int
) -> tuple[jax.Array, Tiles]:
  """Pads x [N, entries] to whole tiles.

  Returns:
    x [N, tiles * side], and for each tile its start in x and the position of
    its first entry among all D.
  """
  x = _pad_columns(x, side)
  starts = jnp.arange(0, x.shape[1], side, dtype=jnp.int32)
  return x, (starts, first + starts)


def _read(x: jax.Array, start: jax.Array, side: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, start, side, axis=1)


def _write(x: jax.Array, tile: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(x, tile, start, axis=1)


def _tile(
  block: jax.Array,
  other: jax.Array,
  at: tuple[jax.Array, jax.Array],
  num_bins: int,
  precision: Precision,
) -> tuple[jax.Array, jax.Array]:
  """A tile of Pc: its part of S, and the centred slope.

  Args:
    block: Entries of q1 [N, R].
    other: Entries of q2 [N, C].
    at: Positions among the D entries of the first row and the first column.
    num_bins: b.
    precision: Of the product.

  Returns:
    sum Pc log Pc over different variables, a scalar, and
    dS/dPc - (1 - 2 log b) [R, C], 0 within a variable.
  """
  p = _dot(block, other, 0, 0, precision) / block.shape[0]  # [R, C]
  smallest = jnp.finfo(p.dtype).tiny
  log_p = jnp.log(jnp.maximum(p, smallest))
  row_variable, column_variable = (
    (start + jnp.arange(count, dtype=jnp.int32)) // num_bins
    for start, count in zip(at, p.shape, strict=True)
  )
  different = row_variable[:, None] != column_variable[None, :]
  # Rows first: a sum of partial sums keeps every digit.
  value = jnp.sum(jnp.sum(jnp.where(different, p * log_p, 0), axis=1))
  # As in `entropy`, an empty cell has the slope of the logarithm's floor.
  slope = jnp.where(p > smallest, log_p, log_p - 1) + 2 * math.log(num_bins)
  return value, jnp.where(different, slope, 0)


def _dot(
  x: jax.Array, y: jax.Array, x_axis: int, y_axis: int, precision: Precision
) -> jax.Array:
  """Contracts one axis of each matrix, accumulating in their own type."""
  return jax.lax.dot_general(
    x,
    y,
    (((x_axis,), (y_axis,)), ((), ())),
    precision=precision,
    preferred_element_type=x.dtype,
  )
