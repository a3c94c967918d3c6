"""How commands name a data set: folder:DIR, pack:DIR, tfds:NAME, digits."""

import os
import re
from collections.abc import Sequence

from ml_collections import ConfigDict

from imsvd_jax.base.config import ADDED_KEYS
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import printable
from imsvd_jax.data import DRAWN, SOURCES, WITHOUT_FILES, tensorflow_needed
from imsvd_jax.data.sources import arrays, digits

EXPECTED = "folder:DIR, arrays:FILE, tar:DIR, pack:DIR, tfds:NAME or digits"
# Sources that need `data.path`.
IN_FILES = ("folder", "arrays", "pack", "tar")
# Keys of `config.data` that make sense for one data set only.
OF_ITS_OWN_DATA = (
  *("holdout", "holdout_seed", "image_key", "label_key", "labels"),
)

# Usual names of splits to evaluate on, those without hidden labels first.
_EVALUATION = ("validation", "val", "valid", "test")


def name_and_path(text: str) -> tuple[str, str]:
  """Returns `data.name` and `data.path` of a data set.

  Args:
    text: "KIND:PATH" or "KIND=PATH", a folder alone, or "NAME" or "NAME=PATH"
      where the name is "tfds:cifar10" or one of a source that needs no path.

  Raises:
    UserError: There is no such source, or no such file.
  """
  files = re.fullmatch(rf"({'|'.join(IN_FILES)})(?:[:=](.*))?", text, re.DOTALL)
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

  The name of a split stays where the data have one of that name; otherwise it
  is "train", or the first of the usual names for evaluation.

  Args:
    settings: As `config.data`, perhaps of an earlier version.
    text: As `name_and_path` has it.

  Raises:
    UserError: There is no such source, or no such file; or it draws as many
      images as the settings say, which do not.
  """
  settings.name, settings.path = name_and_path(text)
  if settings.name not in DRAWN:
    settings.num_examples = 0
  elif not settings.num_examples:
    raise UserError(
      f"--data={text} draws data.num_examples images, and this run has no such"
      f" number; expected {EXPECTED}."
    )
  for key in OF_ITS_OWN_DATA:
    if key in settings:
      settings[key] = ADDED_KEYS[f"data.{key}"]
  _choose_splits(settings)


def _choose_splits(settings: ConfigDict) -> None:
  """Replaces names of splits that the data do not have, where others fit.

  Without such a name they stay: the source says which ones there are.
  """
  names = _split_names(settings)
  train, evaluation = settings.train_split, settings.eval_split
  if train in names and evaluation in names:
    return
  others = [name for name in _EVALUATION if name in {*names} - {train}]
  if evaluation not in names and others:
    evaluation = others[0]
  is_part = "[" in evaluation  # Of train, as the run divides it.
  if train not in names and not is_part:
    if "train" in names:
      train = "train"
    elif len(names) == 1:
      train = names[0]
  settings.train_split, settings.eval_split = train, evaluation


def _split_names(settings: ConfigDict) -> Sequence[str]:
  """Returns the names of the splits; none of a source that takes any name."""
  kind = settings.name.partition(":")[0]
  if kind == "arrays":
    return arrays.split_names(settings)
  if kind == "pack":
    from imsvd_jax.data.sources import packed

    return packed.split_names(settings)
  if kind in WITHOUT_FILES:
    return digits.SPLITS
  with tensorflow_needed(f"Source {kind!r}"):
    if kind == "folder":
      from imsvd_jax.data.sources import folder_splits

      return folder_splits.split_names(settings)
    if kind == "tar":
      from imsvd_jax.data.sources import tar

      return tar.split_names(settings)
    if kind == "tfds":
      from imsvd_jax.data.sources import tfds

      return tfds.split_names(settings)
  return ()


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
