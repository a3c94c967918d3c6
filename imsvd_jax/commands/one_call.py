"""`imsvd train` as a Python function: `imsvd_jax.pretrain`."""

import ast
import os
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax.base import console, cpu_devices, distributed, recipe_files
from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError, suggestion
from imsvd_jax.commands import decoder_lines
from imsvd_jax.data import SOURCES
from imsvd_jax.data.named import IN_FILES
from imsvd_jax.runs.encoder import LoadedEncoder, load_encoder
from imsvd_jax.train import train_and_evaluate

_SHORT = {"backbone": "model.backbone"}
_BY_ENDING = {".npz": "arrays", ".npy": "arrays", ".tar": "tar"}
# A key of the recipe as a flag: its name, and a value that may be quoted.
_FLAG = re.compile(
  r"--config\.(?P<name>\w+(?:\.\w+)*)"
  r"(?P<equals>=(?:\"(?P<quoted>[^\"]*)\"|(?P<plain>[\w:/+-]+(?:\.\w+)*))?)?"
)
_TWO_FLAGS = re.compile(r"(--config\.\S+) (?=--config\.)")


def pretrain(
  data: str | os.PathLike[str] = "",
  out: str | os.PathLike[str] = "",
  *,
  recipe: str = "folder_r50",
  **keys: Any,
) -> LoadedEncoder:
  """Pretrains an encoder without labels, or resumes a run, and loads it.

    encoder = imsvd_jax.pretrain("~/images", "runs/mine", epochs=100)
    features = encoder(images)  # uint8 [B, H, W, 3] -> float32 [B, F]

  It is `imsvd train`: the same checks, checkpoints, log and evaluation. The
  same call resumes a run that was stopped, and loads one that has ended.

  Args:
    data: A folder of images; an .npz, .npy or .tar file; or what to read and
      where: "folder:DIR", "arrays:FILE", "tar:DIR", "pack:DIR", "tfds:NAME",
      "digits". By default the recipe's own data.
    out: Directory of the run.
    recipe: A name that `imsvd recipes` lists, or a file; either may end in
      :MODE.
    **keys: Keys of the recipe (`imsvd recipes show common`): `epochs=100`,
      `batch_size=64`, `backbone="resnet50"`. A dot is two underscores:
      `optimizer__name="sgd"` or `**{"optimizer.name": "sgd"}`.

  Returns:
    The encoder, as `load_encoder(out)` does.

  Raises:
    UserError: A key, the data or the directory does not fit.
    Stopped: A SystemExit; see `train_and_evaluate`.
  """
  workdir = _path("out", out)
  if not workdir:
    raise UserError(
      'pretrain needs out=, the directory of the run, such as "runs/mine".'
    )
  config = recipe_files.load(recipe)
  _change(config, {**_data_keys(_path("data", data)), **_dotted(keys)})
  cpu_devices.spare_threads()
  distributed.initialize()
  try:
    with decoder_lines.hidden(), console.reworded(_in_python):
      train_and_evaluate(config, workdir)
  except UserError as error:
    raise type(error)(_in_python(str(error))) from None
  return load_encoder(workdir)


def _path(name: str, value: Any) -> str:
  """Returns a path as text.

  Raises:
    UserError: It is none.
  """
  try:
    return os.fsdecode(value)
  except TypeError:
    raise UserError(
      f"{name}={value!r}; expected a path as text or a pathlib.Path."
    ) from None


def _in_python(text: str) -> str:
  """Writes the flags in a message as arguments of `pretrain`."""
  text = _FLAG.sub(_as_argument, _TWO_FLAGS.sub(r"\1, ", text))
  return re.sub(r"--workdir(?!=)", "out=", text)  # With a value: a command's.


def _as_argument(flag: re.Match[str]) -> str:
  name = flag["name"].replace(".", "__")
  if not flag["equals"]:
    return name
  value = flag["plain"] if flag["quoted"] is None else flag["quoted"]
  if value is None:
    return f"{name}="
  try:
    ast.literal_eval(value)
  except (SyntaxError, ValueError):
    value = f'"{value}"'
  return f"{name}={value}"


def _data_keys(text: str) -> dict[str, str]:
  """Returns the keys of the recipe that make it read `data`."""
  if not text:
    return {}
  kind, _, place = text.partition(":")
  if kind in IN_FILES and place:
    return {"data.name": kind, "data.path": place}
  is_file = os.path.exists(os.path.expanduser(text))
  if kind in SOURCES and kind not in IN_FILES and not is_file:
    return {"data.name": text}
  name = _BY_ENDING.get(os.path.splitext(text)[1].lower(), "folder")
  return {"data.name": name, "data.path": text}


def _dotted(keys: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keys by their names in the recipe."""
  found: dict[str, Any] = {}
  for key, value in keys.items():
    name = _SHORT.get(key, key.replace("__", "."))
    if name in found:
      raise UserError(f"The key {name!r} is given twice; leave one out.")
    found[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
  return found


def _change(config: ConfigDict, changes: Mapping[str, Any]) -> None:
  """Sets keys of a recipe, by their dotted names.

  Raises:
    UserError: The recipe has no such key, or it has values of another type.
  """
  known = flatten(config)
  for key, value in changes.items():
    if key not in known:
      ends = [name for name in known if name.endswith(f".{key}")]
      hint = f" Did you mean {ends[0]!r}?" if ends else suggestion(key, known)
      raise UserError(
        f"The recipe has no key {key!r}.{hint} `imsvd recipes show common`"
        " has all keys; a dot is two underscores: optimizer__name."
      )
    try:
      if value is None:
        raise TypeError
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
      raise UserError(
        f"{key}={value!r}; expected a value like {known[key]!r}."
      ) from error
