"""The two entropy terms of the cross-joint matrix: IMSVD's and MUSIC's.

Two ways to the same numbers: the plain formula, which is the reference and the
faster one for small embeddings, and the streamed one
(joint_entropy_streamed.py), which needs no D x D matrix on any device.
"""

import functools
import math

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import lookup
from imsvd_jax.objectives.collectives import AxisName, batch_mean, global_rows
from imsvd_jax.objectives.joint_entropy_streamed import (
  Precision,
  off_diagonal_streamed,
)
from imsvd_jax.objectives.numerics import PRECISION, as_float32
from imsvd_jax.objectives.soft_variables import entropy, joint_probability

# Widest embedding for the plain formula. On one device the streamed kernel is
# as fast from here on and soon twice as fast (docs/benchmarks.md). On several,
# the plain formula adds up D x D numbers and the streamed kernel moves N x D
# twice, so up to D = N the plain one moves less, while its matrix is small.
PLAIN_ENTRIES_ONE_DEVICE = 128
PLAIN_ENTRIES_DEVICES = 1024

_PRECISIONS = {
  name: name
  for name in (
    *("default", "high", "highest"),
    *("bfloat16", "bfloat16_3x", "tensorfloat32", "float32"),
    *(preset.name for preset in jax.lax.DotAlgorithmPreset),
  )
} | {"auto": None}


def joint_entropy_terms(
  q1: jax.Array,
  q2: jax.Array,
  axis_name: AxisName = None,
  *,
  kernel: str = "auto",
  precision: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Returns the diagonal and off-diagonal terms of the cross-joint matrix Pc.

  diagonal     = 1/M        sum_m sum_d Pc(m,m;d,d) log Pc(m,m;d,d)
  off_diagonal = 1/(M(M-1)) sum_{m1 != m2} sum_{d1,d2} Pc log Pc

  With one variable there is no off-diagonal block and its term is 0.

  Under plain `jit` over a batch that is split over devices, call the jitted
  function in `with jax.set_mesh(mesh):` (or trace it under
  `jax.sharding.use_abstract_mesh`). The streamed kernel then divides its work
  over all Auto axes of that mesh; without it XLA moves D x D matrices.

  Args:
    q1: Soft variables of the first view [n, M, b].
    q2: Soft variables of the second view [n, M, b].
    axis_name: Mapped axis over which the batch is split, or None.
    kernel: "plain", "streamed" or "auto", see `choose_kernel`. The streamed
      one has first reverse-mode derivatives only.
    precision: Of the matrix products: a string that `jax.lax.dot_general`
      knows, such as "highest" or "TF32_TF32_F32". "auto": full float32, or
      what equals it in error (see PRECISIONS of the streamed kernel).

  Returns:
    diagonal: scalar in [-log b, 0], nats.
    off_diagonal: scalar in [-2 log b, 0], nats.
  """
  q1, q2 = as_float32(q1), as_float32(q2)
  same_bin = batch_mean(q1 * q2, axis_name)  # Pc(m,m;d,d) [M, b]
  diagonal = -jnp.mean(entropy(same_bin, axis=-1))
  passes = lookup(_PRECISIONS, precision, "precision")
  return diagonal, _off_diagonal(q1, q2, axis_name, kernel, passes)


def choose_kernel(num_images: int, num_entries: int, num_devices: int) -> str:
  """Returns the faster kernel, "plain" or "streamed".

  Args:
    num_images: N, the global batch.
    num_entries: D.
    num_devices: Devices that the batch is split over.
  """
  widest = PLAIN_ENTRIES_ONE_DEVICE
  if num_devices > 1:
    widest = min(PLAIN_ENTRIES_DEVICES, num_images)
  return "plain" if num_entries <= widest else "streamed"


def off_diagonal_plain(
  q1: jax.Array,
  q2: jax.Array,
  axis_name: AxisName = None,
  *,
  precision: Precision = None,
) -> jax.Array:
  """Returns 1/(M(M-1)) sum_{m1 != m2} sum_{d1,d2} Pc log Pc, as it reads.

  Args:
    q1: Soft variables of the first view [n, M, b].
    q2: Soft variables of the second view [n, M, b].
    axis_name: Mapped axis over which the batch is split, or None.
    precision: Of the matrix products; None: full float32.
  """
  num_variables = q1.shape[1]
  joint = joint_probability(
    q1, q2, axis_name=axis_name, precision=precision or PRECISION
  )  # [M, b, M, b]
  blocks = -entropy(joint, axis=(1, 3))  # [M, M]
  # Masking whole blocks, not subtracting their sum, keeps every digit.
  different = 1 - jnp.eye(num_variables, dtype=blocks.dtype)
  pairs = max(num_variables * (num_variables - 1), 1)
  return jnp.sum(blocks * different) / pairs


def _off_diagonal(
  q1: jax.Array,
  q2: jax.Array,
  axis_name: AxisName,
  kernel: str,
  precision: Precision,
) -> jax.Array:
  """Calls the kernel, under plain `jit` in a shard_map of its own."""
  num_images, num_variables, num_bins = q1.shape
  axes, num_devices = _batch_axes(num_images)
  if axis_name is not None:
    num_devices = global_rows(q1, axis_name) // num_images
    num_images *= num_devices
  choice = choose_kernel(num_images, num_variables * num_bins, num_devices)
  kernels = {"plain": off_diagonal_plain, "streamed": off_diagonal_streamed}
  function = lookup(
    kernels | {"auto": kernels[choice]}, kernel, "joint entropy kernel"
  )
  if axis_name is not None or not axes or function is off_diagonal_plain:
    return function(q1, q2, axis_name, precision=precision)
  rows = jax.sharding.PartitionSpec(axes)
  return jax.shard_map(
    functools.partial(function, axis_name=axes, precision=precision),
    in_specs=(rows, rows),
    out_specs=jax.sharding.PartitionSpec(),
  )(q1, q2)


def _batch_axes(num_images: int) -> tuple[tuple[str, ...], int]:
  """Axes of the mesh in context that a plain `jit` may split the batch over.

  Only Auto axes: there, splitting the work differently from the arrays is a
  matter of speed.

  Returns:
    Their names and the number of devices; ((), 1) where there is no mesh or
    the batch does not divide.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = jax.sharding.AxisType.Auto
  axes = tuple(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == auto
  )
  devices = math.prod(mesh.shape[name] for name in axes)
  if devices == 1 or num_images % devices:
    return (), 1
  return axes, devices
