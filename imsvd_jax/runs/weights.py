"""Weights of a run, for evaluation and as the start of another run."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError, listing
from imsvd_jax.models.vit import resized_positions
from imsvd_jax.runs import best, run_directory, verification, weight_files

_POSITIONS = "params/backbone/pos_embed"
_VARIABLES = ("params", "batch_stats", "target")


class Variables(NamedTuple):
  """A model read from a checkpoint: trees of NumPy arrays."""

  params: Any
  batch_stats: Any
  target: Any  # None where the objective has no target network.
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
  workdir: str | os.PathLike,
  step: int | str | None = None,
  check: Callable[[dict[str, Any]], None] | None = None,
) -> Variables:
  """Reads a run's weights without knowing its optimizer or its devices.

  Args:
    workdir: A run's directory, or one step's directory in it.
    step: The step, or "best" (see `best`); the newest good one by default.
    check: Called with the recipe before the weights are read.

  Raises:
    UserError: There is no checkpoint, or none that is undamaged.
  """
  directory, named_step = run_directory.locate(workdir)
  root = directory / run_directory.CHECKPOINTS
  step = named_step if step is None else best.find_step(directory, step)
  run_id = run_directory.read_id(directory)
  (tree, meta), found, _ = verification.newest_usable(
    root,
    lambda: run_directory.steps_on_disk(root),
    step,
    lambda path: _read_variables(path, run_id, check),
  )
  # An empty tree, as of networks without BatchNorm, is not stored.
  return Variables(
    tree.get("params", {}),
    tree.get("batch_stats", {}),
    tree.get("target"),
    step=found,
    config=meta["config"],
  )


def _read_variables(
  directory: epath.Path,
  run_id: str | None,
  check: Callable[[dict[str, Any]], None] | None,
) -> tuple[dict[str, Any], Any]:
  """Reads and verifies params, batch_stats and target as NumPy arrays."""
  meta = verification.read_meta(directory)
  verification.check_owner(meta, run_id, directory)
  verification.check_merged(directory)
  if check is not None:
    check(meta["config"])
  wanted = {
    name: leaf
    for name, leaf in meta["leaves"].items()
    if name.split("/")[0] in _VARIABLES
  }
  item = _nested({name: 0 for name in wanted})
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  with verification.reading(directory):
    tree = ocp.PyTreeCheckpointHandler().restore(
      directory / "state",
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=jax.tree.map(lambda _: as_numpy, item),
        partial_restore=True,
      ),
    )
  verification.verify(wanted, tree)
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


def check_source(source: str | os.PathLike) -> None:
  """Raises UserError if there is nothing that `init_from` could read."""
  if os.path.isfile(os.path.expanduser(os.fspath(source))):
    return
  directory, _ = run_directory.locate(source)
  if not run_directory.steps_on_disk(directory / run_directory.CHECKPOINTS):
    found = "no checkpoint" if directory.exists() else "nothing"
    raise UserError(
      f"init_from={source}: found {found}; expected the workdir of a training"
      " run, a checkpoint in it, or a file of weights."
    )


def init_from(
  source: str | os.PathLike, state_like: Any
) -> tuple[Any, InitReport]:
  """Starts a new run from another run's weights.

  Takes params and batch statistics where name and shape agree; a ViT's
  positions are interpolated. Everything else (step, optimizer, key) stays as it
  is. A target network starts as a copy of the new weights, as at the start of
  any run.

  Args:
    source: A run's directory, or one step's directory in it; or a file of
      weights, in any format that `formats.read_file` reads.
    state_like: A train state of concrete arrays with the attributes params,
      batch_stats and target, and the method `replace`.

  Returns:
    The state, and a report of what was loaded and what was not.

  Raises:
    UserError: Nothing could be loaded.
  """
  variables, step = _variables_and_step(source)
  own = {"params": state_like.params, "batch_stats": state_like.batch_stats}
  found = verification.named_leaves(variables)
  new, report = _take_what_fits(own, found, step)
  if not report.loaded:
    raise UserError(
      f"Nothing in {source} fits this model: {listing(report.not_loaded)}."
      " Expected a run with the same backbone."
    )
  target = state_like.target
  if target is not None:
    copies = jax.tree.map(jnp.copy, new)
    # It may be split over the devices where the weights are whole.
    places = jax.tree.map(lambda leaf: leaf.sharding, target["params"])
    target = copies | {"params": jax.device_put(copies["params"], places)}
  return state_like.replace(**new, target=target), report


def _variables_and_step(
  source: str | os.PathLike,
) -> tuple[dict[str, Any], int]:
  path = os.path.expanduser(os.fspath(source))
  if os.path.isfile(path):
    imported = formats.read_file(path)
    return imported.variables, weight_files.stored_step(imported)
  stored = load_variables(source)
  return {
    "params": stored.params,
    "batch_stats": stored.batch_stats,
  }, stored.step


def _take_what_fits(
  own: dict[str, Any], found: Mapping[str, np.ndarray], step: int
) -> tuple[dict[str, Any], InitReport]:
  """Replaces the leaves of `own` by those found under the same name."""
  names = verification.named_leaves(own).keys()
  report = InitReport(step, [], [], sorted(found.keys() - names))

  def choose(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
    name = verification.leaf_name(path)
    value = found.get(name)
    if name == _POSITIONS and value is not None:
      value = np.asarray(resized_positions(value, leaf.shape[1]))
    if value is not None and value.shape == leaf.shape:
      report.loaded.append(name)
      return _placed_like(value, leaf)
    reason = f" {list(found[name].shape)}" if name in found else " absent"
    report.not_loaded.append(f"{name} {list(leaf.shape)}, there{reason}")
    return leaf

  return jax.tree_util.tree_map_with_path(choose, own), report


def _placed_like(value: np.ndarray, leaf: jax.Array) -> jax.Array:
  value = value.astype(leaf.dtype)
  return jax.make_array_from_callback(
    leaf.shape, leaf.sharding, lambda index: value[index]
  )
