"""timm's names: the same as torchvision's, for the ResNets that both have.

timm differs in what it cannot build: its ResNets have 64 filters in the first
stage. And in what it does by default: `num_classes=0` removes the classifier,
`in_chans` sets the channels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import Architecture, architecture_of
from imsvd_jax.formats.torchvision import (
  Imported,
  from_torchvision,
  to_torchvision,
)


def to_timm(
  variables: Mapping[str, Any],
  architecture: Architecture | None = None,
  *,
  classifier: Mapping[str, Any] | None = None,
  num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
  """Converts the backbone to a state dict that timm loads strictly.

  Raises:
    UserError: timm has no such ResNet.
  """
  architecture = architecture or architecture_of(variables)
  if architecture.width_multiplier != 1:
    raise UserError(
      f"timm has no {architecture.describe()}: its ResNets have width 1; "
      "use --format=torchvision."
    )
  return to_torchvision(
    variables,
    architecture,
    classifier=classifier,
    num_batches_tracked=num_batches_tracked,
  )


def from_timm(
  state: Mapping[str, np.ndarray], architecture: Architecture | None = None
) -> Imported:
  """Converts a timm ResNet's state dict to variables."""
  return from_torchvision(state, architecture)
