"""Checkpoints of a run: written whole, read verified.

Orbax writes a step asynchronously and puts it in place at once or not at all.
This module stores with each step the shape, dtype and checksum of every leaf
and the config. `restore` verifies them; when the newest step is damaged, it
walks back to the newest good one and says so.
"""

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from imsvd_jax.base import files
from imsvd_jax.base.config import as_json
from imsvd_jax.base.errors import UserError, listing
from imsvd_jax.runs import run_directory, verification

logger = logging.getLogger(__name__)


class Checkpointer:
  """Saves and restores one run's train state in its working directory.

  With several processes every process makes one and calls the same methods in
  the same order.

  Args:
    workdir: The run's directory, made if it is missing; may be gs://.
    keep_last: How many of the newest checkpoints to keep, at least 1.
    keep_every: Also keep the steps divisible by this for good; 0 for none.
    config: The run's configuration, nested dictionaries that JSON can hold.
    facts: Values outside the config that must not change on resume; see
      `resume.load_facts`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep_last: int,
    keep_every: int = 0,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
  ) -> None:
    self.workdir = files.absolute(workdir)
    self._root = self.workdir / run_directory.CHECKPOINTS
    self._config = as_json(config)
    self._facts = as_json(facts or {})
    self._is_marked = False
    with self._writing():
      run_directory.check_not_emptied(self.workdir, self._root)
      self._manager = _make_manager(self._root, keep_last, keep_every)
      # Fails here rather than at the first save an hour later.
      self._check_writable()
      if not run_directory.steps_on_disk(self._root):
        self._write_config()
      self._mark()

  def latest_step(self) -> int | None:
    """Returns the newest step on disk, damaged or not; None if there is none.

    A save that is still being written does not count.
    """
    return max(run_directory.steps_on_disk(self._root), default=None)

  def save(self, step: int, state: Any) -> bool:
    """Starts writing `state` as `step`; returns before it is on disk.

    Waits for the previous save, whose errors surface here. The state's buffers
    may be donated as soon as this returns.

    Args:
      step: Number of finished training steps; never below `latest_step()`.
      state: Any pytree of arrays; typed keys and None are fine.

    Returns:
      True if the state is, or will be, on disk. False if it holds a NaN or an
      infinity: it is not written, the log names the leaves, and the older
      checkpoints stay.

    Raises:
      UserError: The disk is full, read-only or gone.
    """
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
    meta = {"step": step, "config": self._config, "facts": self._facts}
    meta = verification.sealed(meta | {"leaves": leaves})
    with self._writing():
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
        force=True,
      )
    return True

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
      UserError: Every checkpoint is damaged, or a good one does not have the
        shapes of `state_like`.
    """
    self.wait()
    steps = _from_first_process(run_directory.steps_on_disk(self._root))
    if not steps and step is None:
      return None
    abstract = jax.tree.map(_abstract, state_like)
    state, found, skipped = verification.newest_usable(
      self._root, steps, step, lambda path: _read_state(path, abstract)
    )
    if skipped:
      self._set_aside(skipped)
    return state, found

  def wait(self) -> None:
    """Blocks until the last save is on disk; its errors surface here."""
    with self._writing():
      self._manager.wait_until_finished()
      self._mark()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    with self._writing():
      self._manager.close()
      self._mark()

  def _writing(self) -> contextlib.AbstractContextManager[None]:
    return files.writing("a checkpoint", self.workdir)

  def _latest_to_follow(self) -> int | None:
    # Orbax would create a removed directory again, and the run would continue
    # to write to a place where nobody looks.
    if not self._root.exists():
      raise UserError(
        f"{self._root} is gone: the working directory was removed while the"
        " run was writing to it. Restart with another --workdir."
      )
    return self.latest_step()

  def _check_writable(self) -> None:
    if jax.process_index() == 0:
      for folder in (self.workdir, self._root):
        probe = folder / "write-test.tmp"
        probe.write_text("The run checks that it may write here.")
        probe.unlink()

  def _mark(self) -> None:
    """Records that steps were saved, so that a later loss is noticed."""
    if self._is_marked or not self._root.exists():
      return
    if not run_directory.steps_on_disk(self._root):
      return
    if jax.process_index() == 0:
      (self.workdir / run_directory.SAVED_FILE).write_text(
        "This run has saved checkpoints. If they are gone, it stops with an"
        " error instead of starting from scratch.\n"
      )
    self._is_marked = True

  def _write_config(self) -> None:
    if jax.process_index() == 0:
      text = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
      path = self.workdir / run_directory.CONFIG_FILE
      scratch = self.workdir / f"{run_directory.CONFIG_FILE}.tmp"
      scratch.write_text(text)
      scratch.replace(path)

  def _set_aside(self, steps: Sequence[int]) -> None:
    if jax.process_index() == 0:
      with self._writing():
        for step in steps:
          (self._root / str(step)).rename(
            run_directory.name_for_damaged(self._root, step)
          )
    multihost_utils.sync_global_devices("imsvd_jax: damaged steps set aside")
    self._manager.reload()


def _read_state(directory: epath.Path, abstract: Any) -> Any:
  """Reads and verifies a whole state; all processes succeed or none does."""
  state, damage = None, None
  try:
    meta = verification.read_meta(directory)
    verification.check_fits(
      meta["leaves"], verification.named_leaves(abstract), directory
    )
    with verification.reading(directory):
      state = ocp.StandardCheckpointHandler().restore(
        directory / "state", args=ocp.args.StandardRestore(abstract)
      )
  except verification.Damage as error:
    damage = error
  # `verify` is a collective computation: all processes must take part.
  if not np.all(multihost_utils.process_allgather(np.array(damage is None))):
    raise damage or verification.Damage("another process could not read it")
  verification.verify(meta["leaves"], state)
  return state


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _from_first_process(steps: Sequence[int]) -> list[int]:
  # A network file system may list different files to different processes.
  count = multihost_utils.broadcast_one_to_all(np.int32(len(steps)))
  padded: np.ndarray = np.zeros(int(count), np.int32)
  if jax.process_index() == 0:
    padded[:] = steps
  return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


def _already_saved(step: int, latest: int, workdir: epath.Path) -> bool:
  if step == latest:
    return True
  raise UserError(
    f"{workdir} holds step {latest}, newer than the step {step} to be saved:"
    " another run writes there. Use a new --workdir."
  )


class _Manager(ocp.CheckpointManager):
  """Leaves the preemption notice to the training loop.

  Orbax itself asks JAX's preemption service, with the number of the saved step
  and only after the save has ended in the background. The service takes that
  number for the current step. A SIGTERM before the loop's next call would then
  stop the run at a step that has passed, that is, never.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


def _make_manager(
  root: epath.Path, keep_last: int, keep_every: int
) -> ocp.CheckpointManager:
  policies = [ocp.checkpoint_managers.LatestN(keep_last)]
  if keep_every:
    policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
  options = ocp.CheckpointManagerOptions(
    preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
    # Removes what a kill during a save has left.
    cleanup_tmp_directories=True,
    # A damaged step must not stop the manager from starting.
    lightweight_initialize=True,
    save_root_metadata=False,
  )
  return _Manager(root, options=options)
