"""Checkpoints that a run can be trusted to: written whole, read verified.

Orbax writes a step asynchronously and puts it in place at once or not at all.
What this module adds is trust. With every step go the shape, the dtype and a
checksum of every leaf, and the configuration that made it; `restore` verifies
them and, when the newest step is damaged, walks back to the newest good one
and says so. In the working directory:

  config.json                what the run was started with, for people
  saved.txt                  there once a step was: the run is worth something
  checkpoints/STEP/state     the train state (Orbax)
  checkpoints/STEP/meta      leaves, checksums, configuration (JSON)
  checkpoints/damaged-STEP   a step that failed verification, set aside
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from imsvd_jax.base import files
from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError

logger = logging.getLogger(__name__)

PyTree = Any
SAVED_FILE = "saved.txt"
_DAMAGED = "damaged-"  # And the step's number: it is set aside.
_VARIABLES = ("params", "batch_stats", "target")
_DISK_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EIO,
  errno.ESTALE,
)


class Checkpointer:
  """Saves and restores one run's train state in its working directory.

  With several processes every process makes one and calls the same methods in
  the same order.

  Args:
    workdir: The run's directory, made if it is missing; may be gs://.
    keep_last: How many of the newest checkpoints to keep, at least 1.
    keep_every: Also keep the steps divisible by this for good; 0 for none.
    config: The run's configuration, nested dictionaries that JSON can hold.
    facts: What else a run that goes on must find as it was, for `load_facts`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep_last: int,
    keep_every: int = 0,
    config: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
  ):
    if keep_last < 1 or keep_every < 0:
      raise UserError(
        f"keep_last is {keep_last} and keep_every is {keep_every}; expected at"
        " least 1 and at least 0."
      )
    self.workdir = files.absolute(workdir)
    self._root = self.workdir / "checkpoints"
    self._config = _as_json(config)
    self._facts = _as_json(facts or {})
    self._is_marked = False
    with _disk_errors_explained(self.workdir):
      _check_not_emptied(self.workdir, self._root)
      self._manager = _make_manager(self._root, keep_last, keep_every)
      # Now, rather than at the first save an hour later.
      self._check_writable()
      if not _steps_on_disk(self._root):
        self._write_config()
      self._mark()

  def latest_step(self) -> int | None:
    """Returns the newest step on disk, damaged or not; None if there is none.

    A save that is still being written does not count.
    """
    return max(_steps_on_disk(self._root), default=None)

  def save(self, step: int, state: PyTree) -> bool:
    """Starts writing `state` as `step`; returns before it is on disk.

    Waits for the previous save, whose errors surface here. The state's buffers
    may be donated as soon as this returns.

    Args:
      step: Number of finished training steps; never below `latest_step()`.
      state: Any pytree of arrays; typed keys and None are fine.

    Returns:
      Whether the state is, or will be, on disk under `step`. False means that
      it holds a NaN or an infinity and was not written: the log names the
      leaves, and the older checkpoints stay.

    Raises:
      UserError: The disk is full, read-only or gone.
    """
    self.wait()
    latest = self._latest_to_follow()
    if latest is not None and step <= latest:
      return _already_saved(step, latest, self.workdir)
    leaves, non_finite = _describe(state)
    if non_finite:
      logger.error(
        "NOT saving step %d: the state is not finite in %s.",
        step,
        _some(non_finite),
      )
      return False
    meta = {"step": step, "config": self._config, "facts": self._facts}
    meta = _sealed(meta | {"leaves": leaves})
    with _disk_errors_explained(self.workdir):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
        ),
        force=True,
      )
    return True

  def restore(
    self, state_like: PyTree, *, step: int | None = None
  ) -> tuple[PyTree, int] | None:
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
    steps = _from_first_process(_steps_on_disk(self._root))
    if not steps and step is None:
      return None
    abstract = jax.tree.map(_abstract, state_like)
    state, found, skipped = _newest_usable(
      self._root, steps, step, lambda path: _read_state(path, abstract)
    )
    if skipped:
      self._set_aside(skipped)
    return state, found

  def wait(self) -> None:
    """Blocks until the last save is on disk; its errors surface here."""
    with _disk_errors_explained(self.workdir):
      self._manager.wait_until_finished()
      self._mark()

  def close(self) -> None:
    """Waits for the last save and frees the threads."""
    with _disk_errors_explained(self.workdir):
      self._manager.close()
      self._mark()

  def _latest_to_follow(self) -> int | None:
    # Orbax would make a removed directory again, and a run whose directory
    # somebody took away would go on writing to nobody.
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
    """Leaves a sign that steps were saved, should they ever go missing."""
    if self._is_marked or not self._root.exists():
      return
    if not _steps_on_disk(self._root):
      return
    if jax.process_index() == 0:
      (self.workdir / SAVED_FILE).write_text(
        "This run has saved checkpoints. Without them it does not start anew:"
        " it says that they are gone.\n"
      )
    self._is_marked = True

  def _write_config(self) -> None:
    if jax.process_index() == 0:
      text = json.dumps(self._config, indent=2, sort_keys=True) + "\n"
      scratch = self.workdir / "config.json.tmp"
      scratch.write_text(text)
      scratch.replace(self.workdir / "config.json")

  def _set_aside(self, steps: Sequence[int]) -> None:
    if jax.process_index() == 0:
      with _disk_errors_explained(self.workdir):
        for step in steps:
          (self._root / str(step)).rename(_free_name(self._root, step))
    multihost_utils.sync_global_devices("imsvd_jax: damaged steps set aside")
    self._manager.reload()


# -----------------------------------------------------------------------------
# Configurations.
# -----------------------------------------------------------------------------


def load_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the configuration of the newest checkpoint, else config.json.

  Raises:
    UserError: There is neither.
  """
  meta = _newest_meta(workdir)
  if meta is not None:
    return meta["config"]
  workdir, _ = _locate(workdir)
  try:
    return json.loads((workdir / "config.json").read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{workdir} holds no run's configuration ({error}). Expected the workdir"
      " of a training run."
    ) from error


def load_facts(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the `facts` of the newest checkpoint; {} if it has none."""
  meta = _newest_meta(workdir)
  return meta.get("facts", {}) if meta is not None else {}


def _newest_meta(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """What is beside the newest state that can be read; None if nothing can."""
  workdir, step = _locate(workdir)
  steps = _steps_on_disk(workdir / "checkpoints")
  for candidate in [step] if step is not None else steps[::-1]:
    with contextlib.suppress(_Damage):
      return _read_meta(workdir / "checkpoints" / str(candidate))
  return None


def check_config(
  stored: Mapping[str, Any],
  current: Mapping[str, Any],
  *,
  harmless: Collection[str] = (),
  allow: Collection[str] = (),
) -> list[str]:
  """Compares the configuration of a run with the one that would go on with it.

  A key is named with dots, "data.seed", and covered by a prefix "data" or
  "data.seed" but not "da"; "*" covers every key. Every difference is logged.

  Args:
    stored: What the checkpoint was made with.
    current: What the run would continue with.
    harmless: Prefixes of keys that change neither the state's shape nor the
      order of the data.
    allow: Prefixes of further keys that the user said may differ.

  Returns:
    The keys that differ, sorted.

  Raises:
    UserError: Some differing key is neither harmless nor allowed.
  """
  old, new = flatten(_as_json(stored)), flatten(_as_json(current))
  changes = {
    key: f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
    for key in sorted(old.keys() | new.keys())
    if key not in old or key not in new or old[key] != new[key]
  }
  refused = {}
  for key, change in changes.items():
    if _covered(key, harmless):
      logger.info("Resuming with a changed %s (harmless)", change)
    elif _covered(key, allow):
      logger.warning("Resuming with a changed %s (allowed)", change)
    else:
      refused[key] = change
  if refused:
    raise UserError(
      "This run was started with another configuration:"
      f" {'; '.join(refused.values())}. Restore these keys, use a new"
      f' --workdir, or allow them: --config.allow_changes="{tuple(refused)}".'
    )
  return list(changes)


def _shown(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key]) if key in flat else "(absent)"


def _covered(key: str, prefixes: Collection[str]) -> bool:
  return any(
    prefix == "*" or key == prefix or key.startswith(prefix + ".")
    for prefix in prefixes
  )


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  # A round trip, so that a tuple equals the list that JSON makes of it.
  return json.loads(json.dumps(config))


# -----------------------------------------------------------------------------
# Weights for evaluation and for new runs.
# -----------------------------------------------------------------------------


class Variables(NamedTuple):
  """A model read from a checkpoint: trees of NumPy arrays."""

  params: PyTree
  batch_stats: PyTree
  target: PyTree | None
  step: int
  config: dict[str, Any]


class InitReport(NamedTuple):
  """What `init_from` did: names of leaves, with the reason where needed."""

  step: int
  loaded: list[str]
  not_loaded: list[str]
  unused: list[str]

  def __str__(self) -> str:
    """Counts in the first line, then a line for each leaf left out."""
    lines = [
      f"step {self.step}: {len(self.loaded)} leaves loaded;"
      f" {len(self.not_loaded)} left as initialized;"
      f" {len(self.unused)} of the other run unused"
    ]
    lines += [f"  left as initialized: {name}" for name in self.not_loaded]
    lines += [f"  unused: {name}" for name in self.unused]
    return "\n".join(lines)


def load_variables(
  workdir: str | os.PathLike, step: int | None = None
) -> Variables:
  """Reads a run's weights without knowing its optimizer or its devices.

  Args:
    workdir: A run's directory, or one step's directory in it.
    step: The step; the newest good one by default.

  Raises:
    UserError: There is no checkpoint, or none that is undamaged.
  """
  workdir, named_step = _locate(workdir)
  root = workdir / "checkpoints"
  steps = _steps_on_disk(root)
  if not steps:
    raise UserError(
      f"{workdir} holds no checkpoints. Expected the workdir of a training run"
      " that has saved at least once."
    )
  step = named_step if step is None else step
  (tree, meta), found, _ = _newest_usable(root, steps, step, _read_variables)
  variables = [tree.get(name) for name in _VARIABLES]
  return Variables(*variables, step=found, config=meta["config"])


def init_from(
  source: str | os.PathLike, state_like: PyTree
) -> tuple[PyTree, InitReport]:
  """Starts a new run from another run's weights.

  Params and batch statistics are taken where name and shape agree. Everything
  else (step, optimizer, key) stays as it is, and a target network starts as
  the copy of the new weights that it is at the start of any run.

  Args:
    source: A run's directory, or one step's directory in it.
    state_like: A train state of concrete arrays with the attributes params,
      batch_stats and target, and the method `replace`.

  Returns:
    The state, and what was and what was not loaded.

  Raises:
    UserError: Nothing could be loaded.
  """
  stored = load_variables(source)
  own = {"params": state_like.params, "batch_stats": state_like.batch_stats}
  found = _named_leaves(
    {"params": stored.params or {}, "batch_stats": stored.batch_stats or {}}
  )
  report = InitReport(stored.step, [], [], [])

  def choose(path, leaf):
    name = _name(path)
    if name in found and found[name].shape == leaf.shape:
      report.loaded.append(name)
      return _placed_like(found[name], leaf)
    reason = f" {list(found[name].shape)}" if name in found else " absent"
    report.not_loaded.append(f"{name} {list(leaf.shape)}, there{reason}")
    return leaf

  new = jax.tree_util.tree_map_with_path(choose, own)
  report.unused.extend(sorted(found.keys() - _named_leaves(own).keys()))
  if not report.loaded:
    raise UserError(
      f"Nothing in {source} fits this model: {_some(report.not_loaded)}."
      " Expected a run with the same backbone."
    )
  target = state_like.target
  new_target = None if target is None else jax.tree.map(jnp.copy, new)
  return state_like.replace(**new, target=new_target), report


def _placed_like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
  value = value.astype(leaf.dtype)
  return jax.make_array_from_callback(
    leaf.shape, leaf.sharding, lambda index: value[index]
  )


# -----------------------------------------------------------------------------
# Checksums: exact, order matters, on the devices that hold the leaf.
# -----------------------------------------------------------------------------


@jax.jit
def _summary(x: jax.Array) -> jax.Array:
  """Returns uint32 [2]: a checksum of the bits, the number of non-finites.

  The checksum is sum_i mix(w_i xor i c) modulo 2^32 over the 32-bit words w_i.
  Mix is a bijection, so one changed word always changes the sum; integers add
  exactly, so the sum does not depend on the number of devices.
  """
  non_finite = jnp.uint32(0)
  # A scalar may be infinite by design, such as the best value seen so far.
  if jnp.issubdtype(x.dtype, jnp.floating) and x.ndim > 0:
    non_finite = jnp.sum(~jnp.isfinite(x), dtype=jnp.uint32)
  words = _words(x)
  index = jax.lax.iota(jnp.uint32, words.size).reshape(words.shape)
  mixed = _mix(words ^ (index * jnp.uint32(0x9E3779B1)))
  return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), non_finite])


def _words(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jnp.stack([_words(x.real), _words(x.imag)])
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(word: jax.Array) -> jax.Array:
  # The finalizer of MurmurHash3: each input bit flips half of the output bits.
  word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
  return word ^ (word >> 16)


def _describe(tree: PyTree) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """Returns {name: shape, dtype, checksum}, and which leaves are not finite."""
  leaves = _named_leaves(tree)
  # Dispatch all before fetching any: one wait for the devices, not one a leaf.
  summaries = jax.device_get(
    {name: _summary(_raw(leaf)) for name, leaf in leaves.items()}
  )
  described = {
    name: {
      "shape": list(leaf.shape),
      "dtype": str(leaf.dtype),
      "checksum": int(summaries[name][0]),
    }
    for name, leaf in leaves.items()
  }
  return described, [name for name in leaves if summaries[name][1]]


def _raw(leaf: Any) -> Any:
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(leaf) if is_key else leaf


def _named_leaves(tree: PyTree) -> dict[str, Any]:
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {_name(path): leaf for path, leaf in paths}


def _name(path: Sequence[Any]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


# -----------------------------------------------------------------------------
# Reading one step.
# -----------------------------------------------------------------------------


class _Damage(Exception):
  """This step cannot be trusted; another one may be."""


def _read_state(directory: epath.Path, abstract: PyTree) -> PyTree:
  """Reads and verifies a whole state; every process or none succeeds."""
  state, damage = None, None
  try:
    meta = _read_meta(directory)
    _check_fits(meta["leaves"], _named_leaves(abstract), directory)
    with _reading(directory):
      state = ocp.StandardCheckpointHandler().restore(
        directory / "state", args=ocp.args.StandardRestore(abstract)
      )
  except _Damage as error:
    damage = error
  # The checksums below are a collective computation: all must take part.
  if not np.all(multihost_utils.process_allgather(np.array(damage is None))):
    raise damage or _Damage("another process could not read it")
  _verify(meta["leaves"], state)
  return state


def _read_variables(directory: epath.Path) -> tuple[dict[str, Any], Any]:
  """Reads and verifies params, batch_stats and target as NumPy arrays."""
  meta = _read_meta(directory)
  wanted = {
    name: leaf
    for name, leaf in meta["leaves"].items()
    if name.split("/")[0] in _VARIABLES
  }
  item = _nested({name: 0 for name in wanted})
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with _reading(directory):
    tree = ocp.PyTreeCheckpointHandler().restore(
      directory / "state",
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: as_numpy, item),
        partial_restore=True,
      ),
    )
  _verify(wanted, tree)
  return tree, meta


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return tree


def _verify(expected: Mapping[str, Any], tree: PyTree) -> None:
  found, _ = _describe(tree)
  wrong = sorted(
    name
    for name in expected.keys() | found.keys()
    if expected.get(name) != found.get(name)
  )
  if wrong:
    raise _Damage(f"the checksum is wrong in {_some(wrong)}")


def _check_fits(
  stored: Mapping[str, Any], wanted: Mapping[str, Any], directory: epath.Path
) -> None:
  """Raises UserError if the shapes differ: a changed config, not damage."""
  differences = []
  for name in sorted(stored.keys() | wanted.keys()):
    there = _kind(stored[name]) if name in stored else "absent"
    here = "absent"
    if name in wanted:
      leaf = wanted[name]
      here = _kind({"shape": list(leaf.shape), "dtype": str(leaf.dtype)})
    if there != here:
      differences.append(f"{name} is {there} in the checkpoint, {here} here")
  if differences:
    raise UserError(
      f"{directory} does not fit this configuration: {_some(differences)}."
      " Use the configuration that the run was started with, or a new"
      " --workdir."
    )


def _kind(leaf: Mapping[str, Any]) -> str:
  return f"{leaf['dtype']}{leaf['shape']}"


def _read_meta(directory: epath.Path) -> dict[str, Any]:
  with _reading(directory):
    meta = ocp.JsonCheckpointHandler().restore(
      directory / "meta", args=ocp.args.JsonRestore()
    )
    if not isinstance(meta, dict) or _sealed(meta["body"]) != meta:
      raise _Damage("meta does not match its own digest")
  return meta["body"]


def _sealed(body: Mapping[str, Any]) -> dict[str, Any]:
  text = json.dumps(body, sort_keys=True)
  return {"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@contextlib.contextmanager
def _reading(directory: epath.Path) -> Iterator[None]:
  """Makes damage of whatever a damaged file makes Orbax and TensorStore do."""
  try:
    yield
  except _Damage:
    raise
  except PermissionError as error:
    raise UserError(f"May not read {directory}: {error}.") from error
  except Exception as error:
    if files.is_passing(error, directory):
      raise  # A good checkpoint must not be set aside for a network's sake.
    raise _Damage(_root_cause(error)) from error


def _root_cause(error: BaseException) -> str:
  while error.__cause__ is not None:
    error = error.__cause__
  first_line = (str(error).splitlines() or [""])[0][:300]
  return f"{type(error).__name__}: {first_line}"


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


# -----------------------------------------------------------------------------
# Walking over the steps.
# -----------------------------------------------------------------------------


def _newest_usable(
  root: epath.Path,
  steps: Sequence[int],
  step: int | None,
  read: Callable[[epath.Path], Any],
) -> tuple[Any, int, list[int]]:
  """Returns what `read` makes of the newest good step, it, those skipped."""
  if step is not None and step not in steps:
    raise UserError(f"{root} holds no step {step}; it holds {list(steps)}.")
  skipped: list[int] = []
  for candidate in [step] if step is not None else sorted(steps)[::-1]:
    try:
      found = read(root / str(candidate))
    except _Damage as damage:
      logger.error("SKIPPING damaged checkpoint %d: %s.", candidate, damage)
      skipped.append(candidate)
      continue
    if skipped:
      logger.error("FALLING BACK to step %d of %s.", candidate, root)
    return found, candidate, skipped
  raise UserError(
    f"No usable checkpoint in {root}: {skipped} damaged (the log says how)."
    " Nothing was changed. Put a good copy back, or use a new --workdir to"
    " start over."
  )


def _check_not_emptied(workdir: epath.Path, root: epath.Path) -> None:
  """Raises UserError where steps were saved and none is left."""
  found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
  damaged = [name for name in found if name.startswith(_DAMAGED)]
  marker = workdir / SAVED_FILE
  if not (damaged or marker.exists()) or _steps_on_disk(root):
    return
  what = f"only {_some(damaged)}" if damaged else "none"
  raise UserError(
    f"This run has saved checkpoints, and {root} holds {what}. Nothing was"
    f" changed. Put them back, or use a new --workdir; to start over here,"
    f" remove {workdir}."
  )


def _steps_on_disk(root: epath.Path) -> list[int]:
  """Returns the committed steps, ascending; damaged ones are among them."""
  return sorted(ocp.utils.checkpoint_steps(root))


def _from_first_process(steps: Sequence[int]) -> list[int]:
  # Network file systems may show two processes two listings.
  count = multihost_utils.broadcast_one_to_all(np.int32(len(steps)))
  padded = np.zeros(int(count), np.int32)
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


def _free_name(root: epath.Path, step: int) -> epath.Path:
  path, count = root / f"{_DAMAGED}{step}", 1
  while path.exists():
    count += 1
    path = root / f"{_DAMAGED}{step}-{count}"
  return path


def _locate(path: str | os.PathLike) -> tuple[epath.Path, int | None]:
  """Returns (workdir, None), or (workdir, step) for a step's directory."""
  path = files.absolute(path)
  if path.name.isdigit() and path.parent.name == "checkpoints":
    return path.parent.parent, int(path.name)
  return path, None


def _some(names: Sequence[str], limit: int = 5) -> str:
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return "; ".join(names[:limit]) + more


# -----------------------------------------------------------------------------
# Writing.
# -----------------------------------------------------------------------------


class _Manager(ocp.CheckpointManager):
  """Leaves the preemption notice to the training loop.

  Orbax asks JAX's preemption service itself, and asks again for the saved step
  when the save ends in the background. The service takes that for the step
  that the process is at; a SIGTERM that comes before the loop asks again is
  then set to stop the run at a step long past, that is, never.
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
    # What a kill during a save has left would otherwise pile up.
    cleanup_tmp_directories=True,
    # A damaged step must not stop the manager from starting.
    lightweight_initialize=True,
    save_root_metadata=False,
  )
  return _Manager(root, options=options)


@contextlib.contextmanager
def _disk_errors_explained(workdir: epath.Path) -> Iterator[None]:
  """Turns what a full, read-only or missing disk raises into a UserError."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    remote = files.is_remote(workdir)
    reason = (files.lasting_reason if remote else _disk_reason)(error)
    if reason is None:
      raise
    raise UserError(
      f"Cannot write a checkpoint in {workdir}: {reason}. The checkpoints"
      " already there are intact; make room or mend the directory, and run the"
      " same command again to resume."
    ) from error


def _disk_reason(error: BaseException | None) -> str | None:
  # TensorStore raises ValueError with the system's message in its text.
  while error is not None:
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
      return os.strerror(error.errno)
    for number in _DISK_ERRNOS:
      if os.strerror(number) in str(error):
        return os.strerror(number)
    error = error.__cause__ or error.__context__
  return None
