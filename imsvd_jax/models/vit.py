"""Vision transformers that compute the same numbers as timm's.

Names follow timm's (`blocks_0/attn/qkv/kernel` here is
`blocks.0.attn.qkv.weight` there), so that a conversion is a renaming. Positions
are learned for the size of the first images, and interpolated for others.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.models import layers
from imsvd_jax.models.heads import torch_uniform

# The side of a patch, by the stem's name.
PATCHES = {"imagenet": 16, "cifar": 4, "small": 4}
POOLS = ("token", "mean")


class Attention(nn.Module):
  """Self-attention over tokens.

  Attributes:
    heads: How many.
    dtype: Type that it computes in; the softmax is float32 or wider.
  """

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps tokens [B, N, C] to [B, N, C].

    Sows "weights" [B, heads, N, N], of query and key, into "intermediates".
    """
    batch, length, width = x.shape
    qkv = layers.dense(3 * width, self.dtype, "qkv")(x)
    qkv = qkv.reshape(batch, length, 3, self.heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))  # [B, N, heads, d]
    logits = jnp.einsum("bnhd,bmhd->bhnm", q * q.shape[-1] ** -0.5, k)
    logits = logits.astype(jnp.promote_types(self.dtype, jnp.float32))
    weights = nn.softmax(logits)
    self.sow("intermediates", "weights", weights)
    weights = weights.astype(self.dtype)
    x = jnp.einsum("bhnm,bmhd->bnhd", weights, v).reshape(x.shape)
    return layers.dense(width, self.dtype, "proj")(x)


class LayerScale(nn.Module):
  """A learned factor per channel."""

  start: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., C] to [..., C]."""
    init = nn.initializers.constant(self.start)
    gamma = self.param("gamma", init, (x.shape[-1],), jnp.float32)
    return x * gamma.astype(self.dtype)


class Block(nn.Module):
  """Attention and an MLP, each behind a norm and beside a shortcut."""

  heads: int
  layer_scale: float = 0.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps tokens [B, N, C] to [B, N, C]."""
    parts: Sequence[nn.Module] = (
      Attention(self.heads, self.dtype, name="attn"),
      layers.Mlp(self.dtype, name="mlp"),
    )
    for i, part in enumerate(parts, start=1):
      y = part(layers.layer_norm(self.dtype, f"norm{i}")(x))
      if self.layer_scale:
        y = LayerScale(self.layer_scale, self.dtype, name=f"ls{i}")(y)
      x = x + layers.drop_path(self, y, self.drop_path, train)
    return x


class ViT(nn.Module):
  """A vision transformer without classifier.

  Attributes:
    depth: Blocks.
    heads: Of each block's attention.
    head_size: Channels of a head; C = heads * head_size.
    patch: Side of a patch, in pixels.
    pool: "token": the features are the class token's. "mean": of the patches,
      with the norm behind the mean.
    registers: Tokens beside the class token that have no output (Darcet et
      al., 2024). As in timm, the class token then has no position.
    layer_scale: Start of a learned factor on each branch; 0: none.
    drop_path: Share of images that skip the last block; less before it.
    dtype: Type that layers compute in; parameters are float32, and outputs
      float32 or wider.
    remat: Whether to recompute each block in the backward pass.

  Raises:
    UserError: Unknown pool, or numbers that no network has.
  """

  depth: int
  heads: int
  head_size: int = 64
  patch: int = 16
  pool: str = "token"
  registers: int = 0
  layer_scale: float = 0.0
  drop_path: float = 0.0
  dtype: Any = jnp.float32
  remat: bool = False

  def __post_init__(self) -> None:
    if self.pool not in POOLS:
      raise UserError(
        f"model.pool={self.pool!r}; expected {' or '.join(map(repr, POOLS))}."
      )
    super().__post_init__()

  @property
  def num_features(self) -> int:
    """F, the size of the pooled features."""
    return self.heads * self.head_size

  def check_size(self, height: int, width: int) -> None:
    """Raises UserError for images that do not divide into patches."""
    if height % self.patch or width % self.patch:
      raise UserError(
        f"Images of {height}x{width} pixels do not divide into patches of"
        f" {self.patch}x{self.patch}; choose the sizes of views and data.crop"
        " as multiples, or another model.patch_size."
      )

  def setup(self) -> None:
    """Creates blocks and the norm, which timm calls fc_norm after a mean."""
    # Argument 2 is `train`: self is 0 and x is 1.
    block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    self.blocks = [
      block(self.heads, self.layer_scale, rate, self.dtype)
      for rate in layers.drop_rates(self.drop_path, self.depth)
    ]
    norm = layers.layer_norm(self.dtype)
    if self.pool == "mean":
      self.fc_norm = norm
    else:
      self.norm = norm

  def _normed(self, x: jax.Array) -> jax.Array:
    x = (self.fc_norm if self.pool == "mean" else self.norm)(x)
    return x.astype(jnp.promote_types(self.dtype, jnp.float32))

  @nn.compact
  def _tokens(self, images: jax.Array) -> jax.Array:
    """Returns the class token, registers and patches before the first block."""
    x = self._embedded(images)  # [B, h, w, C]
    batch, height, width, channels = x.shape
    cls, positions = self._positions(height, width)
    x = x.reshape(batch, height * width, channels) + positions
    near_zero = nn.initializers.normal(1e-6)
    prefix = [cls]
    if self.registers:
      shape = (1, self.registers, channels)
      prefix.append(self.param("reg_token", near_zero, shape, jnp.float32))
    first = jnp.concatenate(prefix, axis=1).astype(x.dtype)
    first = jnp.broadcast_to(first, (batch, *first.shape[1:]))
    return jnp.concatenate([first, x], axis=1)

  def _patches(self, tokens: jax.Array, images: jax.Array) -> jax.Array:
    """Returns the tokens of the patches as a map [B, h, w, C]."""
    height, width = (side // self.patch for side in images.shape[1:3])
    return tokens[:, 1 + self.registers :].reshape(
      tokens.shape[0], height, width, self.num_features
    )

  def _embedded(self, images: jax.Array) -> jax.Array:
    """Maps images [B, H, W, 3] to patches [B, h, w, C]."""
    height, width, channels = images.shape[1:]
    self.check_size(height, width)
    init = torch_uniform(channels * self.patch**2)
    return _PatchEmbed(
      self.num_features, self.patch, init, self.dtype, name="patch_embed"
    )(images)

  def _positions(self, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Returns the class token [1, 1, C] and positions [1, h * w, C]."""
    channels = self.num_features
    if self.is_initializing():
      length = height * width + (0 if self.registers else 1)
    else:  # Of another size perhaps, or with a position for the class token.
      length = self.get_variable("params", "pos_embed").shape[1]
    cls = self.param(
      "cls_token", nn.initializers.normal(1e-6), (1, 1, channels), jnp.float32
    )
    table = self.param(
      "pos_embed", layers.kernel_init, (1, length, channels), jnp.float32
    )
    side, with_class = grid(length)
    if with_class:
      cls, table = cls + table[:, :1], table[:, 1:]
    if (side, side) != (height, width):
      table = _resized(table, height, width)
    return cls, table.astype(self.dtype)

  def feature_maps(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to the patches' outputs [B, h, w, F].

    They are normed one by one; the pooled features are not their mean.
    """
    x = self._tokens(images)
    for block in self.blocks:
      x = block(x, train)
    return self._normed(self._patches(x, images))

  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to pooled features [B, F]."""
    x = self._tokens(images)
    for block in self.blocks:
      x = block(x, train)
    return self._pooled(x)

  def _pooled(self, tokens: jax.Array) -> jax.Array:
    if self.pool == "mean":
      return self._normed(jnp.mean(tokens[:, 1 + self.registers :], axis=1))
    return self._normed(tokens[:, 0])

  def spatial(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns patches [B, h, w, C] and other tokens before the last block.

    Behind it the class token has read them, and they have no more influence.
    """
    x = self._tokens(images)
    for block in self.blocks[:-1]:
      x = block(x, False)
    return self._patches(x, images), x[:, : 1 + self.registers]

  def pooled(self, state: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Maps what `spatial` returns to the pooled features [B, F]."""
    maps, first = state
    x = maps.reshape(first.shape[0], -1, first.shape[2])
    x = self.blocks[-1](jnp.concatenate([first, x], axis=1), False)
    return self._pooled(x)


class _PatchEmbed(nn.Module):
  width: int
  size: int
  start: nn.initializers.Initializer
  dtype: Any

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    return layers.patches(
      self.width, self.size, self.dtype, self.start, self.start, "proj"
    )(images)


def grid(length: int) -> tuple[int, bool]:
  """Returns a table of positions' side, and whether the class token has one.

  Raises:
    UserError: The positions are not those of a square.
  """
  side = math.isqrt(length)
  if length < 1 or length - side**2 > 1:
    raise UserError(
      f"pos_embed has {length} positions; expected a square of patches, or one"
      " more for the class token."
    )
  return side, length > side**2


def _resized(table: jax.Array, height: int, width: int) -> jax.Array:
  """Interpolates the positions of a square [1, n * n, C] to [1, h * w, C]."""
  side, channels = math.isqrt(table.shape[1]), table.shape[2]
  return jax.image.resize(
    table.astype(jnp.float32).reshape(1, side, side, channels),
    (1, height, width, channels),
    method="cubic",
    antialias=True,
  ).reshape(1, height * width, channels)


def resized_positions(table: jax.Array, length: int) -> jax.Array:
  """Interpolates pos_embed [1, N, C] to [1, length, C], as for other images.

  A class token keeps its position, or gets one of 0.

  Raises:
    UserError: Either is not a square of patches, with or without a class.
  """
  (_, has_class), (side, wants_class) = grid(table.shape[1]), grid(length)
  if has_class and not wants_class:
    raise UserError(
      "The class token has a position there and none here (model.registers)."
    )
  if table.shape[1] == length:
    return table
  first = table[:, :1] if has_class else jnp.zeros_like(table[:, :1])
  rest = _resized(table[:, int(has_class) :], side, side)
  return jnp.concatenate([first, rest], axis=1) if wants_class else rest


def vit(
  *,
  depth: int,
  heads: int,
  head_size: int = 64,
  width_multiplier: float = 1.0,
  stem: str = "imagenet",
  patch_size: int = 0,
  pool: str = "token",
  registers: int = 0,
  layer_scale: float = 0.0,
  drop_path: float = 0.0,
  dtype: Any = jnp.float32,
  remat: bool = False,
  zero_init_residual: bool = True,
  kernel_init: str = "",
) -> ViT:
  """Returns a ViT; `width_multiplier` changes the number of heads.

  `zero_init_residual` and `kernel_init` do not apply.
  """
  del zero_init_residual, kernel_init
  return ViT(
    depth,
    max(1, round(heads * width_multiplier)),
    head_size,
    layers.patch_size(patch_size, stem, PATCHES, "a ViT"),
    pool,
    registers,
    layer_scale,
    drop_path,
    dtype,
    remat,
  )
