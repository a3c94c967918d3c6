"""Our own variables in an .npz file: every array under its path, no pickle.

`params/backbone/conv1/kernel` and so on, convolutions in HWIO; "metadata"
holds JSON.
"""

import json
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import untrusted
from imsvd_jax.formats.architecture import architecture_of
from imsvd_jax.formats.torchvision import (
  Imported,
  as_floats,
  check_variables,
)
from imsvd_jax.formats.weight_format import Content, Format, Weights

_READ_HEADER = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}
# Ours are params/backbone/layer1_0/conv1/kernel at the deepest.
_MAX_LEVELS = 8


def _write(path: str, weights: Weights, metadata: Mapping[str, Any]) -> None:
  check_variables(weights.variables, weights.architecture)
  arrays = {
    "/".join(leaf_path): np.asarray(leaf)
    for leaf_path, leaf in flatten_dict(weights.variables).items()
    if leaf_path[0] in ("params", "batch_stats")
    and (leaf_path[1] == "backbone" or weights.projector)
  }
  for name, value in (weights.classifier or {}).items():
    arrays[f"classifier/{name}"] = np.asarray(value)
  arrays["metadata"] = np.array(json.dumps(dict(metadata)))
  with open(path, "wb") as file:  # Given a name, NumPy would append ".npz".
    np.savez(file, **arrays)


def load_arrays(path: str) -> dict[str, np.ndarray]:
  """Returns the arrays of an .npz file by name.

  Call it inside of `untrusted.reading`: whatever a damaged file raises is left
  to that.
  """
  untrusted.check_archive(path)
  with zipfile.ZipFile(path) as archive:
    return {
      member.filename.removesuffix(".npy"): _load_array(archive, member)
      for member in archive.infolist()
    }


def _load_array(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> np.ndarray:
  """Reads an array; NumPy alone would allocate whatever its header claims."""
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    shape, _, dtype = _READ_HEADER[version](file)
    claimed = math.prod(shape) * dtype.itemsize
    held = member.file_size - file.tell()
    if claimed != held and not dtype.hasobject:
      raise ValueError(f"{member.filename} has {held} bytes for {claimed}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def read_numpy(path: str) -> Imported:
  """Reads the variables of a file that this package wrote.

  Raises:
    UserError: The file unpacks to far more than its size, or its arrays are
      not a network's.
  """
  arrays = load_arrays(path)
  metadata = _metadata(arrays.pop("metadata", None))
  variables = _nested(arrays)
  architecture = architecture_of(variables)
  classifier = variables.pop("classifier", None)
  check_variables(variables, architecture)
  return Imported(variables, architecture, classifier, metadata)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """Returns arrays as nested dictionaries of float32."""
  folders = {"params", "batch_stats", "classifier"}
  for name in arrays:
    parents = name.split("/")[:-1]
    if len(parents) >= _MAX_LEVELS:
      raise UserError(
        f"An array has a name of {len(parents) + 1} levels; expected at most"
        f" {_MAX_LEVELS}, as a ResNet's."
      )
    folders.update("/".join(parents[:n]) for n in range(1, len(parents) + 1))
  for name in folders & arrays.keys():
    raise UserError(
      f"{name} is an array; expected arrays below that name, such as {name}/..."
    )
  # Other programs may write another precision or byte order.
  floats = {name: as_floats(name, value) for name, value in arrays.items()}
  return {"params": {}, "batch_stats": {}, **unflatten_dict(floats, sep="/")}


def _metadata(value: np.ndarray | None) -> dict[str, Any]:
  if value is None:
    return {}
  try:
    metadata = untrusted.parse_json(str(value))
  except ValueError as error:
    raise UserError(f"The metadata is not JSON ({error}).") from error
  if not isinstance(metadata, dict):
    raise UserError(
      f"The metadata is a {type(metadata).__name__} in JSON; expected an"
      " object."
    )
  return metadata


def _loading_code(content: Content) -> str:
  return (
    "import numpy as np\n\n"
    f'arrays = dict(np.load("{content.file_name}", allow_pickle=False))\n'
    'kernel = arrays["params/backbone/conv1/kernel"]  # [h, w, in, out]\n'
  )


NUMPY = Format(_write, _loading_code, makes_model=False)
