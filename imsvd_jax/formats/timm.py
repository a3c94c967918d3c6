"""timm's names, which are torchvision's for the ResNets that both have.

Its ResNets always have 64 filters in the first stage. `num_classes=0` removes
the classifier and `in_chans` sets the channels.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import loading_code
from imsvd_jax.formats.architecture import Architecture, architecture_of
from imsvd_jax.formats.torch_files import write_torch
from imsvd_jax.formats.torchvision import to_torchvision
from imsvd_jax.formats.weight_format import Format, Weights


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


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  weights.check_backbone_only("timm")
  state = to_timm(
    weights.variables,
    weights.architecture,
    classifier=weights.classifier,
    num_batches_tracked=weights.num_batches_tracked,
  )
  write_torch(path, state, metadata)


TIMM = Format(_write, loading_code.timm_code, has_names=True)
