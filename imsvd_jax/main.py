"""Pretrains an encoder by a recipe, or resumes where a run stopped.

  imsvd train --config=digits

which is `python -m imsvd_jax.main --config=digits`. The run's
directory holds its checkpoints and metrics; the same command resumes it.
"""

from imsvd_jax.base import interrupts  # isort: skip

if __name__ == "__main__":
  interrupts.listen()  # The imports below take a while.

import pathlib

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

_CONFIG = shared_flags.define_config()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Directory of the run. By default runs/NAME for the recipe NAME.py, and"
  " runs/NAME-MODE for NAME.py:MODE.",
)
_join_cluster = shared_flags.define_cluster()


def default_workdir(config_path: str) -> str:
  """Returns runs/NAME for configs/NAME.py and runs/NAME-MODE with a mode."""
  path, _, mode = config_path.partition(":")
  name = pathlib.Path(path).stem
  return str(pathlib.Path("runs") / (f"{name}-{mode}" if mode else name))


def main() -> None:
  """Trains the recipe of --config in --workdir."""
  _join_cluster()
  from imsvd_jax.train import train_and_evaluate

  workdir = _WORKDIR.value or default_workdir(shared_flags.config_name())
  train_and_evaluate(_CONFIG.value, workdir)


def run() -> None:
  """Runs the command line."""
  command_line.run(main, required=shared_flags.REQUIRED_CONFIG)


if __name__ == "__main__":
  run()
