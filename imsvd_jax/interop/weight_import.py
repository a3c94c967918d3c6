"""Makes a run's directory from a file of weights."""

import copy
import os
from typing import NoReturn

from ml_collections import ConfigDict

from imsvd_jax import formats
from imsvd_jax.base import files
from imsvd_jax.base.config import ADDED_KEYS
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.formats.torchvision import listed
from imsvd_jax.models import OPTIONS
from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.runs import lock, ownership
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.weight_files import as_config, stored_config, stored_step
from imsvd_jax.training import experiment


def import_weights(
  file: str,
  workdir: str,
  config: ConfigDict | None = None,
  *,
  prefix: str = "",
) -> list[str]:
  """Writes a workdir with one checkpoint that holds a file's weights.

  The network of the recipe is replaced by the file's.

  Args:
    file: Of weights.
    workdir: The new run's.
    config: The recipe; by default the one in the file.
    prefix: How the backbone's names begin, in a layout that is not known.

  Returns:
    What was read and changed, line by line.

  Raises:
    UserError: The file is damaged or does not fit the recipe, or the workdir
      has a run already, or other files.
  """
  workdir = os.path.expanduser(workdir)
  file = os.path.expanduser(file)
  _check_is_new(workdir)
  imported = formats.read_file(file, prefix=prefix)
  given, config = config, config or stored_config(file, imported)
  if config is None:
    raise UserError(
      f"{file} does not say how its images are prepared; give a recipe that"
      " does, such as --config=imagenet_r50."
    )
  config = as_config(file, copy.deepcopy(config))
  try:
    changes = _fit_config(config, imported.architecture, file)
  except UserError:
    raise
  except Exception as error:  # A stranger's recipe can hold anything.
    if given is not None:
      raise
    raise UserError(
      f"The recipe in {file} is not complete"
      f" ({formats.one_line(str(error), 100)}); give one with --config."
    ) from error
  step = stored_step(imported)
  with lock.owned(files.make(workdir)):
    checkpointer = Checkpointer(workdir, keep_last=1, config=config.to_dict())
    try:
      if checkpointer.latest_step() is not None:
        _refuse(workdir)  # Another import was faster.
      checkpointer.save(step, imported.variables)
      if given is not None:  # The recipe in the file may be a stranger's.
        ownership.sign(workdir, config)
    finally:
      checkpointer.close()
  return _notes(imported, step, changes)


def _check_is_new(workdir: str) -> None:
  """Raises UserError if there is anything that an import would touch."""
  directory = files.absolute(workdir)
  if directory.is_dir() and not any(directory.iterdir()):
    return
  if directory.exists():
    _refuse(workdir)


def _refuse(workdir: str) -> NoReturn:
  raise UserError(
    f"{workdir} has a run already, or other files; choose a new or an empty"
    " --workdir."
  )


def _fit_config(
  config: ConfigDict, architecture: formats.Architecture, file: str
) -> list[str]:
  """Sets config.model to the file's network; returns the changes."""
  if config.data.channels != architecture.channels:
    raise UserError(
      f"{file} is for images of {architecture.channels} channels, the recipe"
      f" for {config.data.channels} (data.channels)."
    )
  objective = lookup(OBJECTIVES, config.objective.name, "objective")
  model = {
    "backbone": architecture.backbone,
    "width_multiplier": float(architecture.width_multiplier),
    "stem": architecture.stem,
    **{name: ADDED_KEYS[f"model.{name}"] for name in OPTIONS},
    **architecture.options(),
  }
  # The weights do not say where layer scales started, nor how to train.
  model["drop_path"] = config.model.get("drop_path", 0.0)
  if architecture.projector:
    *hidden, last = architecture.projector
    factor = objective.embedding_factor
    if last % factor:
      raise UserError(
        f"{file} has embeddings of {last} entries; objective"
        f" {config.objective.name!r} needs a multiple of {factor}."
      )
    model["projector"] = (*hidden, last // factor)
    model["projector_bias"] = architecture.hidden_bias
    model["projector_last_bias"] = architecture.last_bias
  changes = []
  for key, value in model.items():
    known = ADDED_KEYS.get(f"model.{key}")
    old = config.model.get(key, known)
    if (tuple(old) if isinstance(old, list | tuple) else old) != value:
      changes.append(f"model.{key}: {old} -> {value}")
      with config.ignore_type():
        config.model[key] = value
  # Fails on contradictions, such as bins that do not fit the width.
  experiment.build(config, num_examples=config.batch_size)
  return changes


def _notes(
  imported: formats.Imported, step: int, changes: list[str]
) -> list[str]:
  """Returns what was read and what was not, line by line."""
  architecture = imported.architecture
  widths = "-".join(map(str, architecture.projector))
  head = f"projector {widths}" if widths else "no projector"
  source = f", in {imported.project}'s layout" if imported.project else ""
  notes = [f"Read {architecture.describe()}, {head}, step {step}{source}."]
  if not architecture.projector:
    notes.append(
      "A backbone alone has features but no embeddings and no codes; a run"
      " that starts from it makes a new projector."
    )
  if imported.classifier is not None:
    notes.append("Left out the classifier (fc): an encoder has none.")
  if imported.ignored:
    shown = listed(imported.ignored)
    notes.append(f"Left out, as not part of the encoder: {shown}.")
  if changes:
    notes.append(f"The recipe follows the file: {'; '.join(changes)}.")
  return notes
