"""timm's names, which are torchvision's for the ResNets that both have.

Its ResNets always have 64 filters in the first stage; its ViTs and ConvNeXts
have any width. `num_classes=0` removes the classifier and `in_chans` sets the
channels.
"""

from collections.abc import Mapping
from typing import Any

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import loading_code
from imsvd_jax.formats.torch_files import write_torch
from imsvd_jax.formats.weight_format import Format, Weights


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  weights.check_backbone_only("timm")
  architecture = weights.architecture
  if architecture.is_resnet and architecture.width_multiplier != 1:
    raise UserError(
      f"timm has no {architecture.describe()}: its ResNets have width "
      "1; use --format=torchvision."
    )
  write_torch(path, weights.to_torchvision(), metadata)


TIMM = Format(_write, loading_code.timm_code, has_names=True)
