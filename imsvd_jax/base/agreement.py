"""How the processes of a run agree on what happened to one of them.

An error in one process is an error in all: nobody waits in a collective for a
process that has given up, and each can say why it stops.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imsvd_jax.base import files
from imsvd_jax.base.errors import Damage, PeerError, UserError

_BYTES = 512
# The end of the first process aborts the others, before they can say why they
# stop; so it ends last.
_LAST_SECONDS = 1.0
# What a process reports, by kind; the last one that any reports counts. Without
# an error nothing is raised.
_KINDS: dict[str, type[Exception]] = {
  "": Exception,
  "damage": Damage,
  "passing": files.Passing,
  "user": UserError,
  "other": PeerError,
}


class LostPeerError(Exception):
  """A collective failed: the run itself cannot go on, not just a number."""


def exchange(text: str) -> list[str]:
  """Returns the texts of all processes, in their order; long ones are cut."""
  if jax.process_count() == 1:
    return [text]
  own = np.frombuffer(text.encode()[:_BYTES].ljust(_BYTES, b"\0"), np.uint8)
  rows = of_everyone(own)
  return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_everyone(array: Any) -> np.ndarray:
  """Returns the arrays of all processes, stacked where there are several.

  Raises:
    LostPeerError: The collective failed.
  """
  try:
    return np.asarray(multihost_utils.process_allgather(array))
  except Exception as error:
    raise LostPeerError(f"a collective failed: {error}") from error


@contextlib.contextmanager
def together(path: str | os.PathLike = "") -> Iterator[None]:
  """Runs a block in every process; an error in one is raised in all.

  For blocks without collectives, which a collective follows: a process that
  failed alone would leave the others waiting in it.

  Args:
    path: What the block reads or writes.

  Raises:
    UserError: Another process has met one.
    PeerError: Another process has met an error that it cannot explain.
  """
  own = None
  try:
    yield
  except Exception as error:
    own = error
  kind = _kind(own, path)
  reports = exchange(f"{kind}:{_text(own)}")
  kinds = [report.partition(":")[0] for report in reports]
  worst = max(kinds, key=list(_KINDS).index)
  if (
    worst in ("user", "other") and len(reports) > 1 and not jax.process_index()
  ):
    time.sleep(_LAST_SECONDS)
  if own is not None and kind == worst:
    raise own
  if worst:
    index = kinds.index(worst)
    _, _, text = reports[index].partition(":")
    raise _KINDS[worst](f"Process {index}: {text}") from own


def _kind(error: Exception | None, path: str | os.PathLike) -> str:
  if error is None:
    return ""
  if isinstance(error, Damage):
    return "damage"
  if isinstance(error, UserError):
    return "user"
  return "passing" if files.is_passing(error, path) else "other"


def _text(error: Exception | None) -> str:
  if error is None:
    return ""
  if isinstance(error, Damage | UserError):
    return str(error)
  return files.root_cause(error)
