"""The files of a run, by name.

In the working directory:

  config.json                the config at the first start, for people to read
  owner.json                 who trained it: signatures of the recipe's data
  run.json                   the run's id, which each of its steps holds too
  saved.txt                  written with the first checkpoint
  lock                       who trains here; see `lock`
  metrics.jsonl              a line per logged step
  checkpoints/STEP/state     the train state (Orbax)
  checkpoints/STEP/meta      leaves, checksums, config, progress, id (JSON)
  checkpoints/damaged-STEP   a step that failed verification, set aside
"""

import contextlib
import json
import os
import time

import orbax.checkpoint as ocp
from etils import epath

from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError, listing

CONFIG_FILE = "config.json"
SAVED_FILE = "saved.txt"
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
_PAUSE_SECONDS = 1.0  # Before another look at a file system.
_DAMAGED = "damaged-"  # Followed by the number of the step.
_UNFINISHED = ocp.utils.TMP_DIR_SUFFIX  # Follows the number of the step.


def locate(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
  """Returns (workdir, None), or (workdir, step) for a step's directory."""
  directory = files.absolute(path)
  if directory.name.isdigit() and directory.parent.name == CHECKPOINTS:
    return directory.parent.parent, int(directory.name)
  return directory, None


def steps_on_disk(root: epath.Path) -> list[int]:
  """Returns the committed steps, damaged ones included, in ascending order.

  Raises:
    UserError: The directory cannot be read.
  """
  for is_last in (False, True):
    try:
      return sorted(_steps(root))
    except FileNotFoundError:
      return []
    except OSError as error:
      if is_last:
        raise UserError(
          f"Cannot read {root}: {error.strerror}. Nothing was changed; run the"
          " same command again."
        ) from error
      time.sleep(_PAUSE_SECONDS)
  raise AssertionError


def is_there(root: epath.Path) -> bool:
  """Returns whether the directory exists; raises OSError if it is not known."""
  if files.is_remote(root):
    return root.exists()
  try:
    os.stat(root)
  except FileNotFoundError:
    return False
  return True


def _steps(root: epath.Path) -> list[int]:
  if files.is_remote(root):
    return ocp.utils.checkpoint_steps(root)
  # Whatever has a step's name: a file or a link that leads nowhere is damage,
  # and must not make the run begin again.
  return [int(name) for name in os.listdir(root) if _is_number(name)]


def _is_number(name: str) -> bool:
  return name.isdecimal() and str(int(name)) == name


def remove(root: epath.Path, step: int) -> None:
  """Deletes a step; whoever reads it finds all of it, or nothing."""
  path = root / str(step)
  if not files.is_remote(root):
    path = path.rename(root / f"{step}{_UNFINISHED}")
  _delete(path)


def remove_unfinished(root: epath.Path) -> None:
  """Deletes what a kill during a save, or during `remove`, has left."""
  for path in list(root.iterdir()):
    is_step = _is_number(path.name.partition(_UNFINISHED)[0])
    if is_step and (_UNFINISHED in path.name or _is_uncommitted(path)):
      _delete(path)


def _delete(path: epath.Path) -> None:
  """Deletes a folder; of a link, which may lead to another disk, only it."""
  if os.path.islink(path):
    path.unlink()
  else:
    path.rmtree()


def _is_uncommitted(path: epath.Path) -> bool:
  # In a bucket, a step is written under its own name.
  return files.is_remote(path) and ocp.utils.is_tmp_checkpoint(path)


def check_file_names(workdir: epath.Path) -> None:
  """Raises UserError if a folder has the name of one of the run's files."""
  for name in (CONFIG_FILE, SAVED_FILE, RUN_FILE):
    if (workdir / name).is_dir():
      raise UserError(
        f"{workdir / name} is a folder; a run writes a file of that name."
        " Rename the folder, or use another --workdir."
      )


def _probe_name(process: int) -> str:
  return f"write-test-{process}.tmp" if process else "write-test.tmp"


def write_probe(folder: epath.Path, process: int, token: str) -> None:
  """Writes the file that shows whether a process may write to a folder."""
  path = folder / _probe_name(process)
  if path.is_dir():
    raise UserError(
      f"{path} is a folder; a run writes a file of that name to see whether it"
      " may. Remove the folder."
    )
  path.write_text(token)


def check_probe(folder: epath.Path, token: str) -> None:
  """Raises UserError if this process does not see the first one's file."""
  for _ in range(10):  # A network file system may lag.
    path = folder / _probe_name(0)
    if path.exists() and path.read_text() == token:
      return
    time.sleep(_PAUSE_SECONDS)
  raise UserError(
    f"{folder} of this process is not that of process 0; all processes of a run"
    " share one --workdir."
  )


def remove_probe(folder: epath.Path, process: int) -> None:
  """Removes the file of `write_probe`, if there is one."""
  with contextlib.suppress(OSError):
    (folder / _probe_name(process)).unlink()


def read_id(workdir: epath.Path) -> str | None:
  """Returns the id of the run in a directory; None if none can be read."""
  try:
    return str(json.loads((workdir / RUN_FILE).read_text())["id"])
  except (OSError, ValueError, KeyError, TypeError):
    return None  # Each step holds it, too.


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
