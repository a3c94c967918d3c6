"""Pretrains an encoder: `python -m imsvd_jax.main --config=configs/digits.py`.

Any key of the recipe can be set on the command line
(`--config.batch_size=256`); `:debug` after the file's name runs a tiny version.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from imsvd_jax.commands import command_line

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Recipe file, such as configs/digits.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir",
  "",
  "Directory of the run: checkpoints, metrics. Default: runs/NAME, NAME being"
  " the recipe's.",
)
_join_cluster = command_line.define_cluster_flags()


def default_workdir(config_path: str) -> str:
  """Returns runs/NAME for configs/NAME.py and runs/NAME-MODE with a mode."""
  path, _, mode = config_path.partition(":")
  name = pathlib.Path(path).stem
  return str(pathlib.Path("runs") / (f"{name}-{mode}" if mode else name))


def main(argv: Sequence[str]) -> None:
  """Trains the recipe of --config in --workdir."""
  del argv
  _join_cluster()
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.train import train_and_evaluate

  config_path = config_flags.get_config_filename(flags.FLAGS["config"])
  workdir = _WORKDIR.value or default_workdir(config_path)
  train_and_evaluate(_CONFIG.value, workdir)


def run() -> None:
  """Runs the command line."""
  command_line.require_config()
  command_line.run(main)


if __name__ == "__main__":
  run()
