"""Backbones and heads; the only Flax Linen modules of the package.

A new backbone is one file and one line in BACKBONES.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from imsvd_jax.models.convnext import convnext
from imsvd_jax.models.heads import Projector
from imsvd_jax.models.resnet import BasicBlock, Bottleneck, ResNet
from imsvd_jax.models.vit import vit

__all__ = ["BACKBONES", "Encoder", "Projector"]

# name: f(width_multiplier, stem, dtype, remat, zero_init_residual,
# kernel_init), see ResNet, and options of its own such as patch_size.
# resnet8 and convnext_micro have three stages: a small image has nothing left
# to halve after them.
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
  "convnext_micro": partial(
    convnext, depths=(1, 1, 1), widths=(96, 192, 384)
  ),
  "convnext_tiny": partial(convnext, depths=(3, 3, 9, 3)),
  "convnext_small": partial(convnext, depths=(3, 3, 27, 3)),
  "convnext_base": partial(
    convnext, depths=(3, 3, 27, 3), widths=(128, 256, 512, 1024)
  ),
}


class Encoder(nn.Module):
  """A backbone and the projector on its features.

  Variables are {"params": {"backbone", "projector"}, "batch_stats": the same}.
  """

  backbone: nn.Module
  projector: nn.Module

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
