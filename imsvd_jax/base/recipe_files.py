"""Recipe files: Python outside of the package, found by path."""

import os
import sys

from imsvd_jax.base.errors import UserError

EXAMPLE = "configs/digits.py"


def locate(argument: str) -> tuple[str, str]:
  """Returns the file and the mode of `FILE.py[:MODE]`, ready to be executed.

  A recipe imports `configs.common` of its own checkout, which Python would
  only find in the working directory; this adds the checkout to sys.path.

  Raises:
    UserError: There is no such file.
  """
  path, _, mode = argument.partition(":")
  if not os.path.isfile(path):
    found = "a folder" if os.path.isdir(path) else "nothing"
    raise UserError(
      f"No recipe {path!r}: found {found}, expected a file FILE.py[:MODE] such"
      f" as {EXAMPLE}."
    )
  checkout = os.path.dirname(os.path.dirname(os.path.abspath(path)))
  is_checkout = os.path.isfile(os.path.join(checkout, "configs", "common.py"))
  if is_checkout and checkout not in sys.path:
    sys.path.insert(0, checkout)
  return path, mode


def import_failed(error: ImportError) -> str:
  """Returns one line about a recipe whose import fails."""
  return (
    f"The recipe cannot be loaded: {error}. Recipes import from the checkout"
    " that they are in (FOLDER/configs), from the working directory and from"
    " what is installed."
  )
