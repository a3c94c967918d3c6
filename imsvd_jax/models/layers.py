"""Layers that ViT and ConvNeXt share, with timm's names and constants."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError

# timm's, for everything but biases and norms.
kernel_init = nn.initializers.normal(0.02)
DROP_PATH = "drop_path"  # The stream of random keys of stochastic depth.


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
  """Layer norm over channels, with timm's epsilon; statistics are float32."""
  return nn.LayerNorm(
    epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name
  )


def dense(width: int, dtype: Any, name: str) -> nn.Dense:
  """A linear layer that starts as timm's."""
  return nn.Dense(width, dtype=dtype, kernel_init=kernel_init, name=name)


def patches(
  width: int,
  size: int,
  dtype: Any,
  init: nn.initializers.Initializer = kernel_init,
  bias_init: nn.initializers.Initializer = nn.initializers.zeros,
  name: str | None = None,
) -> nn.Conv:
  """A convolution of patches that do not overlap, each [size, size]."""
  return nn.Conv(
    width,
    (size, size),
    strides=(size, size),
    padding="VALID",
    dtype=dtype,
    kernel_init=init,
    bias_init=bias_init,
    name=name,
  )


class Mlp(nn.Module):
  """Linear to four times the width, GELU, and back."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., C] to [..., C]."""
    width = x.shape[-1]
    x = nn.gelu(dense(4 * width, self.dtype, "fc1")(x), approximate=False)
    return dense(width, self.dtype, "fc2")(x)


def drop_path(
  module: nn.Module, x: jax.Array, rate: float, train: bool
) -> jax.Array:
  """Stochastic depth: zeroes x [B, ...] of a share of images, scales the rest.

  Off without a stream of random keys, as in a target network.
  """
  if not (train and rate and module.has_rng(DROP_PATH)):
    return x
  shape = (x.shape[0],) + (1,) * (x.ndim - 1)
  keep = jax.random.bernoulli(module.make_rng(DROP_PATH), 1 - rate, shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def drop_rates(last: float, depth: int) -> list[float]:
  """Returns the rate of each block, from 0 linearly to `last`."""
  return [last * i / max(depth - 1, 1) for i in range(depth)]


def patch_size(
  given: int, stem: str, sizes: dict[str, int], backbone: str
) -> int:
  """Returns the side of a patch: `given`, or where that is 0 the stem's.

  Raises:
    UserError: The stem is not known, or the size is not a size.
  """
  if stem not in sizes:
    raise UserError(
      f"model.stem={stem!r}; expected one of {', '.join(sizes)} for"
      f" {backbone}, or model.patch_size."
    )
  if not isinstance(given, int) or given < 0:
    raise UserError(
      f"model.patch_size={given!r}; expected a number of pixels, or 0 for the"
      " stem's."
    )
  return given or sizes[stem]
