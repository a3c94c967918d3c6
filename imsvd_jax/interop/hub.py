"""An encoder as a folder that the Hugging Face Hub and timm read.

The folder has `model.safetensors`, the model card `README.md` and, where timm
can build the network from arguments, timm's `config.json`.
"""

import json
import math
import os
import shlex
from collections.abc import Mapping
from typing import Any

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import check_directory, write_whole
from imsvd_jax.formats import Architecture
from imsvd_jax.formats.loading_code import timm_model

FORMAT = "hub"
WEIGHTS, CARD, CONFIG = "model.safetensors", "README.md", "config.json"


def check_folder(path: str) -> str:
  """Returns the absolute path of the folder, with ~ expanded.

  Raises:
    UserError: It cannot be written, or it has files and no earlier export is
      among them. Call this before the work, not after it.
  """
  path = os.path.abspath(os.path.expanduser(path))
  check_directory(path)
  names = os.listdir(path) if os.path.isdir(path) else []
  names = sorted(name for name in names if not name.startswith("."))
  if names and WEIGHTS not in names:
    raise UserError(
      f"{path} has other files, such as {names[0]}; --format=hub writes a new"
      " or empty folder, or replaces an earlier export."
    )
  return path


def write_config(
  folder: str,
  architecture: Architecture,
  metadata: Mapping[str, Any],
  num_classes: int,
) -> str:
  """Writes timm's config.json and returns its path; "" if timm lacks the net.

  A config.json of another network, from an earlier export, is removed.
  """
  path = os.path.join(folder, CONFIG)
  config = timm_config(architecture, metadata, num_classes)
  if config is None:
    if os.path.exists(path):
      os.remove(path)
    return ""
  write_whole(path, f"{json.dumps(config, indent=2)}\n".encode())
  return path


def timm_config(
  architecture: Architecture, metadata: Mapping[str, Any], num_classes: int
) -> dict[str, Any] | None:
  """Returns what timm builds the network and its transform from, or None."""
  model = timm_model(architecture)
  if model is None:
    return None
  name, arguments = model
  size = metadata["input_size"]
  return {
    "architecture": name,
    "num_classes": num_classes,
    "num_features": metadata["num_features"],
    "model_args": {**arguments, "in_chans": architecture.channels},
    "pretrained_cfg": {
      "input_size": [architecture.channels, size, size],
      "fixed_input_size": architecture.is_vit,
      "interpolation": metadata["interpolation"],
      "crop_pct": _crop_share(size, metadata["resize"]),
      "crop_mode": "center",
      "mean": metadata["mean"],
      "std": metadata["std"],
      "num_classes": num_classes,
    },
  }


def _crop_share(crop: int, resize: int) -> float:
  """Returns the share of which timm, rounding down, computes `resize` again."""
  share = crop / resize
  exact = math.floor(crop / share) == resize
  return share if exact else math.nextafter(share, 0.0)


def loading_code(folder: str) -> str:
  """Returns Python that loads the folder into timm's network."""
  name = os.path.basename(folder)
  return f"""import timm

# After the upload: "hf-hub:USER/{name}".
model = timm.create_model("local-dir:{name}", pretrained=True).eval()
settings = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**settings, is_training=False)
"""


def upload_hint(folder: str) -> str:
  """Returns the user's own command that uploads the folder."""
  name = shlex.quote(f"USER/{os.path.basename(folder)}")
  return f"To upload it: hf upload {name} {shlex.quote(folder)}"
