"""detectron2's names for a ResNet, and the preprocessing that goes with them.

Norms belong to convolutions (`res2.0.conv1.norm.weight`), stages count from
res2, and torch's batch counters are left out: a frozen norm has none.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import (
  NUM_BATCHES,
  Architecture,
  architecture_of,
)
from imsvd_jax.formats.torch_files import write_torch
from imsvd_jax.formats.torchvision import (
  Imported,
  from_torchvision,
  to_torchvision,
)
from imsvd_jax.formats.weight_format import Content, Format, Weights

DEPTHS = {f"resnet{depth}": depth for depth in (18, 34, 50, 101, 152)}


def check_detectron2(architecture: Architecture) -> None:
  """Raises UserError if detectron2 cannot build this backbone."""
  basic = architecture.backbone in ("resnet18", "resnet34")
  reason = None
  if architecture.backbone not in DEPTHS:
    reason = f"its depths are {', '.join(map(str, DEPTHS.values()))}"
  elif architecture.stem != "imagenet":
    reason = "its stem is the imagenet one"
  elif basic and architecture.width_multiplier != 1:
    reason = "its ResNet-18 and 34 have width 1"
  if reason:
    raise UserError(
      f"detectron2 has no {architecture.describe()}: {reason}; "
      "use --format=torchvision."
    )


def _to_name(key: str) -> str:
  key = re.sub(r"^layer(\d+)", lambda m: f"res{int(m[1]) + 1}", key)
  if not key.startswith("res"):
    key = f"stem.{key}"
  key = re.sub(r"\bbn(\d)\b", r"conv\1.norm", key)
  key = key.replace("downsample.0", "shortcut")
  return key.replace("downsample.1", "shortcut.norm")


def _from_name(key: str) -> str:
  key = key.removeprefix("stem.")
  key = re.sub(r"^res(\d{1,2})", lambda m: f"layer{int(m[1]) - 1}", key)
  key = re.sub(r"\bconv(\d)\.norm\b", r"bn\1", key)
  key = key.replace("shortcut.norm", "downsample.1")
  return re.sub(r"\bshortcut\.weight", "downsample.0.weight", key)


def to_detectron2(
  variables: Mapping[str, Any], architecture: Architecture | None = None
) -> dict[str, np.ndarray]:
  """Converts the backbone to detectron2's names.

  Raises:
    UserError: detectron2 has no such ResNet.
  """
  architecture = architecture or architecture_of(variables)
  check_detectron2(architecture)
  state = to_torchvision(variables, architecture)
  return {
    _to_name(key): value
    for key, value in state.items()
    if not key.endswith(NUM_BATCHES)
  }


def from_detectron2(
  state: Mapping[str, np.ndarray], architecture: Architecture | None = None
) -> Imported:
  """Converts a backbone with detectron2's names to variables."""
  renamed = {_from_name(key): value for key, value in state.items()}
  if len(renamed) != len(state):
    raise UserError(
      "The file has two names of one tensor: it mixes detectron2's names with"
      " others."
    )
  return from_torchvision(renamed, architecture, spell=_to_name)


def detectron2_config(content: Content) -> str:
  """Returns the YAML that a detectron2 config needs for these weights."""
  architecture = content.architecture
  check_detectron2(architecture)
  net = architecture.network()
  first = net.num_filters
  pixel_mean = [round(255 * value, 3) for value in content.mean]
  pixel_std = [round(255 * value, 3) for value in content.std]
  return f"""MODEL:
  WEIGHTS: "{content.file_name}"
  PIXEL_MEAN: {pixel_mean}
  PIXEL_STD: {pixel_std}
  RESNETS:
    DEPTH: {DEPTHS[architecture.backbone]}
    STRIDE_IN_1X1: False
    STEM_OUT_CHANNELS: {first}
    WIDTH_PER_GROUP: {first}
    RES2_OUT_CHANNELS: {first * net.block.expansion}
INPUT:
  FORMAT: "RGB"
"""


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  weights.check_backbone_only("detectron2")
  if weights.classifier is not None:
    raise UserError("detectron2's backbones have no classifier; leave it out.")
  state = to_detectron2(weights.variables, weights.architecture)
  write_torch(path, state, metadata, for_detectron2=True)


DETECTRON2 = Format(
  _write,
  detectron2_config,
  makes_model=False,
  language="yaml",
  code_suffix=".yaml",
)
