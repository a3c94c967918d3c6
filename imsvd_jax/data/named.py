"""How commands name a data set: folder:DIR, arrays:FILE, tfds:NAME, digits."""

import os
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from imsvd_jax.base.config import ADDED_KEYS
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import printable
from imsvd_jax.data import SOURCES, tensorflow_needed

EXPECTED = "folder:DIR, arrays:FILE, tar:DIR, tfds:NAME or digits"
# Keys of `config.data` that make sense for one data set only.
_OF_ITS_OWN_DATA = (
  *("holdout", "holdout_seed", "image_key", "label_key", "labels"),
)


def name_and_path(text: str) -> tuple[str, str]:
  """Returns `data.name` and `data.path` of a data set.

  Args:
    text: "KIND:PATH" or "KIND=PATH", a folder alone, or "NAME" or "NAME=PATH"
      where the name is "tfds:cifar10" or one of a source that needs no path.

  Raises:
    UserError: There is no such source, or no such file.
  """
  files = re.fullmatch(r"(folder|arrays|tar)(?:[:=](.*))?", text, re.DOTALL)
  if files:
    kind, path = files[1], files[2] or ""
    _check_exists(text, kind, path)
    return kind, path
  name, _, path = text.partition("=")
  kind, _, of_tfds = name.partition(":")
  if kind not in SOURCES and os.path.isdir(os.path.expanduser(text)):
    return "folder", text
  if kind not in SOURCES and os.sep in kind:
    raise UserError(
      f"--data={printable(text)}: there is no such folder; expected {EXPECTED}."
    )
  lookup(SOURCES, kind, "data source")
  if (kind == "tfds") != bool(of_tfds):
    raise UserError(f"--data={printable(text)}; expected {EXPECTED}.")
  return name, path


def choose(settings: ConfigDict, text: str) -> None:
  """Makes data settings those of another data set; its own keys are reset.

  Args:
    settings: As `config.data`, perhaps of an earlier version.
    text: As `name_and_path` has it.

  Raises:
    UserError: There is no such source, or no such file.
  """
  settings.name, settings.path = name_and_path(text)
  settings.num_examples = 0
  for key in _OF_ITS_OWN_DATA:
    if key in settings:
      settings[key] = ADDED_KEYS[f"data.{key}"]


def check(text: str, splits: Sequence[str] = ()) -> None:
  """Finds what is wrong with a data set before weights are loaded.

  Args:
    text: As `name_and_path` has it.
    splits: Splits to be read, as `data.train_split`; checked for TFDS, whose
      splits are known without reading images.

  Raises:
    UserError: There is no such data set, file or split.
  """
  name, path = name_and_path(text)
  if name.startswith("tfds:"):
    with tensorflow_needed("Source 'tfds'"):
      from imsvd_jax.data.sources import tfds

      tfds.check(name, path, splits)


def _check_exists(text: str, kind: str, path: str) -> None:
  if not path:
    raise UserError(f"--data={text} names no file; expected {EXPECTED}.")
  # A tar path may be a pattern, which its source explains.
  local = kind != "tar" and "://" not in path
  if local and not os.path.exists(os.path.expanduser(path)):
    raise UserError(
      f"--data={printable(text)}: {printable(path)} does not exist; expected"
      f" {EXPECTED}."
    )
