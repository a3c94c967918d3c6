"""State dicts in torch files; torch is imported only when one is used.

Files are read with `weights_only=True`: nothing in them is executed.
"""

import argparse
import collections
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import loading_code, untrusted
from imsvd_jax.formats.architecture import Architecture
from imsvd_jax.formats.other_names import to_torchvision_names
from imsvd_jax.formats.weight_format import Format, Weights
from imsvd_jax.models.vit import grid


def _does_nothing(*args: Any, **kwargs: Any) -> None:
  """Replaces a function of the official training scripts.

  The official IMSVD, VICReg and Barlow Twins checkpoints contain their
  optimizer, which refers to a function by this name. Torch refuses names that
  it does not know, so it is given this one.
  """


_does_nothing.__module__ = "__main__"
_does_nothing.__qualname__ = "exclude_bias_and_norm"
# What checkpoints refer to beside tensors; DINO's holds its arguments.
_HARMLESS = [_does_nothing, argparse.Namespace]
# Entries that hold a state dict; DINO evaluates its teacher.
_STATES = ("model", "state_dict", "teacher")


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise UserError(
      'torch files need PyTorch: pip install "imsvd_jax[torch]", or use '
      "--format=safetensors or --format=numpy."
    ) from error
  return torch


def write_torch(
  path: str,
  state: Mapping[str, np.ndarray],
  metadata: Mapping[str, Any],
  *,
  for_detectron2: bool = False,
) -> None:
  """Writes a state dict; the loaded one has `metadata` as an attribute.

  An attribute, because strict loading accepts no entry that is not a tensor.
  detectron2 reads {"model": state, "metadata": ...} instead.
  """
  torch = _torch()
  content: Any = collections.OrderedDict(
    (key, torch.from_numpy(np.array(value))) for key, value in state.items()
  )
  if for_detectron2:
    content = {
      "model": dict(content),
      "__author__": "imsvd_jax",
      "matching_heuristics": True,
      "metadata": dict(metadata),
    }
  else:
    content.metadata = dict(metadata)
  try:
    with open(path, "wb") as file:
      torch.save(content, file)
  except RuntimeError as error:  # How torch reports a full disk.
    if isinstance(error.__context__, OSError):
      raise error.__context__ from error
    raise


def read_torch(
  path: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
  """Reads a state dict, or a checkpoint that holds one.

  Returns:
    Arrays by name, the metadata, and the names of the file's other entries.

  Raises:
    UserError: The file is damaged, needs code to load, or holds no state dict.
  """
  torch = _torch()
  if zipfile.is_zipfile(path):
    untrusted.check_archive(path)
  try:
    # TorchScript archives warn before they fail; the error says enough.
    with (
      warnings.catch_warnings(),
      torch.serialization.safe_globals(_HARMLESS),
    ):
      warnings.simplefilter("ignore")
      loaded = torch.load(path, map_location="cpu", weights_only=True)
  except pickle.UnpicklingError as error:
    raise UserError(_refusal(path, error)) from error
  return _state_dict(path, loaded, torch)


def _refusal(path: str, error: Exception) -> str:
  if found := re.search(r"GLOBAL (\S+)", str(error)):
    return (
      f"{path} refers to {found[1]}, which would have to be executed; expected "
      "tensors alone. Save model.state_dict() instead."
    )
  return (
    f"{path} is not a torch file of tensors; expected what "
    "torch.save(model.state_dict(), path) writes."
  )


def _state_dict(
  path: str, loaded: Any, torch: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
  """Finds the state dict: the object itself, or an entry of _STATES."""

  def is_state(value: Any) -> bool:
    return (
      isinstance(value, dict)
      and len(value) > 0
      and all(isinstance(key, str) for key in value)
      and all(isinstance(v, torch.Tensor) for v in dict.values(value))
    )

  if is_state(loaded):
    metadata = _own(getattr(loaded, "metadata", None))
    return _arrays(path, loaded, torch), metadata or {}, ()
  if isinstance(loaded, dict):
    for name in _STATES:
      if is_state(dict.get(loaded, name)):
        metadata = _own(dict.get(loaded, "metadata"))
        known = (name,) if metadata is None else (name, "metadata")
        others = tuple(str(_entry(key)) for key in loaded if key not in known)
        return _arrays(path, loaded[name], torch), metadata or {}, others
    keys = ", ".join(repr(_entry(key)) for key in loaded)
    held = f"entries {keys}"[:200] if loaded else "nothing"
  else:
    held = f"a {type(loaded).__name__}"
  raise UserError(
    f"{path} holds {held}; expected a state dict, or one under 'model', "
    "'state_dict' or 'teacher'."
  )


def _entry(key: Any) -> str | int:
  """Returns a name; other keys may be large, such as nested tuples."""
  return key if isinstance(key, str | int) else f"a {type(key).__name__}"


def _own(metadata: Any) -> dict[str, Any] | None:
  """Returns metadata as we write it; None for another kind of entry."""
  if not isinstance(metadata, dict):
    return None
  try:
    return untrusted.plain(metadata)
  except ValueError:
    return None


def _arrays(
  path: str, state: dict[str, Any], torch: Any
) -> dict[str, np.ndarray]:
  """Copies tensors: `numpy()` shares the memory of the tensor."""
  # One stored number can be a tensor of any size.
  tensors = dict.items(state)
  sizes = (value.numel() * value.element_size() for _, value in tensors)
  untrusted.check_size(path, sum(sizes))
  return {key: _array(key, value, torch) for key, value in tensors}


def _array(key: str, value: Any, torch: Any) -> np.ndarray:
  if value.is_quantized or value.layout != torch.strided or value.is_meta:
    raise UserError(f"{key} is quantized or sparse; expected a dense tensor.")
  if value.is_complex():
    raise UserError(f"{key} is complex; expected floating point.")
  value = value.detach()
  if value.is_floating_point() and value.dtype != torch.float64:
    value = value.float()
  return np.array(value.numpy())


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  state = weights.to_torchvision()
  if not weights.architecture.is_resnet:
    _check_torchvision(weights.architecture)
    state = dict(_torchvisions(key, value) for key, value in state.items())
  write_torch(path, state, metadata)


def _check_torchvision(architecture: Architecture) -> None:
  """Raises UserError for what torchvision's ViT lacks."""
  plain = not architecture.is_vit or grid(architecture.positions)[1]
  if set(architecture.options()) - {"patch_size"} or not plain:
    raise UserError(
      f"torchvision has no {architecture.describe()}: its ViT has a class token"
      " with a position, and neither registers, layer scale nor mean pooling;"
      " use --format=timm or safetensors."
    )


def _torchvisions(key: str, value: np.ndarray) -> tuple[str, np.ndarray]:
  """Returns a ViT's or a ConvNeXt's tensor as torchvision has it."""
  start = "backbone." if key.startswith("backbone.") else ""
  if key.startswith("projector."):
    return key, value
  if key.endswith(".gamma"):
    value = value.reshape(-1, 1, 1)
  return start + to_torchvision_names(key.removeprefix(start)), value


TORCHVISION = Format(_write, loading_code.torchvision_code, has_names=True)
