"""Our own variables in an .npz file: every array under its path, no pickle.

`params/backbone/conv1/kernel` and so on, convolutions in HWIO; "metadata"
holds JSON.
"""

import itertools
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import architecture_of
from imsvd_jax.formats.torchvision import (
  Imported,
  check_values,
  check_variables,
)
from imsvd_jax.formats.weight_format import Content, Format, Weights


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


def read_numpy(path: str) -> Imported:
  """Reads the variables of a file that this package wrote.

  Raises:
    UserError: The file is damaged, contains Python objects, or its arrays are
      not a network's.
  """
  try:
    # Opened here, because NumPy leaves a damaged file open.
    with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except (
    ValueError,
    OSError,
    EOFError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    raise UserError(
      f"{path} is not a complete .npz file of plain arrays ({error}); export "
      "it again."
    ) from error
  metadata = _metadata(path, arrays.pop("metadata", None))
  variables = _nested(arrays)
  classifier = variables.pop("classifier", None)
  architecture = architecture_of(variables)
  check_variables(variables, architecture)
  check_values(arrays)
  return Imported(variables, architecture, classifier, metadata)


def _nested(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  folders = {"params", "batch_stats", "classifier"}
  for name in arrays:
    folders.update(itertools.accumulate(name.split("/")[:-1], "{}/{}".format))
  for name in folders & arrays.keys():
    raise UserError(
      f"{name} is an array; expected arrays below that name, such as {name}/..."
    )
  return {"params": {}, "batch_stats": {}, **unflatten_dict(arrays, sep="/")}


def _metadata(path: str, value: np.ndarray | None) -> dict[str, Any]:
  if value is None:
    return {}
  try:
    metadata = json.loads(str(value))
  except json.JSONDecodeError as error:
    raise UserError(f"{path}: its metadata is not JSON ({error}).") from error
  if not isinstance(metadata, dict):
    raise UserError(
      f"{path}: its metadata is a {type(metadata).__name__} in JSON; expected"
      " an object."
    )
  return metadata


def _loading_code(content: Content) -> str:
  return (
    "import numpy as np\n\n"
    f'arrays = dict(np.load("{content.file_name}", allow_pickle=False))\n'
    'kernel = arrays["params/backbone/conv1/kernel"]  # [h, w, in, out]\n'
  )


NUMPY = Format(_write, _loading_code, makes_model=False)
