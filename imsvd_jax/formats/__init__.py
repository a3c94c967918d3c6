"""PyTorch in, PyTorch out: weights in the formats that other people read.

`write_file` exports variables and `read_file` recognises and imports any file
that it can read. Between them are pure functions on dictionaries of arrays.
A new format is one function here and one line in FORMATS.
"""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import imsvd_jax
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import check_output, in_place_when_done
from imsvd_jax.formats.architecture import (
  Architecture,
  architecture_of,
  infer_architecture,
)
from imsvd_jax.formats.detectron2 import (
  detectron2_config,
  from_detectron2,
  to_detectron2,
)
from imsvd_jax.formats.loading_code import is_ready_made, loading_code
from imsvd_jax.formats.numpy_files import read_numpy, write_numpy
from imsvd_jax.formats.safetensors_files import (
  read_safetensors,
  write_safetensors,
)
from imsvd_jax.formats.timm import from_timm, to_timm
from imsvd_jax.formats.torch_files import (
  read_torch,
  write_torch,
  write_torch_nested,
)
from imsvd_jax.formats.torchvision import (
  Imported,
  check_variables,
  from_torchvision,
  to_torchvision,
)

__all__ = [
  "FORMATS",
  "Architecture",
  "Imported",
  "architecture_of",
  "check_variables",
  "detectron2_config",
  "from_detectron2",
  "from_timm",
  "from_torchvision",
  "infer_architecture",
  "is_ready_made",
  "loading_code",
  "read_file",
  "to_detectron2",
  "to_timm",
  "to_torchvision",
  "write_file",
]


class Weights(NamedTuple):
  """What a format is given to write."""

  variables: Mapping[str, Any]
  architecture: Architecture
  projector: bool
  classifier: Mapping[str, Any] | None
  num_batches_tracked: int

  def to_torchvision(self) -> dict[str, Any]:
    """Returns torchvision's state dict."""
    return to_torchvision(
      self.variables,
      self.architecture,
      projector=self.projector,
      classifier=self.classifier,
      num_batches_tracked=self.num_batches_tracked,
    )


def _write_torchvision(path, weights: Weights, metadata) -> None:
  write_torch(path, weights.to_torchvision(), metadata)


def _write_safetensors(path, weights: Weights, metadata) -> None:
  write_safetensors(path, weights.to_torchvision(), metadata)


def _write_timm(path, weights: Weights, metadata) -> None:
  _backbone_only("timm", weights)
  state = to_timm(
    weights.variables,
    weights.architecture,
    classifier=weights.classifier,
    num_batches_tracked=weights.num_batches_tracked,
  )
  write_torch(path, state, metadata)


def _write_detectron2(path, weights: Weights, metadata) -> None:
  _backbone_only("detectron2", weights)
  if weights.classifier is not None:
    raise UserError("detectron2's backbones have no classifier; leave it out.")
  state = to_detectron2(weights.variables, weights.architecture)
  write_torch_nested(path, state, metadata)


def _write_numpy(path, weights: Weights, metadata) -> None:
  check_variables(weights.variables, weights.architecture)
  variables = {
    kind: {
      name: tree
      for name, tree in weights.variables[kind].items()
      if name == "backbone" or weights.projector
    }
    for kind in ("params", "batch_stats")
  }
  write_numpy(path, variables, metadata, weights.classifier)


def _backbone_only(name: str, weights: Weights) -> None:
  if weights.projector:
    raise UserError(
      f"{name} has backbones alone; export the projector with "
      "--format=torchvision, safetensors or numpy."
    )


# name: write(path, weights, metadata)
FORMATS: dict[str, Callable[[str, Weights, Mapping[str, Any]], None]] = {
  "torchvision": _write_torchvision,
  "timm": _write_timm,
  "detectron2": _write_detectron2,
  "safetensors": _write_safetensors,
  "numpy": _write_numpy,
}


def write_file(
  path: str | os.PathLike[str],
  variables: Mapping[str, Any],
  *,
  format_name: str,
  metadata: Mapping[str, Any],
  projector: bool = False,
  classifier: Mapping[str, Any] | None = None,
) -> Architecture:
  """Writes weights to a file, whole or not at all.

  Args:
    path: The file; an existing one is replaced.
    variables: {"params", "batch_stats"}, each with a "backbone" and perhaps a
      "projector".
    format_name: A key of FORMATS.
    metadata: What the file should say about itself, as JSON allows; "step" also
      becomes torch's counter of batches. Architecture, format and package
      version are added.
    projector: Whether to write the projector too.
    classifier: {"kernel": [F, K], "bias": [K]} to write as `fc`.

  Returns:
    The architecture, for the model card.

  Raises:
    UserError: The format cannot hold these weights, or the file cannot be
      written.
  """
  write = lookup(FORMATS, format_name, "format")
  path = check_output(os.fspath(path))
  architecture = architecture_of(variables)
  if projector and not architecture.projector:
    raise UserError(
      "These weights have no projector; export the backbone alone."
    )
  weights = Weights(
    variables,
    architecture,
    projector,
    classifier,
    int(metadata.get("step", 0)),
  )
  described = dataclasses.asdict(architecture)
  described["projector"] = list(architecture.projector) if projector else []
  metadata = {
    **metadata,
    "architecture": described,
    "format_name": format_name,
    "imsvd_jax_version": imsvd_jax.__version__,
  }
  with in_place_when_done(path) as unfinished:
    write(unfinished, weights, metadata)
  return architecture


def read_file(
  path: str | os.PathLike[str], architecture: Architecture | None = None
) -> Imported:
  """Reads weights from any file that this package or its peers write.

  Those are: every format of FORMATS; torchvision's and timm's ResNets; the
  official IMSVD `model.pth` (backbone and projector) and `model_final.pth`
  (backbone), and likewise VICReg's and Barlow Twins' checkpoints and
  `resnet50.pth`.

  Args:
    path: The file.
    architecture: What it should hold; recognised if None.

  Raises:
    UserError: The file is not what it says, or does not fit; one line says
      why, and names the keys.
  """
  path = os.fspath(path)
  try:
    return _read(path, _kind(path), architecture)
  except UserError as error:
    if path in str(error):
      raise
    raise UserError(f"{path}: {error}") from error


def _read(path: str, kind: str, architecture: Architecture | None) -> Imported:
  if kind == "numpy":
    imported = read_numpy(path)
    if architecture is not None:
      check_variables(imported.variables, architecture)
    return imported
  read = {"torch": read_torch, "safetensors": read_safetensors}[kind]
  state, metadata, others = read(path)
  convert = from_torchvision
  if any(key.startswith("stem.") for key in state):
    convert = from_detectron2
  imported = convert(state, architecture)
  ignored = (*others, *imported.ignored)
  return imported._replace(metadata=metadata, ignored=ignored)


def _kind(path: str) -> str:
  """Returns the reader that a file's first bytes call for."""
  if not os.path.isfile(path):
    what = "is a folder" if os.path.isdir(path) else "does not exist"
    raise UserError(f"{path} {what}; expected a file of weights.")
  with open(path, "rb") as file:
    head = file.read(512)
  if head.startswith(b"PK"):
    return "numpy" if _is_npz(path) else "torch"
  if head[8:9] == b"{":
    return "safetensors"
  if head.startswith(b"\x80"):
    return "torch"  # The format before PyTorch 1.6.
  if zipfile.is_zipfile(path):  # A program, and a zip archive behind it.
    raise UserError(
      f"{path} holds no weights by name: it seems to be a StableHLO program, "
      "which jax.export.deserialize runs; export the run in another format."
    )
  if not head:
    found = "is empty"
  elif head.lstrip()[:1] == b"<":
    found = "is a web page"
  elif head.startswith(b"version https://git-lfs"):
    found = "is a Git LFS pointer (run `git lfs pull`)"
  else:
    found = f"starts with {head[:12]!r}"
  raise UserError(
    f"{path} {found}; expected a torch, safetensors or .npz file. Was the "
    "download complete?"
  )


def _is_npz(path: str) -> bool:
  """Tells .npz from torch: both are zip archives, one of .npy members."""
  try:
    with zipfile.ZipFile(path) as archive:
      return all(name.endswith(".npy") for name in archive.namelist())
  except zipfile.BadZipFile:
    return path.endswith(".npz")
