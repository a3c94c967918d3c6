"""Lists the recipes, prints one, or copies one to change it.

  imsvd recipes
  imsvd recipes show digits
  imsvd recipes copy digits mine.py

A recipe is trained by its name, `imsvd train --config=digits`, and a copy by
its file, `--config=mine.py`. `imsvd recipes show common` prints every key that
a recipe can set, with its default and meaning.
"""

import ast
import pathlib
import re
import shlex

from imsvd_jax.base import files, recipe_files
from imsvd_jax.base.errors import UserError, suggestion
from imsvd_jax.commands import command_line


def main(action: str = "list", name: str = "", target: str = "") -> None:
  """Does what the first word says."""
  if action == "list":
    print(_table())
  elif action == "show" and not target:
    print(_text(name), end="")
  elif action == "copy":
    _copy(name, pathlib.Path(target or f"{name}.py").expanduser())
  else:
    raise UserError(
      f"Cannot {action!r} recipes; expected list, show NAME, or copy NAME"
      " FILE.py."
    )


def _table() -> str:
  rows = {name: _about(name) for name in recipe_files.names()}
  width = max(map(len, rows))
  return "\n".join(f"{name:{width}}  {about}" for name, about in rows.items())


def _about(name: str) -> str:
  """Returns the first sentence of a recipe; nothing of it is executed."""
  doc = ast.get_docstring(ast.parse(_text(name))) or ""
  return re.sub(r"\s+", " ", doc.partition("\n\n")[0])


def _text(name: str) -> str:
  path = recipe_files.FOLDER / f"{name}.py"
  known = [*recipe_files.names(), "common"]
  if name not in known:
    raise UserError(
      f"No recipe {name!r}.{suggestion(name, known)} `imsvd recipes` lists"
      " them."
    )
  return path.read_text()


def _copy(name: str, target: pathlib.Path) -> None:
  text = _text(name)
  if target.exists():
    raise UserError(f"{target} exists already; name another file.")
  files.write_whole(str(target), text.encode())
  quoted = shlex.quote(str(target))
  print(f"Wrote {target}; train it with: imsvd train --config={quoted}")


def run() -> None:
  """Runs the command line."""
  command_line.run(main, max_arguments=3)


if __name__ == "__main__":
  run()
