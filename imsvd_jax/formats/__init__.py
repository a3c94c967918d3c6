"""Weights in the formats of other programs.

`write_file` writes variables in a format of FORMATS. `read_file` recognizes a
file by its content and reads it. Between them are pure functions on
dictionaries of arrays. A new format is one file with a `Format`, and one line
in FORMATS.
"""

import dataclasses
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import imsvd_jax
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import check_output, in_place_when_done
from imsvd_jax.formats import untrusted
from imsvd_jax.formats.architecture import (
  Architecture,
  architecture_of,
  infer_architecture,
  pooled_as,
)
from imsvd_jax.formats.detectron2 import DETECTRON2, from_detectron2
from imsvd_jax.formats.loading_code import is_ready_made
from imsvd_jax.formats.numpy_files import NUMPY, read_numpy
from imsvd_jax.formats.safetensors_files import SAFETENSORS, read_safetensors
from imsvd_jax.formats.timm import TIMM
from imsvd_jax.formats.torch_files import TORCHVISION, read_torch
from imsvd_jax.formats.torchvision import (
  Imported,
  check_variables,
  from_torchvision,
  to_torchvision,
)
from imsvd_jax.formats.untrusted import one_line
from imsvd_jax.formats.weight_format import Content, Format, Weights
from imsvd_jax.models.resnet import MAX_POOL_GRID

__all__ = [
  "FORMATS",
  "Architecture",
  "Content",
  "Format",
  "Imported",
  "architecture_of",
  "check_variables",
  "from_torchvision",
  "infer_architecture",
  "is_ready_made",
  "one_line",
  "pooled_as",
  "read_file",
  "to_torchvision",
  "write_file",
]


FORMATS: dict[str, Format] = {
  "torchvision": TORCHVISION,
  "timm": TIMM,
  "detectron2": DETECTRON2,
  "safetensors": SAFETENSORS,
  "numpy": NUMPY,
}


# The words of messages, by the kind of a file.
_EXPECTED = {
  "numpy": ".npz file of plain arrays",
  "safetensors": "safetensors file",
  "torch": "torch file",
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
    metadata: Values that JSON allows, to write into the file; "step" also
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
  chosen = lookup(FORMATS, format_name, "format")
  path = check_output(os.fspath(path))
  architecture = pooled_as(
    architecture_of(variables), metadata.get("num_features")
  )
  if projector and not architecture.projector:
    raise UserError(
      "These weights have no projector; export the backbone alone."
    )
  weights = Weights(
    variables, architecture, projector, classifier, int(metadata.get("step", 0))
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
    chosen.write(unfinished, weights, metadata)
  return architecture


def read_file(
  path: str | os.PathLike[str],
  architecture: Architecture | None = None,
  *,
  prefix: str = "",
) -> Imported:
  """Reads weights from any file that this package or its peers write.

  Those are: every format of FORMATS; torchvision's and timm's ResNets, ViTs and
  ConvNeXts; the
  official IMSVD `model.pth` (backbone and projector) and `model_final.pth`
  (backbone), and likewise VICReg's and Barlow Twins' checkpoints and
  `resnet50.pth`; the backbone of the projects in `layouts.LAYOUTS`.

  Args:
    path: The file.
    architecture: What it should hold; inferred if None.
    prefix: How the backbone's names begin, in a torch or safetensors file of
      another layout.

  Raises:
    UserError: The file is damaged or does not fit the architecture; the
      message names the keys.
  """
  path = os.fspath(path)
  with untrusted.reading(path, "file of weights"):
    kind = _kind(path)
  with untrusted.reading(path, _EXPECTED[kind]):
    return _read(path, kind, architecture, prefix)


def _read(
  path: str, kind: str, architecture: Architecture | None, prefix: str
) -> Imported:
  if kind == "numpy":
    if prefix:
      raise UserError(
        f"{path} has this package's own names; leave out the prefix {prefix!r}."
      )
    imported = read_numpy(path)
    if architecture is not None:
      check_variables(imported.variables, architecture)
    return _pooled(imported)
  read = {"torch": read_torch, "safetensors": read_safetensors}[kind]
  state, metadata, others = read(path)
  if any(key.startswith("stem.conv1.") for key in state) and not prefix:
    imported = from_detectron2(state, architecture)
  else:
    imported = from_torchvision(state, architecture, prefix=prefix)
  ignored = (*imported.ignored, *others)
  imported = imported._replace(metadata=metadata, ignored=ignored)
  return imported if architecture else _pooled(imported)


def _pooled(imported: Imported) -> Imported:
  """Returns a backbone with its pooling, which its own weights do not show.

  The classifier shows it, or the metadata of `write_file`.
  """
  architecture, classifier = imported.architecture, imported.classifier
  if architecture.projector:
    return imported
  if classifier is not None:
    architecture = pooled_as(architecture, len(classifier["kernel"]))
  else:
    described = (imported.metadata or {}).get("architecture")
    parts = described.get("pool_grid") if isinstance(described, dict) else None
    in_range = isinstance(parts, int) and 1 <= parts <= MAX_POOL_GRID
    if parts is not None and in_range and architecture.is_resnet:
      architecture = dataclasses.replace(architecture, pool_grid=parts)
  return imported._replace(architecture=architecture)


def _kind(path: str) -> str:
  """Returns the reader for a file, by its first bytes."""
  if not os.path.isfile(path):
    what = "does not exist"
    if os.path.exists(path):
      what = "is a folder" if os.path.isdir(path) else "is not a regular file"
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
      f"{path} contains no named weights: it seems to be a StableHLO program,"
      " which jax.export.deserialize runs; export the run in another format."
    )
  if os.fspath(path).endswith(".onnx"):
    found = "is an ONNX program, without named weights"
  elif not head:
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
  """Returns whether a zip archive is .npz, of .npy members, and not torch's."""
  try:
    with zipfile.ZipFile(path) as archive:
      return all(name.endswith(".npy") for name in archive.namelist())
  except Exception:  # It is damaged: the reader will say how.
    return path.endswith(".npz")
