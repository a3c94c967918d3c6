"""Backbones and heads; the only Flax Linen modules of the package.

A new backbone is one file and one line in BACKBONES.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.models.convnext import ConvNeXt, convnext
from imsvd_jax.models.heads import Projector
from imsvd_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from imsvd_jax.models.vit import ViT, vit

__all__ = [
  "BACKBONES",
  "OPTIONS",
  "Encoder",
  "Projector",
  "attention_maps",
  "check_size",
  "make_backbone",
]

# Arguments that some backbones have beside the common ones.
OPTIONS = (
  "patch_size",
  "pool",
  "pool_grid",
  "registers",
  "layer_scale",
  "drop_path",
)

# name: f(width_multiplier, stem, dtype, remat, zero_init_residual,
# kernel_init), see ResNet, and options of its own such as patch_size.
# resnet8 has three stages: a small image has nothing left to halve after them.
# The micro ones are for small images too, and nobody's standard.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
  "resnet8": partial(ResNet, BasicBlock, (1, 1, 1)),
  "resnet10": partial(ResNet, BasicBlock, (1, 1, 1, 1)),
  "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2)),
  "resnet34": partial(ResNet, BasicBlock, (3, 4, 6, 3)),
  "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3)),
  "resnet101": partial(ResNet, Bottleneck, (3, 4, 23, 3)),
  "resnet152": partial(ResNet, Bottleneck, (3, 8, 36, 3)),
  "vit_micro": partial(vit, depth=4, heads=3, head_size=32),
  "vit_tiny": partial(vit, depth=12, heads=3),
  "vit_small": partial(vit, depth=12, heads=6),
  "vit_base": partial(vit, depth=12, heads=12),
  "vit_large": partial(vit, depth=24, heads=16),
  "convnext_micro": partial(convnext, depths=(1, 1, 1, 1)),
  "convnext_tiny": partial(convnext, depths=(3, 3, 9, 3)),
  "convnext_small": partial(convnext, depths=(3, 3, 27, 3)),
  "convnext_base": partial(
    convnext, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)
  ),
}


def make_backbone(
  name: str, options: Mapping[str, Any], **common: Any
) -> nn.Module:
  """Returns a backbone.

  Args:
    name: A key of BACKBONES.
    options: Arguments of this backbone, of OPTIONS.
    **common: Arguments that every backbone has.

  Raises:
    UserError: It is not known, or does not have an option.
  """
  make = lookup(BACKBONES, name, "backbone")
  unknown = options.keys() - inspect.signature(make).parameters.keys()
  if unknown:
    keys = ", ".join(f"model.{key}={options[key]!r}" for key in sorted(unknown))
    raise UserError(f"The backbone {name} has no {keys}; leave it out.")
  return make(**common, **options)


def check_size(backbone: nn.Module, size: int) -> None:
  """Raises UserError for square images that a ViT or a ConvNeXt cannot take."""
  if isinstance(backbone, ViT | ConvNeXt):
    backbone.check_size(size, size)


class Encoder(nn.Module):
  """A backbone and the projector on its features.

  Variables are {"params": {"backbone", "projector"}, "batch_stats": the same}.
  """

  backbone: nn.Module
  projector: nn.Module

  @property
  def has_attention(self) -> bool:
    """Whether `attention_maps` are there."""
    return isinstance(self.backbone, ViT)

  def __call__(
    self, images: jax.Array, train: bool
  ) -> tuple[jax.Array, jax.Array]:
    """Maps images [B, H, W, C] to features [B, F] and embeddings [B, D]."""
    features = self.backbone(images, train)
    return features, self.projector(features, train)

  def features(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to features [B, F], without the projector."""
    return self.backbone(images, train)

  def feature_maps(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to [B, h, w, F], before pooling."""
    return self.backbone.feature_maps(images, train)

  def patch_embeddings(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns feature maps [B, h, w, F] and their embeddings [B, h, w, D].

    The projector takes each position as if it were the features of an image,
    in evaluation mode: its batch statistics are those of pooled features.
    """
    maps = self.backbone.feature_maps(images, False)
    features = maps
    if isinstance(self.backbone, ResNet):
      features = self.backbone.spread(maps)
    return maps, self.projector(features, False)

  def spatial(self, images: jax.Array) -> Any:
    """Returns what the features are computed from, for attribution.

    The first leaf is a map [B, h, w, C]: the last one with a place in the
    image that matters.
    """
    if isinstance(self.backbone, ViT | ConvNeXt):
      return self.backbone.spatial(images)
    return self.backbone.feature_maps(images, False)

  def embed_spatial(self, state: Any) -> jax.Array:
    """Maps what `spatial` returns to embeddings [B, D], in evaluation mode."""
    return self.projector(self.backbone.pooled(state), False)


def attention_maps(
  encoder: Encoder, variables: Any, images: jax.Array
) -> jax.Array:
  """Maps images [B, H, W, C] to a ViT's attention [B, h, w] to each patch.

  It is the last block's, the mean over heads: the class token's, or with
  pool="mean" that of all patches on average. A sum over patches is at most 1;
  the rest is attention to the class token and registers.

  Args:
    encoder: Its backbone is a ViT.
    variables: The encoder's.
    images: As the network takes them.
  """
  net = encoder.backbone
  assert isinstance(net, ViT)
  _, state = encoder.apply(
    variables,
    images,
    method=encoder.features,
    mutable=["intermediates"],
  )
  blocks = state["intermediates"]["backbone"]
  (weights,) = blocks[f"blocks_{net.depth - 1}"]["attn"]["weights"]
  first = 1 + net.registers
  queries = slice(0, 1) if net.pool == "token" else slice(first, None)
  weights = weights[:, :, queries, first:].mean((1, 2))  # [B, h * w]
  height, width = (side // net.patch for side in images.shape[1:3])
  return weights.reshape(-1, height, width).astype(jnp.float32)
