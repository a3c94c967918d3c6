"""Numbers of a run on Weights & Biases, where `log.wandb_project` names one."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from imsvd_jax.base import files, metric_groups
from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import run_directory


class WandbWriter:
  """Writes to one run of wandb, which a resumed run continues.

  Args:
    project: Name of the project.
    workdir: The run's directory; its id is that of the run there.
    config: The recipe.
  """

  def __init__(
    self, project: str, workdir: str, config: Mapping[str, Any]
  ) -> None:
    try:
      import wandb
    except ImportError as error:
      raise UserError(
        f"log.wandb_project={project!r} needs the package wandb ({error}):"
        ' `pip install wandb`, or --config.log.wandb_project="".'
      ) from error
    self._wandb = wandb
    directory = files.absolute(workdir)
    try:
      self._run = wandb.init(
        project=project,
        id=run_directory.read_id(directory),
        name=directory.name,
        resume="allow",
        dir=None if files.is_remote(directory) else os.fspath(directory),
        config=flatten(config),
      )
    except Exception as error:
      raise UserError(
        f"Weights & Biases does not start: {error}. `wandb login` signs in;"
        " with WANDB_MODE=offline the numbers stay on this machine."
      ) from error
    # A resumed run writes some steps again, which wandb's own count forbids.
    self._run.define_metric("*", step_metric="step")

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Sends numbers, words, pictures and samples of a step."""
    tagged = {
      metric_groups.tag(name): self._as_seen(v) for name, v in values.items()
    }
    self._run.log({"step": step, **tagged})

  def _as_seen(self, value: Any) -> Any:
    """Returns a picture or a sample as wandb shows it."""
    kinds = {3: self._wandb.Image, 1: self._wandb.Histogram}
    kind = kinds.get(np.ndim(value))
    return kind(value) if kind else value

  def sync(self) -> None:
    """Does nothing: wandb sends by itself."""

  def close(self) -> None:
    """Sends what is left."""
    self._run.finish()
