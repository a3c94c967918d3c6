"""Checkpoints of a run: written whole, read verified.

Orbax writes a step asynchronously and puts it in place at once or not at all.
This module stores with each step the shape, dtype and checksum of every leaf
and the config. A step counts as saved once it was found complete on disk; only
then are older ones deleted. `restore` verifies every leaf; when the newest step
is damaged, it walks back to the newest good one and says so.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from imsvd_jax.base import agreement, files
from imsvd_jax.base.config import as_json
from imsvd_jax.base.errors import Damage, UserError, listing
from imsvd_jax.runs import (
  best,
  interruption,
  run_directory,
  unfinished_io,
  verification,
)
from imsvd_jax.training.verdict import LABEL_FREE

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.05  # Between two looks at a save in the background.


class Checkpointer:
  """Saves and restores one run's train state in its working directory.

  With several processes every process makes one and calls the same methods in
  the same order; an error in one process is raised in all.

  Args:
    workdir: The run's directory, made if it is missing; may be gs://.
    keep_last: How many of the newest checkpoints to keep, at least 1.
    keep_every: Also keep the steps divisible by this for good; 0 for none.
    keep_best: Also keep so many of the steps with the largest score.
    keep_best_by: Name of that score, in the record's "scores".
    config: The run's configuration, nested dictionaries that JSON can hold.
    facts: Values outside the config that must not change on resume; see
      `resume.load_facts`.
    deadline_minutes: A save that takes longer ends the process, with code 4.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep_last: int,
    keep_every: int = 0,
    keep_best: int = 0,
    keep_best_by: str = LABEL_FREE,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
    deadline_minutes: float = 30.0,
  ) -> None:
    self.workdir = files.absolute(workdir)
    self._root = self.workdir / run_directory.CHECKPOINTS
    self._keep_last, self._keep_every = keep_last, keep_every
    self._keep_best, self._keep_best_by = keep_best, keep_best_by
    self._scores: dict[int, float] = {}  # Of steps on disk, in process 0.
    self._config = as_json(config)
    self._facts = as_json(facts or {})
    self._deadline_minutes = deadline_minutes
    self._is_first = jax.process_index() == 0
    self._is_marked = False
    self._saving: int | None = None  # The step that is being written.
    with self._writing():
      files.check_workdir(self.workdir)
      run_directory.check_file_names(self.workdir)
      run_directory.check_not_emptied(self.workdir, self._root)
      self._root.mkdir(parents=True, exist_ok=True)
    # Fails here rather than at the first save an hour later.
    self._check_writable()
    unfinished_io.ignore()
    self._manager = _make_manager(deadline_minutes)
    with self._writing():
      if self._is_first:
        run_directory.remove_unfinished(self._root)
        if not run_directory.steps_on_disk(self._root):
          self._write_config()
        self._mark()
        if keep_best:
          steps = run_directory.steps_on_disk(self._root)
          self._scores = best.scores_on_disk(self._root, steps, keep_best_by)
    self._run_id = self._find_id()

  def latest_step(self) -> int | None:
    """Returns the newest step on disk, damaged or not; None if there is none.

    A save that is still being written does not count.
    """
    return max(self._steps(), default=None)

  def save(
    self, step: int, state: Any, record: Mapping[str, Any] | None = None
  ) -> bool:
    """Starts writing `state` as `step`; returns before it is on disk.

    Waits for the previous save, whose errors surface here. The state's buffers
    may be donated as soon as this returns.

    Args:
      step: Number of finished training steps; never below `latest_step()`.
      state: Any pytree of arrays; typed keys and None are fine.
      record: What else a resumed run has to know; see `resume.load_progress`.

    Returns:
      True if the state is, or will be, on disk. False if it holds a NaN or an
      infinity: it is not written, the log names the leaves, and the older
      checkpoints stay.

    Raises:
      UserError: The disk is full, read-only or gone.
    """
    with self._within_deadline(step):
      return self._save(step, state, record or {})

  def improves(self, scores: Mapping[str, float]) -> bool:
    """Returns whether a state with these scores is one of the best to keep.

    Every process must call it; the scores of process 0 decide.
    """
    if not self._keep_best or not scores:
      return False
    value = best.score_in({"scores": scores}, self._keep_best_by)
    kept = best.ranked(self._scores)[: self._keep_best]
    is_better = value is not None and (
      len(kept) < self._keep_best or value >= self._scores[kept[-1]]
    )
    return agreement.exchange("better" if is_better else "")[0] == "better"

  def restore(
    self, state_like: Any, *, step: int | None = None
  ) -> tuple[Any, int] | None:
    """Reads the newest good checkpoint, verified leaf by leaf.

    Damaged steps that are newer than the one returned are set aside, as
    `damaged-STEP`, so that the run can write these steps again.

    Args:
      state_like: A tree of arrays or `jax.ShapeDtypeStruct` with the shapes,
        dtypes and shardings wanted. The devices may differ from those that
        the checkpoint was written on.
      step: This step and no other.

    Returns:
      (state, step), or None if no checkpoint was ever written here.

    Raises:
      UserError: Every checkpoint is damaged, one cannot be read now or is of
        another run, or a good one does not have the shapes of `state_like`.
    """
    self.wait()
    steps = self._steps()
    if not steps and step is None:
      return None
    with agreement.together(self._root):
      if self._is_first:
        self._check_owner(steps)
    abstract = jax.tree.map(_abstract, state_like)
    state, found, skipped = verification.newest_usable(
      self._root, lambda: steps, step, lambda path: _read_state(path, abstract)
    )
    if skipped:
      self._set_aside(skipped)
    return state, found

  def wait(self) -> None:
    """Blocks until the last save is on disk and complete.

    Its errors surface here, those of other processes included.
    """
    if self._saving is None:
      return
    step, self._saving = self._saving, None
    with self._within_deadline(step):
      self._await_background(step)
      with self._writing():
        if self._is_first:
          self._check_saved(step)
          self._mark()
          self._delete_old()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    self.wait()
    with self._writing():
      self._manager.close()

  def _save(self, step: int, state: Any, record: Mapping[str, Any]) -> bool:
    self.wait()
    latest = self._latest_to_follow()
    if latest is not None and step <= latest:
      return _already_saved(step, latest, self.workdir)
    leaves, non_finite = verification.describe(state)
    if non_finite:
      logger.error(
        "NOT saving step %d: the state is not finite in %s.",
        step,
        listing(non_finite),
      )
      return False
    meta = {
      "step": step,
      "run": self._run_id,
      "config": self._config,
      "facts": self._facts,
      "record": as_json(record),
    }
    meta = verification.sealed(meta | {"leaves": leaves})
    with self._writing():
      self._manager.save(
        self._root / str(step),
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
      )
    self._saving = step
    score = best.score_in(record, self._keep_best_by)
    if score is not None:
      self._scores[step] = score
    return True

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    with (
      agreement.together(self.workdir),
      files.writing("a checkpoint", self.workdir),
    ):
      yield

  def _within_deadline(
    self, step: int
  ) -> contextlib.AbstractContextManager[None]:
    return interruption.deadline(
      self._deadline_minutes,
      f"Step {step} was not saved in {self.workdir} within"
      f" {self._deadline_minutes:g} minutes (checkpoint.deadline_minutes): the"
      " storage or another process does not answer. The checkpoints before it"
      " are intact; start all processes again to resume.",
    )

  def _steps(self) -> list[int]:
    """Returns the steps that the first process sees.

    A network file system may list different files to different processes.
    """
    with agreement.together(self._root):
      steps = run_directory.steps_on_disk(self._root)
    count = multihost_utils.broadcast_one_to_all(np.int32(len(steps)))
    padded: np.ndarray = np.zeros(int(count), np.int32)
    if self._is_first:
      padded[:] = steps
    return [int(n) for n in multihost_utils.broadcast_one_to_all(padded)]

  def _latest_to_follow(self) -> int | None:
    # Orbax would create a removed directory again, and the run would continue
    # to write to a place where nobody looks.
    with self._writing():
      if not run_directory.is_there(self._root):
        raise UserError(
          f"{self._root} is gone: the working directory was removed while the"
          " run was writing to it. Restart with another --workdir."
        )
    return self.latest_step()

  def _check_writable(self) -> None:
    """Raises UserError unless all processes can write to one directory."""
    token = agreement.exchange(secrets.token_hex(8))[0]
    folders = (self.workdir, self._root)
    try:
      with self._writing():
        for folder in folders:
          run_directory.write_probe(folder, jax.process_index(), token)
      with self._writing():
        for folder in folders:
          run_directory.check_probe(folder, token)
    finally:
      for folder in folders:
        run_directory.remove_probe(folder, jax.process_index())

  def _await_background(self, step: int) -> None:
    """Waits for Orbax's threads; all processes stop at the first error.

    Orbax itself would let them wait for a process that has failed.
    """
    errors = []

    def wait() -> None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:
        errors.append(error)

    waiter = threading.Thread(target=wait, daemon=True)
    waiter.start()
    busy = ["busy"]
    while any(busy):
      waiter.join(_POLL_SECONDS)
      busy = agreement.exchange("busy" if waiter.is_alive() else "")
      with self._writing():
        if errors:
          raise self._explained(step, errors.pop())

  def _explained(self, step: int, error: Exception) -> Exception:
    """Returns a UserError, unless `files.writing` or a retry explains more."""
    known = files.refusal(error, self.workdir) is not None
    if known or files.is_passing(error, self.workdir):
      return error
    return _not_saved(step, self._root, files.root_cause(error))

  def _check_saved(self, step: int) -> None:
    directory = self._root / str(step)
    check = functools.partial(verification.check_complete, directory)
    try:
      verification.twice(check, directory)
    except Damage as damage:
      raise _not_saved(step, self._root, str(damage)) from damage

  def _delete_old(self) -> None:
    steps = run_directory.steps_on_disk(self._root)
    self._scores = {s: x for s, x in self._scores.items() if s in steps}
    kept = best.ranked(self._scores)[: self._keep_best]
    for step in steps[: -self._keep_last]:
      is_kept = self._keep_every and step % self._keep_every == 0
      if not is_kept and step not in kept:
        run_directory.remove(self._root, step)

  def _mark(self) -> None:
    """Records that steps were saved, so that a later loss is noticed."""
    if self._is_marked or not run_directory.steps_on_disk(self._root):
      return
    (self.workdir / run_directory.SAVED_FILE).write_text(
      "This run has saved checkpoints. If they are gone, it stops with an"
      " error instead of starting from scratch.\n"
    )
    self._is_marked = True

  def _write_config(self) -> None:
    text = json.dumps(self._config, indent=2, sort_keys=True)
    path = self.workdir / run_directory.CONFIG_FILE
    files.write_whole(path, f"{text}\n".encode())

  def _find_id(self) -> str:
    """Returns the run's id, from its directory, its newest step, or new."""
    run_id = None
    with self._writing():
      if self._is_first:
        run_id = run_directory.read_id(self.workdir)
        if run_id is None:
          run_id = self._stored_id() or secrets.token_hex(8)
          path = self.workdir / run_directory.RUN_FILE
          text = json.dumps({"id": run_id})
          files.write_whole(path, f"{text}\n".encode())
    return agreement.exchange(run_id or "")[0]

  def _stored_id(self) -> str | None:
    steps = run_directory.steps_on_disk(self._root)[::-1]
    return next((meta.get("run") for _, meta in self._metas(steps)), None)

  def _check_owner(self, steps: Sequence[int]) -> None:
    for directory, meta in self._metas(steps):
      verification.check_owner(meta, self._run_id, directory)

  def _metas(
    self, steps: Sequence[int]
  ) -> Iterator[tuple[epath.Path, dict[str, Any]]]:
    """Yields directory and meta of each step whose meta is good."""
    for step in steps:
      directory = self._root / str(step)
      read = functools.partial(verification.read_meta, directory)
      with contextlib.suppress(Damage):
        yield directory, verification.twice(read, directory)

  def _set_aside(self, steps: Sequence[int]) -> None:
    with self._writing():
      if self._is_first:
        for step in steps:
          self._scores.pop(step, None)
          (self._root / str(step)).rename(
            run_directory.name_for_damaged(self._root, step)
          )


def _read_state(directory: epath.Path, abstract: Any) -> Any:
  """Reads and verifies a whole state; all processes succeed or none does."""
  with agreement.together(directory):
    if int(directory.name) not in run_directory.steps_on_disk(directory.parent):
      # The first process sees it: the file system lags, or it was removed.
      raise files.Passing(f"{directory} is not visible")
    meta = verification.read_meta(directory)
    verification.check_fits(
      meta["leaves"], verification.named_leaves(abstract), directory
    )
    verification.check_merged(directory)
    with verification.reading(directory):
      state = ocp.StandardCheckpointHandler().restore(
        directory / "state", args=ocp.args.StandardRestore(abstract)
      )
  verification.verify(meta["leaves"], state)
  return state


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _not_saved(step: int, root: epath.Path, reason: str) -> UserError:
  return UserError(
    f"Step {step} was not saved whole in {root}: {reason}. The checkpoints"
    " before it are intact; repair the storage, and run the same command again"
    " to resume."
  )


def _already_saved(step: int, latest: int, workdir: epath.Path) -> bool:
  if step == latest:
    return True
  raise UserError(
    f"{workdir} holds step {latest}, newer than the step {step} to be saved:"
    " another run writes there. Use a new --workdir."
  )


def _make_manager(deadline_minutes: float) -> ocp.AsyncCheckpointer:
  handler = ocp.CompositeCheckpointHandler(
    state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
  )
  # Orbax's own deadline comes after ours, which says what to do.
  seconds = round(60 * deadline_minutes) + 600
  return ocp.AsyncCheckpointer(
    handler, async_options=ocp.AsyncOptions(timeout_secs=seconds)
  )
