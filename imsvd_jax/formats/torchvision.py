"""Our variables as a torch state dict, and back: NumPy only.

A backbone alone has torchvision's own names (`layer1.0.conv1.weight`), or where
it is a ViT or a ConvNeXt timm's (`blocks.0.attn.qkv.weight`). With a
projector the names are those of a torch module that has a `backbone` and a
`projector` (a Sequential of Linear, BatchNorm1d and ReLU), as the official
IMSVD, VICReg and Barlow Twins code writes them.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import (
  NUM_BATCHES,
  Architecture,
  Entry,
  architecture_of,
  entries,
  infer_architecture,
)
from imsvd_jax.formats.layouts import read_names
from imsvd_jax.formats.untrusted import one_line
from imsvd_jax.models.vit import grid


class Imported(NamedTuple):
  """Weights that were read.

  Attributes:
    variables: {"params": {"backbone": ...}, "batch_stats": ...}, and
      "projector" beside "backbone" where the source has one.
    architecture: The network that they belong to.
    classifier: {"kernel": [F, K], "bias": [K]} of the `fc` layer, if any.
    metadata: Of the file.
    ignored: Names that are not part of the encoder, left out.
    project: Whose layout the file has, of `layouts.LAYOUTS`, if any.
  """

  variables: dict[str, Any]
  architecture: Architecture
  classifier: dict[str, np.ndarray] | None = None
  metadata: dict[str, Any] | None = None
  ignored: tuple[str, ...] = ()
  project: str = ""


def to_torchvision(
  variables: Mapping[str, Any],
  architecture: Architecture | None = None,
  *,
  projector: bool = False,
  classifier: Mapping[str, Any] | None = None,
  num_batches_tracked: int = 0,
) -> dict[str, np.ndarray]:
  """Converts variables to a state dict that torch loads strictly.

  Args:
    variables: {"params", "batch_stats"}, each with a "backbone".
    architecture: The network; inferred from the shapes if None.
    projector: Whether to write the projector too; then every name starts with
      "backbone." or "projector.".
    classifier: {"kernel": [F, K], "bias": [K]} to write as `fc`.
    num_batches_tracked: torch's counter of training steps.

  Returns:
    Contiguous arrays by name, in torchvision's order.

  Raises:
    UserError: A variable is missing, unexpected or misshapen.
  """
  architecture = architecture or architecture_of(variables)
  check_variables(variables, architecture)
  if projector and not architecture.projector:
    raise UserError(
      "These weights have no projector; export the backbone alone."
    )
  leaves = flatten_dict(variables)
  state = {}
  for entry in entries(architecture):
    if entry.key.startswith("projector.") and not projector:
      continue
    key = entry.key if projector else entry.key.removeprefix("backbone.")
    if entry.path is None:
      state[key] = np.asarray(num_batches_tracked, np.int64)
    else:
      state[key] = _to_torch(np.asarray(leaves[entry.path]))
  if classifier is not None:
    name = classifier_name(architecture)
    name = f"backbone.{name}" if projector else name
    kernel = np.asarray(classifier["kernel"])
    state[f"{name}.weight"] = _to_torch(kernel)
    state[f"{name}.bias"] = np.array(classifier["bias"])
  return state


def classifier_name(architecture: Architecture) -> str:
  """Returns the name of a network's last layer in torch."""
  if architecture.is_resnet:
    return "fc"
  return "head" if architecture.is_vit else "head.fc"


def from_torchvision(
  state: Mapping[str, np.ndarray],
  architecture: Architecture | None = None,
  *,
  prefix: str = "",
  dtype: Any = np.float32,
  spell: Callable[[str], str] = str,
) -> Imported:
  """Converts a state dict to variables; every tensor is used or reported.

  Accepts a backbone alone, `backbone.` and `projector.` together, and the
  backbone of the layouts in `layouts.LAYOUTS`; with or without the parts that
  torch's wrappers add to names, and with the official CIFAR code's `shortcut`
  for `downsample`. torch's batch counters may be missing, as in files older
  than PyTorch 0.4.1.

  Args:
    state: Arrays by name.
    architecture: The network; inferred from the shapes if None.
    prefix: How the backbone's names begin, in another layout.
    dtype: Of the variables.
    spell: Converts a key to the name that error messages show.

  Raises:
    UserError: A key is missing, unexpected, misshapen or not finite; the
      message names it.
  """
  names, project, heads = read_names(state, prefix)
  arrays = {name: _plain(name, state[key]) for name, key in names.items()}
  shown = functools.partial(_shown, names, spell)
  _fold_class_position(arrays)
  classifier = _take_classifier(arrays, dtype)
  ignored = (*heads, *_take_loss_norm(arrays, names))
  architecture = architecture or infer_architecture(
    {name: value.shape for name, value in arrays.items()}
  )
  _check_heads(project, architecture)
  table = entries(architecture)
  expected = {e.key: e.shape for e in table}
  found = {name: value.shape for name, value in arrays.items()}
  for entry in table:
    if entry.path is None:
      found.setdefault(entry.key, entry.shape)
  _check(found, expected, architecture, shown)
  floats = {
    entry.path: as_floats(
      shown(entry.key), _from_torch(arrays[entry.key]), dtype
    )
    for entry in table
    if entry.path is not None
  }
  variables = {"batch_stats": {}, **unflatten_dict(floats)}
  return Imported(variables, architecture, classifier, {}, ignored, project)


def check_variables(
  variables: Mapping[str, Any], architecture: Architecture
) -> None:
  """Compares names and shapes of variables with those of a network.

  Raises:
    UserError: Something is missing, unexpected or misshapen.
  """
  leaves = flatten_dict(variables)
  found = {"/".join(path): np.shape(leaf) for path, leaf in leaves.items()}
  expected = {
    "/".join(entry.path): _our_shape(entry)
    for entry in entries(architecture)
    if entry.path is not None
  }
  _check(found, expected, architecture)


# ---- arrays ----------------------------------------------------------------


def _plain(name: str, value: Any) -> np.ndarray:
  """Returns an array; torchvision's layer scales are [C, 1, 1]."""
  array = np.asarray(value)
  if name.endswith(".gamma") and array.shape[1:] == (1, 1):
    return array.reshape(-1)
  return array


def _to_torch(value: np.ndarray) -> np.ndarray:
  """HWIO -> OIHW, Dense kernels transposed; a contiguous copy."""
  axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, range(value.ndim))
  return np.array(np.transpose(value, axes), order="C")


def _from_torch(value: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO, Linear weights transposed; a contiguous copy."""
  axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim, range(value.ndim))
  return np.array(np.transpose(value, axes), order="C")


def _our_shape(entry: Entry) -> tuple[int, ...]:
  shape = entry.shape
  if len(shape) == 4:
    return (shape[2], shape[3], shape[1], shape[0])
  return tuple(reversed(shape)) if len(shape) == 2 else shape


# ---- names -----------------------------------------------------------------


def _take_classifier(
  arrays: dict[str, np.ndarray], dtype: Any
) -> dict[str, np.ndarray] | None:
  """Removes the classifier from arrays and returns it, if it is there."""
  for name in ("fc", "head.fc", "head"):
    weight = arrays.pop(f"backbone.{name}.weight", None)
    bias = arrays.pop(f"backbone.{name}.bias", None)
    if weight is not None or bias is not None:
      break
  if weight is None and bias is None:
    return None
  if weight is None or bias is None or weight.shape[:1] != bias.shape:
    shapes = [None if v is None else v.shape for v in (weight, bias)]
    raise UserError(
      f"The classifier needs {name}.weight [K, F] and {name}.bias [K], found"
      f" shapes {shapes[0]} and {shapes[1]}."
    )
  kernel = as_floats(f"{name}.weight", _from_torch(weight), dtype)
  return {"kernel": kernel, "bias": as_floats(f"{name}.bias", bias, dtype)}


def _fold_class_position(arrays: dict[str, np.ndarray]) -> None:
  """Adds the position of a ViT with registers to its class token, as timm."""
  token, table = (
    arrays.get(f"backbone.{name}") for name in ("cls_token", "pos_embed")
  )
  if "backbone.reg_token" not in arrays or token is None or table is None:
    return
  if table.ndim == token.ndim == 3 and grid(table.shape[1])[1]:
    arrays["backbone.cls_token"] = token + table[:, :1]
    arrays["backbone.pos_embed"] = table[:, 1:]


def _check_heads(project: str, architecture: Architecture) -> None:
  """Raises UserError for heads of another size, which the names do not show."""
  is_small = architecture.is_vit and architecture.network().heads == 6
  if project == "MoCo v3" and is_small:
    raise UserError(
      "MoCo v3's ViT-S has 12 heads of 32 channels; expected heads of 64, as"
      " timm's, DINO's and MAE's. Its ViT-B can be imported."
    )


def _take_loss_norm(
  arrays: dict[str, np.ndarray], names: Mapping[str, str]
) -> tuple[str, ...]:
  """Removes the batch norm of Barlow Twins' loss, which has no weights."""
  suffixes = ("running_mean", "running_var", NUM_BATCHES)
  found = [f"bn.{s}" for s in suffixes if f"bn.{s}" in arrays]
  for name in found:
    del arrays[name]
  return tuple(names[name] for name in found)


# ---- checks ----------------------------------------------------------------


def listed(
  names: Iterable[str], limit: int = 8, shown: Callable[[str], str] = str
) -> str:
  """Returns "a, b, c", and how many more there are beyond the limit."""
  names = list(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(one_line(shown(name), 100) for name in names[:limit]) + more


def _shown(
  names: Mapping[str, str], spell: Callable[[str], str], name: str
) -> str:
  """Returns the file's name for one of ours, or one in the file's style."""
  if name in names:
    return spell(names[name])
  part, _, rest = name.partition(".")
  for known, key in names.items():
    same, _, tail = known.partition(".")
    if same == part and key.endswith(tail):
      name = key.removesuffix(tail) + rest
      break
  if any(re.search(r"\.shortcut\.[01]\.", key) for key in names.values()):
    name = name.replace(".downsample.", ".shortcut.")
  return spell(name)


def _check(
  found: Mapping[str, tuple[int, ...]],
  expected: Mapping[str, tuple[int, ...]],
  architecture: Architecture,
  shown: Callable[[str], str] = str,
) -> None:
  """Raises UserError that names all missing, unexpected, misshapen arrays."""
  problems = []
  missing = [key for key in expected if key not in found]
  if missing:
    problems.append(f"missing {listed(missing, shown=shown)}")
  unexpected = [key for key in found if key not in expected]
  if unexpected:
    problems.append(f"unexpected {listed(unexpected, shown=shown)}")
  misshapen = [
    f"{shown(key)} is {list(found[key])} instead of {list(shape)}"
    for key, shape in expected.items()
    if key in found and tuple(found[key]) != shape
  ]
  if misshapen:
    problems.append(f"misshapen: {listed(misshapen)}")
  if problems:
    raise UserError(
      f"The weights do not fit {architecture.describe()}: "
      f"{'; '.join(problems)}."
    )


def as_floats(
  name: str, values: np.ndarray, dtype: Any = np.float32
) -> np.ndarray:
  """Returns values in another precision.

  Raises:
    UserError: A trained network cannot have these values.
  """
  if not np.issubdtype(values.dtype, np.floating):
    raise UserError(
      f"{name} holds {values.dtype} values; expected floating point (a "
      "quantized network cannot be imported)."
    )
  with np.errstate(over="ignore"):
    floats = values.astype(dtype, copy=False)
  if not np.isfinite(floats).all():
    raise UserError(
      f"{name} holds values that are not finite: the file is damaged or the "
      "training diverged."
    )
  return floats
