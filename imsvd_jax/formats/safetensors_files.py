"""State dicts in safetensors files: no torch, no pickle, metadata included."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import loading_code, untrusted
from imsvd_jax.formats.weight_format import Format, Weights


def write_safetensors(
  path: str, state: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
  """Writes a state dict; other metadata values than strings become JSON."""
  from safetensors.numpy import save

  strings = {
    key: value if isinstance(value, str) else json.dumps(value)
    for key, value in metadata.items()
  }
  # The library ignores strides: it would scramble a transposed view.
  arrays = {key: np.array(value, order="C") for key, value in state.items()}
  # "format" is what libraries of the ecosystem look for.
  content = save(arrays, metadata={"format": "pt", **strings})
  # The library's `save_file` lets nobody else read the file.
  with open(path, "wb") as file:
    file.write(content)


def read_safetensors(
  path: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any], tuple[str, ...]]:
  """Reads arrays by name, the metadata, and (), as nothing is left out.

  Raises:
    UserError: Two tensors have one name, a type is unknown, or the metadata is
      not plain.
  """
  from safetensors import safe_open

  # The library checks sizes, types and offsets, but takes any of two tensors
  # of one name.
  with safe_open(path, framework="numpy") as file:
    metadata = file.metadata() or {}
    _check_names(path)
    names = list(file.keys())
    untrusted.check_count(len(names))
    state = {key: _array(file, key) for key in names}
  return state, {key: _parse(key, value) for key, value in metadata.items()}, ()


def _check_names(path: str) -> None:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
      raise UserError("The file has two entries of one name.")
    return entries

  with open(path, "rb") as file:
    size = int.from_bytes(file.read(8), "little")
    json.loads(file.read(size), object_pairs_hook=unique)


def _array(file: Any, key: str) -> np.ndarray:
  try:
    value = np.array(file.get_tensor(key))
  except (TypeError, AttributeError, KeyError) as error:
    raise UserError(
      f"{key} has a data type that NumPy lacks ({error}); save the weights in"
      " float32."
    ) from error
  half = value.dtype.name in ("float16", "bfloat16")
  return value.astype(np.float32) if half else value


def _parse(key: str, value: str) -> Any:
  """Returns a value as it was before the writer made it a string."""
  if value[:1] not in ("{", "["):
    return value
  try:
    return untrusted.parse_json(value)
  except json.JSONDecodeError:
    return value
  except ValueError as error:
    raise UserError(f"The metadata {key!r} is not JSON ({error}).") from error


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  write_safetensors(path, weights.to_torchvision(), metadata)


SAFETENSORS = Format(_write, loading_code.safetensors_code)
