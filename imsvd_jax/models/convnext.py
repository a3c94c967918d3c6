"""ConvNeXts (Liu et al., 2022) that compute the same numbers as timm's.

Names follow timm's (`stages_0/blocks_0/conv_dw/kernel` here is
`stages.0.blocks.0.conv_dw.weight` there), so that a conversion is a renaming.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.models import layers
from imsvd_jax.models.convolution import convolve_channels

# The side of a patch, by the stem's name.
PATCHES = {"imagenet": 4, "cifar": 1, "small": 2}
LAYER_SCALE = 1e-6


class Block(nn.Module):
  """A 7x7 convolution per channel and an MLP, beside a shortcut."""

  layer_scale: float = LAYER_SCALE
  drop_path: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, h, w, C] to [B, h, w, C]."""
    width = x.shape[-1]
    y = nn.Conv(
      width,
      (7, 7),
      padding=((3, 3), (3, 3)),
      feature_group_count=width,
      dtype=self.dtype,
      kernel_init=layers.kernel_init,
      conv_general_dilated=convolve_channels,
      name="conv_dw",
    )(x)
    y = layers.layer_norm(self.dtype, "norm")(y)
    y = layers.Mlp(self.dtype, name="mlp")(y)
    init = nn.initializers.constant(self.layer_scale)
    gamma = self.param("gamma", init, (width,), jnp.float32)
    y = y * gamma.astype(self.dtype)
    return x + layers.drop_path(self, y, self.drop_path, train)


class _Stage(nn.Module):
  """A halving of the resolution, except in the first stage, and blocks."""

  width: int
  first: bool
  rates: tuple[float, ...]  # drop_path of each block.
  layer_scale: float
  dtype: Any
  remat: bool

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if not self.first:
      x = layers.layer_norm(self.dtype, "downsample_0")(x)
      x = layers.patches(self.width, 2, self.dtype, name="downsample_1")(x)
    # Argument 2 is `train`: self is 0 and x is 1.
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for i, rate in enumerate(self.rates):
      name = f"blocks_{i}"
      x = block(self.layer_scale, rate, self.dtype, name=name)(x, train)
    return x


class _Head(nn.Module):
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return layers.layer_norm(self.dtype, "norm")(x)


class ConvNeXt(nn.Module):
  """A ConvNeXt without classifier.

  Attributes:
    depths: Blocks of each stage; every stage but the first halves the
      resolution.
    widths: Channels of each stage.
    patch: Side of the stem's patches, in pixels.
    layer_scale: Start of the learned factor on each branch.
    drop_path: Share of images that skip the last block; less before it.
    dtype: Type that layers compute in; parameters are float32, and outputs
      float32 or wider.
    remat: Whether to recompute each block in the backward pass.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  patch: int = 4
  layer_scale: float = LAYER_SCALE
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  @property
  def num_features(self) -> int:
    """F, the size of the pooled features."""
    return self.widths[-1]

  def check_size(self, height: int, width: int) -> None:
    """Raises UserError for images of which nothing is left in the end."""
    least = self.patch * 2 ** (len(self.depths) - 1)
    if min(height, width) < least:
      raise UserError(
        f"Images of {height}x{width} pixels are too small: with patches of"
        f" {self.patch} this ConvNeXt needs {least}; lower model.patch_size."
      )

  def setup(self) -> None:
    """Creates stem, stages and the norm of the head under timm's names."""
    self.stem_0 = layers.patches(self.widths[0], self.patch, self.dtype)
    self.stem_1 = layers.layer_norm(self.dtype)
    rates = layers.drop_rates(self.drop_path, sum(self.depths))
    self.stages = [
      _Stage(
        width,
        i == 0,
        tuple(rates[sum(self.depths[:i]) :][:depth]),
        self.layer_scale,
        self.dtype,
        self.remat,
      )
      for i, (depth, width) in enumerate(
        zip(self.depths, self.widths, strict=True)
      )
    ]
    self.head = _Head(self.dtype)

  def _maps(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to the last stage's output [B, h, w, F]."""
    self.check_size(*images.shape[1:3])
    x = self.stem_1(self.stem_0(images))
    for stage in self.stages:
      x = stage(x, train)
    return x

  def _normed(self, x: jax.Array) -> jax.Array:
    return self.head(x).astype(jnp.promote_types(self.dtype, jnp.float32))

  def feature_maps(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to the last stage's output [B, h, w, F].

    Positions are normed one by one; the pooled features are not their mean.
    """
    return self._normed(self._maps(images, train))

  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to pooled features [B, F]."""
    return self.pooled(self._maps(images, train))

  def spatial(self, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, C] to maps [B, h, w, F] as they are pooled."""
    return self._maps(images, False)

  def pooled(self, maps: jax.Array) -> jax.Array:
    """Maps what `spatial` returns to the pooled features [B, F]."""
    return self._normed(jnp.mean(maps, axis=(1, 2)))


def convnext(
  *,
  depths: tuple[int, ...],
  widths: tuple[int, ...] = (96, 192, 384, 768),
  width_multiplier: float = 1.0,
  stem: str = "imagenet",
  patch_size: int = 0,
  layer_scale: float = 0.0,
  drop_path: float = 0.0,
  dtype: Any = jnp.float32,
  remat: bool = False,
  zero_init_residual: bool = True,
  kernel_init: str = "",
) -> ConvNeXt:
  """Returns a ConvNeXt; a `layer_scale` of 0 is the paper's.

  `zero_init_residual` and `kernel_init` do not apply.
  """
  del zero_init_residual, kernel_init
  first = max(1, round(widths[0] * width_multiplier))
  return ConvNeXt(
    depths,
    tuple(first * width // widths[0] for width in widths),
    layers.patch_size(patch_size, stem, PATCHES, "a ConvNeXt"),
    layer_scale or LAYER_SCALE,
    drop_path,
    dtype,
    remat,
  )
