"""Checks the recipe of --config and its changed keys, without a device.

  python -m imsvd_jax.commands.check_recipe --config=configs/digits.py

The scripts in launch/ call it with the flags of `imsvd train` before they
start processes. The data are not read.
"""

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

_CONFIG = shared_flags.define_config()
# The other flags of `imsvd train`.
flags.DEFINE_string("workdir", "", "Not looked at.")
shared_flags.define_cluster()


def main() -> None:
  """Checks; a mistake is one line and exit code 2."""
  from imsvd_jax.training import experiment

  experiment.check(_CONFIG.value)


if __name__ == "__main__":
  command_line.run(main, required=shared_flags.REQUIRED_CONFIG)
