"""Runs of the trainer that the reliability tests compare, kill and starve.

As a process of its own: `python train_child.py WORKDIR MOMENT`, where MOMENT is
"never", "step:N" (killed once step N is done) or "saving:N" (killed while the
checkpoint of step N is being written).
"""

import os
import signal
import sys

from configs import digits


def small_config(**overrides):
  """Nine steps in three epochs, saved at every second, in a tiny model."""
  config = digits.get_config("debug")
  config.update_from_flattened_dict(
    {
      "epochs": 3.0,
      "data.num_examples": 48,
      "data.image_size": 16,
      "data.resize": 16,
      "data.crop": 16,
      "views.view1.size": 16,
      "views.view2.size": 16,
      "checkpoint.every_steps": 2,
      "eval.every_epochs": 2.0,
      **overrides,
    }
  )
  return config


def get_config(mode: str = ""):
  """The same as a recipe, of more steps than any test waits for.

  With the mode "soak": 300 steps, saved at every second, and a target network.
  With the mode "chaos": 36 steps like these, saved at every third.
  """
  if mode == "chaos":
    return small_config(
      **{
        "objective.name": "mveb",
        "epochs": 12.0,
        "eval.every_epochs": 4.0,
        "checkpoint.every_steps": 3,
      }
    )
  if mode == "soak":
    return small_config(
      **{
        "objective.name": "mveb",
        "epochs": 100.0,
        "eval.every_epochs": 20.0,
      }
    )
  return small_config(**{"epochs": 1e5, "eval.every_epochs": 0.0})


def _die() -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _die_at(moment: str) -> None:
  """Arranges the death, from outside of the program under test."""
  from imsvd_jax.runs import checkpointer, log_lines

  kind, _, number = moment.partition(":")
  owner, name = {
    "step": (log_lines.StepLog, "add"),
    "saving": (checkpointer.Checkpointer, "save"),
  }[kind]
  call = getattr(owner, name)

  def call_and_die(self, step, *args, **kwargs):
    result = call(self, step, *args, **kwargs)
    if step == int(number):
      _die()
    return result

  setattr(owner, name, call_and_die)


if __name__ == "__main__":
  # Late, because the command line reads this file as a recipe.
  from imsvd_jax import train

  if sys.argv[2] != "never":
    _die_at(sys.argv[2])
  train.train_and_evaluate(small_config(), sys.argv[1])
