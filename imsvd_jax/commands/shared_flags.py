"""Flags that several commands have, each defined in one place."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import ConfigDict, config_flags

from imsvd_jax.base import distributed, recipe_files
from imsvd_jax.base.options import STEP
from imsvd_jax.commands import command_line, option_flags

if TYPE_CHECKING:  # It imports JAX.
  from imsvd_jax.benchmarks.text import Findings


@dataclasses.dataclass(frozen=True)
class _Step:
  step: str | None = STEP


_CONFIG = (
  "Recipe: a name of `imsvd recipes`, or FILE.py; NAME:debug is a tiny version."
  " --config.KEY=VALUE changes a key of it: --config.batch_size=256,"
  " --config.data.path=~/images. `imsvd recipes show common` describes every"
  " key."
)
REQUIRED_CONFIG = {"config": recipe_files.EXAMPLE}


def define_config(
  about: str = _CONFIG, default: str | None = None
) -> flags.FlagHolder[ConfigDict]:
  """Defines --config, a recipe whose keys are flags too.

  `default` is a name of `imsvd recipes`.
  """
  if default:
    # It is executed at once, and must find the files that it imports.
    default, _ = recipe_files.locate(default)
  # Before ml_collections reads the command line, to find the recipe's keys.
  sys.argv[1:] = recipe_files.with_files(sys.argv[1:])
  try:
    return config_flags.DEFINE_config_file(
      "config", default, about, lock_config=True
    )
  except flags.Error as error:  # ml_collections reads --flagfile here.
    command_line.fail(str(error).removeprefix("ERROR:: "))


def config_name() -> str:
  """Returns the recipe of --config: a name or a file, perhaps with :MODE."""
  given = config_flags.get_config_filename(flags.FLAGS["config"])
  return recipe_files.shown(given)


def config_arguments() -> list[str]:
  """Returns the flags that name the recipe and change its keys."""
  flag = flags.FLAGS["config"]
  changes = config_flags.get_override_values(flag)
  return [
    f"--config={config_flags.get_config_filename(flag)}",
    *(f"--config.{key}={value}" for key, value in changes.items()),
  ]


def define_step() -> Callable[[], str | None]:
  """Defines --step, the checkpoint to take; returns what reads it."""
  step = option_flags.define_flags(_Step)
  return lambda: step().step


def define_target() -> flags.FlagHolder[bool]:
  """Defines --target, to take the EMA target network."""
  return flags.DEFINE_bool(
    "target", False, "Take the EMA target network's weights."
  )


def define_json() -> Callable[[Findings], None]:
  """Defines --json.

  Returns:
    A function that prints the findings of a benchmark as --json says.
  """
  as_json = flags.DEFINE_bool("json", False, "Print the numbers as JSON.")

  def show(findings: Findings) -> None:
    if as_json.value:
      print(json.dumps(findings.numbers, indent=2))
    else:
      print(findings.text)

  return show


def define_cluster() -> Callable[[], None]:
  """Defines the flags of a run of several processes.

  Returns:
    A function that joins the other processes. Call it before anything touches
    a device; in a run of one process it does nothing.
  """
  address = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, for a run of several processes. TPU pods, SLURM"
    " and Open MPI set this flag and the two below by themselves.",
  )
  count = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run.", lower_bound=1
  )
  number = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
  )
  seconds = flags.DEFINE_float(
    "join_seconds", 300.0, "How long to wait for the other processes, seconds."
  )
  return lambda: distributed.initialize(
    address.value, count.value, number.value, timeout_seconds=seconds.value
  )
