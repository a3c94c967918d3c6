"""`imsvd COMMAND`, which is `python -m imsvd_jax COMMAND`."""

import importlib
from typing import NamedTuple

import imsvd_jax
from imsvd_jax.base import interrupts


class Command(NamedTuple):
  """A command: the module that has its `run()`, and one line about it."""

  module: str
  about: str


COMMANDS = {
  "train": Command("main", "pretrain an encoder by a recipe, or resume"),
  "recipes": Command("commands.recipes", "list, print or copy the recipes"),
  "evaluate": Command("commands.evaluate", "measure runs by named protocols"),
  "explain": Command(
    "commands.explain", "show what each variable of a run means"
  ),
  "export": Command("commands.export", "write weights for PyTorch and others"),
  "import_weights": Command(
    "commands.import_weights", "make a run from a file of weights"
  ),
  "embed": Command(
    "commands.embed", "write features, and codes, of a folder of images"
  ),
  "search": Command(
    "commands.search", "find images by meaning, duplicates and outliers"
  ),
  "data": Command(
    "commands.data", "check the images of a recipe, and show its views"
  ),
  "pack": Command(
    "commands.pack", "decode and resize images once, for faster training"
  ),
  "runs": Command("commands.runs", "list runs, and how each is doing"),
  "compare": Command(
    "commands.compare", "train recipes side by side, over seeds"
  ),
  "benchmark": Command(
    "commands.benchmark", "measure speed and precision on this machine"
  ),
  "preflight": Command(
    "commands.preflight", "compile a step for TPUs that are not here"
  ),
}


def main() -> None:
  """Runs the command that the first word names; alone, lists the commands."""
  interrupts.listen()
  # Imported late: it takes a while, and SIGINT must be quiet before.
  from imsvd_jax.commands import command_line

  name = command_line.pick(
    "imsvd",
    {name: command.about for name, command in COMMANDS.items()},
    version=f"imsvd_jax {imsvd_jax.__version__}",
  )
  importlib.import_module(f"imsvd_jax.{COMMANDS[name].module}").run()


if __name__ == "__main__":
  main()
