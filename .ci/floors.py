"""Prints NAME==VERSION for each NAME>=VERSION of setup.py, torch's included."""

import ast
import pathlib
import re

SETUP = pathlib.Path(__file__).parents[1] / "setup.py"


def main() -> None:
  """Prints the lowest version of every requirement of the package."""
  call = ast.parse(SETUP.read_text()).body[-1].value
  given = {word.arg: word.value for word in call.keywords}
  extras = given["extras_require"]
  lists = [given["install_requires"]]
  for key, value in zip(extras.keys, extras.values, strict=True):
    if key.value == "torch":
      lists.append(value)
  for requirement in [r for node in lists for r in ast.literal_eval(node)]:
    found = re.match(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", requirement)
    print(f"{found[1]}=={found[2]}")


if __name__ == "__main__":
  main()
