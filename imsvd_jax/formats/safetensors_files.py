"""State dicts in safetensors files: no torch, no pickle, metadata included."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import loading_code
from imsvd_jax.formats.weight_format import Format, Weights


def write_safetensors(
  path: str, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
  """Writes a state dict; other metadata values than strings become JSON."""
  from safetensors import SafetensorError
  from safetensors.numpy import save_file

  strings = {
    key: value if isinstance(value, str) else json.dumps(value)
    for key, value in metadata.items()
  }
  # The library ignores strides: it would scramble a transposed view.
  arrays = {key: np.array(value, order="C") for key, value in state.items()}
  # "format" is what libraries of the ecosystem look for.
  try:
    save_file(arrays, path, metadata={"format": "pt", **strings})
  except SafetensorError as error:  # Names are unique, types known: the disk.
    raise OSError(None, str(error)) from error


def read_safetensors(
  path: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
  """Reads arrays by name, the metadata, and (), as nothing is left out.

  Raises:
    UserError: The file is damaged.
  """
  from safetensors import SafetensorError, safe_open

  try:
    with safe_open(path, framework="numpy") as file:
      metadata = file.metadata() or {}
      state = {key: _array(file, key, path) for key in list(file.keys())}
  except SafetensorError as error:
    raise UserError(
      f"{path} is not a complete safetensors file ({error}); download or "
      "export it again."
    ) from error
  return state, {key: _parse(value) for key, value in metadata.items()}, ()


def _array(file: Any, key: str, path: str) -> np.ndarray:
  try:
    value = np.array(file.get_tensor(key))
  except (TypeError, AttributeError, KeyError) as error:
    raise UserError(
      f"{path}: {key} has a data type that NumPy lacks ({error}); save the "
      "weights in float32."
    ) from error
  half = value.dtype.name in ("float16", "bfloat16")
  return value.astype(np.float32) if half else value


def _parse(value: str) -> Any:
  """Returns a value as it was before the writer made it a string."""
  if value[:1] not in ("{", "["):
    return value
  try:
    return json.loads(value)
  except json.JSONDecodeError:
    return value


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  write_safetensors(path, weights.to_torchvision(), metadata)


SAFETENSORS = Format(_write, loading_code.safetensors_code)
