"""Backbones and heads; the only Flax Linen modules of the package.

A new backbone is one file and one line in BACKBONES.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from imsvd_jax.models import resnet
from imsvd_jax.models.heads import Projector

__all__ = ["BACKBONES", "Encoder", "Projector"]

# name: f(width_multiplier, stem, dtype, remat, zero_init_residual), see resnet.
BACKBONES: dict[str, Callable[..., nn.Module]] = {
  "resnet8": resnet.resnet8,
  "resnet10": resnet.resnet10,
  "resnet18": resnet.resnet18,
  "resnet34": resnet.resnet34,
  "resnet50": resnet.resnet50,
  "resnet101": resnet.resnet101,
  "resnet152": resnet.resnet152,
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
