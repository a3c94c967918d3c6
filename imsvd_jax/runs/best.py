"""Which checkpoints of a run are the best, by the scores that they record.

A checkpoint saved at an evaluation records its scores. No other file says which
is the best, so that a kill between two writes can leave none that is wrong.
"""

import contextlib
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from imsvd_jax.base.errors import Damage, UserError
from imsvd_jax.runs import run_directory, verification
from imsvd_jax.training import verdict

BEST = "best"


def ranked(scores: Mapping[int, float]) -> list[int]:
  """Returns steps by their scores, the best first; of equal ones the newest."""
  return sorted(scores, key=lambda step: (scores[step], step), reverse=True)


def scores_on_disk(
  root: epath.Path, steps: Sequence[int], name: str
) -> dict[int, float]:
  """Returns the score `name` of the steps that record it."""
  found = {}
  for step in steps:
    read = functools.partial(verification.read_meta, root / str(step))
    with contextlib.suppress(Damage):
      meta = verification.twice(read, root / str(step))
      value = score_in(meta.get("record", {}), name)
      if value is not None:
        found[step] = value
  return found


def score_in(record: Mapping[str, Any], name: str) -> float | None:
  """Returns the score `name` of a checkpoint's record, if it is a number."""
  value = record.get("scores", {}).get(name)
  return value if value is not None and math.isfinite(value) else None


def find_step(workdir: str | os.PathLike, step: int | str | None) -> int | None:
  """Returns the number of a step that may be given as "best" or as text.

  Raises:
    UserError: It is neither, or no checkpoint records a score.
  """
  if step is None or isinstance(step, int):
    return step
  if step.isdecimal():
    return int(step)
  if step != BEST:
    raise UserError(f"--step={step}: expected a whole number, or {BEST!r}.")
  return _best_step(workdir)


def _best_step(workdir: str | os.PathLike) -> int:
  from imsvd_jax.runs import resume  # It imports the checkpointer.

  directory, _ = run_directory.locate(workdir)
  root = directory / run_directory.CHECKPOINTS
  config = resume.load_config(directory)
  name = config.get("checkpoint", {}).get("keep_best_by", verdict.LABEL_FREE)
  found = scores_on_disk(root, run_directory.steps_on_disk(root), name)
  if not found:
    raise UserError(
      f"No checkpoint in {root} records the score {name!r}: the run was not"
      " evaluated when it saved. Give the number of a step, or train with"
      " --config.checkpoint.keep_best=1."
    )
  return ranked(found)[0]
