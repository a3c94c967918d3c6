"""The files of a run, by name.

In the working directory:

  config.json                the config at the first start, for people to read
  saved.txt                  written with the first checkpoint
  metrics.jsonl              a line per logged step
  checkpoints/STEP/state     the train state (Orbax)
  checkpoints/STEP/meta      leaves, checksums, config (JSON)
  checkpoints/damaged-STEP   a step that failed verification, set aside
"""

import os

import orbax.checkpoint as ocp
from etils import epath

from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError, listing

CONFIG_FILE = "config.json"
SAVED_FILE = "saved.txt"
CHECKPOINTS = "checkpoints"
_DAMAGED = "damaged-"  # Followed by the number of the step.


def locate(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
  """Returns (workdir, None), or (workdir, step) for a step's directory."""
  directory = files.absolute(path)
  if directory.name.isdigit() and directory.parent.name == CHECKPOINTS:
    return directory.parent.parent, int(directory.name)
  return directory, None


def steps_on_disk(root: epath.Path) -> list[int]:
  """Returns the committed steps, damaged ones included, in ascending order."""
  return sorted(ocp.utils.checkpoint_steps(root))


def name_for_damaged(root: epath.Path, step: int) -> epath.Path:
  """Returns a path that is not in use, to which a damaged step can move."""
  path, count = root / f"{_DAMAGED}{step}", 1
  while path.exists():
    count += 1
    path = root / f"{_DAMAGED}{step}-{count}"
  return path


def check_not_emptied(workdir: epath.Path, root: epath.Path) -> None:
  """Raises UserError if steps were saved here and none of them is left."""
  found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
  damaged = [name for name in found if name.startswith(_DAMAGED)]
  was_saved = bool(damaged) or (workdir / SAVED_FILE).exists()
  if not was_saved or steps_on_disk(root):
    return
  what = f"only {listing(damaged)}" if damaged else "none"
  raise UserError(
    f"This run has saved checkpoints, and {root} holds {what}. Nothing was"
    " changed. Put them back, or use a new --workdir; to start over here,"
    f" remove {workdir}."
  )
