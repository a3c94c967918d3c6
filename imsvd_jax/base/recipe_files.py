"""Recipes: Python files outside of the package, found by path or by name.

The recipes of this project are the folder `configs` of a checkout. A wheel
holds it as `imsvd_jax/recipes/configs`, so that names work anywhere.
"""

import importlib.machinery
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Sequence
from typing import NoReturn

from ml_collections import ConfigDict

import imsvd_jax
from imsvd_jax.base.errors import UserError, suggestion

EXAMPLE = "digits"

_PACKAGE = pathlib.Path(imsvd_jax.__file__).parent
_IN_WHEEL = _PACKAGE / "recipes" / "configs"
FOLDER = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent / "configs"
_NO_RECIPE = ("__init__", "common")


def names() -> list[str]:
  """Returns the names of this project's recipes."""
  found = sorted(path.stem for path in FOLDER.glob("*.py"))
  return [name for name in found if name not in _NO_RECIPE]


def locate(argument: str) -> tuple[str, str]:
  """Returns the file and the mode of `RECIPE[:MODE]`, ready to be executed.

  A recipe imports `configs.common` of its own checkout, which Python would
  only find in the working directory; this adds the checkout to sys.path.

  Args:
    argument: A name, "digits"; or a file, "FILE.py"; the name also as the file
      that it has in a checkout, "configs/digits.py".

  Raises:
    UserError: There is no such recipe.
  """
  given, _, mode = argument.partition(":")
  path = given if os.path.isfile(given) else _of_this_project(given)
  if path is None:
    found = "a folder" if os.path.isdir(given) else "nothing"
    raise UserError(
      f"No recipe {given!r}: found {found}.{suggestion(given, names())}"
      " Expected a file FILE.py, or a name that `imsvd recipes` lists, such as"
      f" {EXAMPLE}; either may end in :MODE."
    )
  checkout = os.path.dirname(os.path.dirname(os.path.abspath(path)))
  is_checkout = os.path.isfile(os.path.join(checkout, "configs", "common.py"))
  if is_checkout and checkout not in sys.path:
    sys.path.insert(0, checkout)
  if str(FOLDER.parent) not in sys.path:  # For recipes outside of a checkout.
    sys.path.append(str(FOLDER.parent))
  return path, mode


def load(argument: str) -> ConfigDict:
  """Executes a recipe, `NAME[:MODE]` or `FILE.py[:MODE]`; returns its config.

  Raises:
    UserError: There is no such recipe, or it cannot be executed; the message
      has the line of the file.
  """
  path, mode = locate(argument)
  if not path.endswith(".py"):
    raise UserError(f"{path} is no recipe; expected a Python file, FILE.py.")
  module = types.ModuleType("recipe")
  try:
    importlib.machinery.SourceFileLoader("recipe", path).exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
      get_config = _no_get_config
    config = get_config(mode) if ":" in argument else get_config()
  except (Exception, SystemExit) as error:
    raise UserError(_failed(argument, path, error)) from error
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"{shown(argument)}: get_config returned {type(config).__name__};"
      " expected an ml_collections.ConfigDict."
    )
  return config


def _no_get_config(mode: str = "") -> NoReturn:
  del mode
  raise UserError(
    "there is no function get_config, which returns the config; `imsvd recipes"
    f" copy {EXAMPLE} FILE.py` writes a recipe to change."
  )


def _failed(argument: str, path: str, error: BaseException) -> str:
  """Returns one line about a recipe that raised: its own words, or a place."""
  if isinstance(error, ImportError):
    return (
      f"The recipe cannot be loaded: {error}. Recipes import from the checkout"
      " that they are in (FOLDER/configs), from the working directory and from"
      " what is installed."
    )
  if isinstance(error, SyntaxError):
    return f"{error.filename or path}, line {error.lineno}: {error.msg}."
  text = " ".join(str(error).split())
  frames = traceback.extract_tb(error.__traceback__)
  if isinstance(error, ValueError) and _is_raised_by_recipes(frames[-1], path):
    return f"{shown(argument)}: {text}"
  lines = [frame.lineno for frame in frames if frame.filename == path]
  place = f"{path}, line {lines[-1]}" if lines else path
  return f"{place}: {type(error).__name__}: {text}"


def _is_raised_by_recipes(frame: traceback.FrameSummary, path: str) -> bool:
  """Returns whether this file or a recipe has the statement that raised."""
  folder = os.path.dirname(frame.filename)
  is_ours = frame.filename == __file__ or folder == os.path.dirname(path)
  return is_ours and (frame.line or "").startswith("raise")


def _of_this_project(given: str) -> str | None:
  """Returns the file of "NAME" or "configs/NAME.py"; None if there is none."""
  match = re.fullmatch(r"(?:configs/(?=.*\.py))?(\w+)(?:\.py)?", given)
  path = FOLDER / f"{match[1]}.py" if match else None
  return str(path) if path and path.is_file() else None


def with_files(arguments: Sequence[str]) -> list[str]:
  """Returns the words of a command line, the recipe of --config as a file.

  What cannot be found stays as it is, for `locate` to complain about.
  """
  words = list(arguments)
  for i, word in enumerate(words):
    match = re.fullmatch(r"(--?config)(?:=(.*))?", word)
    if match and match[2] is not None:
      words[i] = f"{match[1]}={_file_of(match[2])}"
    elif match and i + 1 < len(words):
      words[i + 1] = _file_of(words[i + 1])
  return words


def _file_of(argument: str) -> str:
  given, colon, mode = argument.partition(":")
  if os.path.isfile(given):
    return argument
  path = _of_this_project(given)
  return f"{path}{colon}{mode}" if path else argument


def shown(argument: str) -> str:
  """Returns the name of a recipe of this project; of others what is given."""
  path, colon, mode = argument.partition(":")
  file = pathlib.Path(path)
  return f"{file.stem}{colon}{mode}" if file.parent == FOLDER else argument
