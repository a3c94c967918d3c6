"""Convolutions that equal `jax.lax.conv_general_dilated`, and are faster.

Which way is faster depends on shapes and platform; `convolve` takes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Convolution = Callable[[jax.Array, jax.Array], jax.Array]

# Bytes of windows that a CPU's core keeps at hand.
_BLOCK_BYTES = 4 << 20
# From here on XLA's own gradient is as fast as `_in_blocks`.
_MANY_FILTERS = 256
# Of `convolve_channels`: positions of a map, values of a batch of maps, and
# images whose gradients are summed at once.
_MOST_POSITIONS = 256
_LEAST_VALUES = 1 << 16
_IMAGES_AT_ONCE = 8


def convolve(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **rest: Any,
) -> jax.Array:
  """Equals `jax.lax.conv_general_dilated`.

  Args:
    x: [B, h, w, C].
    kernel: [k, k, C, F].
    strides: Of rows and columns.
    padding: Zeros before and behind, of rows and of columns.
    **rest: What else `jax.lax.conv_general_dilated` gets, such as the layout of
      the dimensions, which is the one above.

  Returns:
    [B, h', w', F].
  """
  _, height, width, _ = x.shape
  size = kernel.shape[0]
  plain: Convolution = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    **rest,
  )
  if size == 1:
    return plain(x, kernel)
  if height * width <= 4:
    return _one_product(x, kernel, strides, padding)
  # Where a batch is split over devices, each block would be exchanged.
  if jax.device_count() == 1 and kernel.shape[-1] < _MANY_FILTERS:
    plain = _with_kernel_gradient_in_blocks(plain, strides, padding)
  even = not (height % 2 or width % 2)
  if size == 7 and kernel.shape[2] <= 4 and even:
    return jax.lax.platform_dependent(
      x,
      kernel,
      cuda=functools.partial(_convolve_neighbors, **rest),
      default=plain,
    )
  return plain(x, kernel)


def _one_product(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> jax.Array:
  """A convolution of maps of up to 2x2 positions.

  There a 3x3 window covers all of them. One product of matrices has half the
  arithmetic, because it skips the padding, and takes a twelfth of the time on
  XLA's CPU backend (forward and backward, 512 maps of 96 channels).
  """
  _, height, width, _ = x.shape
  size = kernel.shape[0]
  starts = [
    range(-low, length + high - size + 1, stride)
    for length, (low, high), stride in zip(
      (height, width), padding, strides, strict=True
    )
  ]
  # The kernel as each output position sees it from the map's own positions.
  wide = jnp.pad(kernel, ((height,) * 2, (width,) * 2, (0, 0), (0, 0)))
  matrix = jnp.stack(
    [
      jnp.stack(
        [wide[height - i :, width - j :][:height, :width] for j in starts[1]],
        axis=3,
      )
      for i in starts[0]
    ],
    axis=3,
  )  # [h, w, C, h', w', F]
  return jnp.einsum("bhwc,hwcijf->bijf", x, matrix)


def _convolve_neighbors(
  x: jax.Array, kernel: jax.Array, **rest: Any
) -> jax.Array:
  """A 7x7 convolution at a stride of 2 with a border of 3, for GPUs.

  Three channels leave the units of matrix products nearly empty there. Here 2x2
  neighbors become channels, and the kernel one of 4x4 without stride. TPUs gain
  nothing.
  """
  x = jnp.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(batch, height // 2, width // 2, 4 * channels)
  kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0)))
  kernel = kernel.reshape(4, 2, 4, 2, channels, -1).transpose(0, 2, 1, 3, 4, 5)
  kernel = kernel.reshape(4, 4, 4 * channels, -1)
  return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", **rest)


def _with_kernel_gradient_in_blocks(
  plain: Convolution,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> Convolution:
  """Returns `plain` with another way to the kernel's gradient on CPUs."""
  convolution = jax.custom_vjp(plain)

  def backward(
    inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    x, kernel = inputs
    of_x = jax.vjp(lambda x: plain(x, kernel), x)[1](gradient)[0]
    of_kernel = jax.lax.platform_dependent(
      x,
      kernel,
      gradient,
      cpu=functools.partial(
        kernel_gradient_in_blocks, strides=strides, padding=padding
      ),
      default=lambda x, kernel, gradient: jax.vjp(
        lambda kernel: plain(x, kernel), kernel
      )[1](gradient)[0],
    )
    return of_x, of_kernel

  convolution.defvjp(
    lambda x, kernel: (plain(x, kernel), (x, kernel)), backward
  )
  return convolution


def kernel_gradient_in_blocks(
  x: jax.Array,
  kernel: jax.Array,
  gradient: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
) -> jax.Array:
  """Returns the gradient of a convolution by its kernel.

  XLA's CPU backend writes the windows of the whole batch to memory and back.
  Here a few images at a time stay in the cache: 1.9 to 3.5 times as fast with
  24 to 96 filters and 1,024 maps of 28 to 4 pixels, as fast with 256 filters,
  0.9 times with 16 filters and maps so small that one block holds them all.

  Args:
    x: [B, h, w, C].
    kernel: [k, k, C, F]; its values are not used.
    gradient: [B, h', w', F], by the convolution's output.
    strides: Of rows and columns.
    padding: Zeros before and behind, of rows and of columns.

  Returns:
    [k, k, C, F], summed in the type of x.
  """
  rows, columns, channels, filters = kernel.shape
  batch, out_rows, out_columns, _ = gradient.shape
  window = rows * columns * channels
  bytes_per_image = out_rows * out_columns * window * x.dtype.itemsize
  most = max(1, _BLOCK_BYTES // bytes_per_image)
  size = max(n for n in range(1, min(batch, most) + 1) if batch % n == 0)
  x_blocks, gradients = (
    a.reshape(size, batch // size, *a.shape[1:]) for a in (x, gradient)
  )

  def add(block: jax.Array, total: jax.Array) -> jax.Array:
    image, of_output = (
      jax.lax.dynamic_index_in_dim(a, block, axis=1, keepdims=False)
      for a in (x_blocks, gradients)
    )
    image = jnp.pad(image, ((0, 0), *padding, (0, 0)))
    windows = [
      image[
        :,
        i : i + strides[0] * (out_rows - 1) + 1 : strides[0],
        j : j + strides[1] * (out_columns - 1) + 1 : strides[1],
      ]
      for i in range(rows)
      for j in range(columns)
    ]
    of_input = jnp.concatenate(windows, axis=-1).reshape(-1, window)
    return total + of_input.T @ of_output.reshape(-1, filters)

  zero = jnp.zeros((window, filters), x.dtype)
  total = jax.lax.fori_loop(0, batch // size, add, zero)
  return total.reshape(kernel.shape)


def convolve_channels(
  x: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  **rest: Any,
) -> jax.Array:
  """Equals `jax.lax.conv_general_dilated` with a kernel for each channel.

  XLA's CPU backend takes such a convolution value by value. As a sum of shifted
  maps it is 13 to 70 times as fast (512 maps of 14 to 3 positions a side and 24
  to 96 channels), and its gradients 4 to 20 times.

  Args:
    x: [B, h, w, C].
    kernel: [k, k, 1, C] with an odd k.
    strides: 1 and 1.
    padding: (k - 1) / 2 zeros on each side.
    **rest: As of `convolve`.

  Returns:
    [B, h, w, C].
  """
  plain: Convolution = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    **rest,
  )
  positions = x.shape[1] * x.shape[2]
  # Less does not pay for the longer compilation, and large maps leave the
  # cache. Where a batch is split over devices, each block would be exchanged.
  if (
    positions > _MOST_POSITIONS
    or x.size < _LEAST_VALUES
    or jax.device_count() > 1
  ):
    return plain(x, kernel)
  return jax.lax.platform_dependent(
    x, kernel, cpu=_sum_of_shifts, default=plain
  )


@jax.custom_vjp
def _sum_of_shifts(x: jax.Array, kernel: jax.Array) -> jax.Array:
  size = kernel.shape[0]
  border = size // 2
  _, height, width, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (border,) * 2, (border,) * 2, (0, 0)))
  wide = jnp.promote_types(x.dtype, jnp.float32)
  kernel = kernel.astype(wide)
  total = jnp.zeros(x.shape, wide)
  for i in range(size):
    for j in range(size):
      # A shift by the whole map leaves its border only.
      if abs(i - border) < height and abs(j - border) < width:
        shifted = padded[:, i : i + height, j : j + width]
        total += shifted * kernel[i, j, 0]
  return total.astype(x.dtype)


def _gradients_of_shifts(
  inputs: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients by the maps and by the kernel."""
  x, kernel = inputs
  wide = jnp.promote_types(x.dtype, jnp.float32)
  of_x = _sum_of_shifts(gradient, kernel[::-1, ::-1])
  size, border = kernel.shape[0], kernel.shape[0] // 2
  batch, height, width, channels = x.shape
  # A few images at a time stay in the cache.
  few = max(n for n in range(1, _IMAGES_AT_ONCE + 1) if batch % n == 0)
  padded = jnp.pad(x, ((0, 0), (border,) * 2, (border,) * 2, (0, 0)))
  blocks = tuple(
    a.reshape(batch // few, few, *a.shape[1:])
    for a in (padded, gradient.astype(wide))
  )

  def add(
    total: jax.Array, block: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    image, of_output = block

    def row(i: jax.Array, total: jax.Array) -> jax.Array:
      rows = jax.lax.dynamic_slice_in_dim(image, i, height, axis=1)
      sums = [
        jnp.sum(
          rows[:, :, j : j + width] * of_output, axis=(0, 1, 2), dtype=wide
        )
        for j in range(size)
      ]
      return total.at[i].add(jnp.stack(sums)[:, jnp.newaxis])

    return jax.lax.fori_loop(0, size, row, total), None

  zero = jnp.zeros((size, size, 1, channels), wide)
  of_kernel, _ = jax.lax.scan(add, zero, blocks)
  return of_x, of_kernel.astype(kernel.dtype)


_sum_of_shifts.defvjp(
  lambda x, kernel: (_sum_of_shifts(x, kernel), (x, kernel)),
  _gradients_of_shifts,
)
