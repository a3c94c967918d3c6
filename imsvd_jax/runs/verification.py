"""Whether a checkpoint is intact: checksums, damage, the newest good step.

A checksum is exact and sees the order of the elements. It is computed on the
devices that hold a leaf when a step is saved; when a step is read, on the host
where that is possible: this compiles nothing.
"""

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from imsvd_jax.base import files
from imsvd_jax.base.errors import Damage, UserError, listing
from imsvd_jax.runs import run_directory, unfinished_io

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PAUSE_SECONDS = 1.0  # Before another try of what may pass.


@jax.jit
def checksum(x: jax.Array) -> jax.Array:
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


def host_checksum(x: np.ndarray) -> int:
  """Returns the same checksum of the bits, by NumPy."""
  words = _host_words(x)
  index = np.arange(words.size, dtype=np.uint32) * np.uint32(0x9E3779B1)
  return int(np.sum(_mix(words ^ index), dtype=np.uint32))


def _host_words(x: np.ndarray) -> np.ndarray:
  """Returns uint32 [size of `_words`]."""
  if np.issubdtype(x.dtype, np.complexfloating):
    return np.concatenate([_host_words(x.real), _host_words(x.imag)])
  unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
  return np.ascontiguousarray(x).reshape(-1).view(unsigned).astype(np.uint32)


def _words(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  if jnp.issubdtype(x.dtype, jnp.complexfloating):
    return jnp.stack([_words(x.real), _words(x.imag)])
  unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(word: Any) -> Any:
  # The finalizer of MurmurHash3: each input bit flips half of the output bits.
  word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
  word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
  return word ^ (word >> 16)


def describe(tree: Any) -> tuple[dict[str, dict[str, Any]], list[str]]:
  """Returns shape, dtype and checksum by name, and names of non-finite leaves.

  With several processes, all must call it: it is a collective computation.
  """
  leaves = named_leaves(tree)
  # Dispatch all before fetching any: one wait, not one per leaf.
  summaries = jax.device_get(
    {name: checksum(_raw(leaf)) for name, leaf in leaves.items()}
  )
  described = {
    name: _described(leaf, summaries[name][0]) for name, leaf in leaves.items()
  }
  return described, [name for name in leaves if summaries[name][1]]


def _described(leaf: Any, checksum: Any) -> dict[str, Any]:
  return {
    "shape": list(leaf.shape),
    "dtype": str(leaf.dtype),
    "checksum": int(checksum),
  }


def _checksum_of(leaf: Any) -> Any:
  """Returns a leaf's checksum, from a host's copy if there is one."""
  raw = _raw(leaf)
  if not isinstance(raw, jax.Array):
    return host_checksum(np.asarray(raw))
  if raw.is_fully_replicated:
    # Of one shard: an array that NumPy has seen itself cannot be donated.
    return host_checksum(np.asarray(raw.addressable_data(0)))
  return checksum(raw)[0]


def _raw(leaf: Any) -> Any:
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(leaf) if is_key else leaf


def named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves by name, such as "params/backbone/conv/kernel"."""
  paths = jax.tree_util.tree_leaves_with_path(tree)
  return {leaf_name(path): leaf for path, leaf in paths}


def leaf_name(path: Sequence[Any]) -> str:
  """Returns the name of a leaf, given its path in the tree."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def verify(expected: Mapping[str, Any], tree: Any) -> None:
  """Compares a tree with what `describe` said of it when it was saved.

  Raises:
    Damage: A checksum, a shape or a dtype differs.
  """
  # Those computed on devices are dispatched before any is fetched.
  leaves = named_leaves(tree)
  sums = {name: _checksum_of(leaf) for name, leaf in leaves.items()}
  found = {name: _described(leaf, sums[name]) for name, leaf in leaves.items()}
  wrong = sorted(
    name
    for name in expected.keys() | found.keys()
    if expected.get(name) != found.get(name)
  )
  if wrong:
    raise Damage(f"the checksum is wrong in {listing(wrong)}")


def check_fits(
  stored: Mapping[str, Any], wanted: Mapping[str, Any], directory: epath.Path
) -> None:
  """Raises UserError if shapes differ: the config changed; it is not damage."""
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
      f"{directory} does not fit this configuration: {listing(differences)}."
      " Use the configuration that the run was started with, or a new"
      " --workdir."
    )


def _kind(leaf: Mapping[str, Any]) -> str:
  return f"{leaf['dtype']}{leaf['shape']}"


def read_meta(directory: epath.Path) -> dict[str, Any]:
  """Reads the leaves, checksums, config and facts of one step.

  Raises:
    Damage: They cannot be read, do not match their digest, or are of another
      step.
  """
  with reading(directory):
    meta = ocp.JsonCheckpointHandler().restore(
      directory / "meta", args=ocp.args.JsonRestore()
    )
    if not isinstance(meta, dict) or sealed(meta["body"]) != meta:
      raise Damage("meta does not match its own digest")
    if str(meta["body"]["step"]) != directory.name:
      raise Damage(f"it is a copy of step {meta['body']['step']}")
  return meta["body"]


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the body with its digest, as `read_meta` expects it."""
  text = json.dumps(body, sort_keys=True)
  return {"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_complete(directory: epath.Path) -> None:
  """Checks a step on disk without reading its arrays.

  Raises:
    Damage: It lacks a leaf, or its list of leaves is wrong.
  """
  leaves = read_meta(directory)["leaves"]
  check_merged(directory)
  with reading(directory):
    tree = ocp.StandardCheckpointHandler().metadata(directory / "state")
  missing = sorted(leaves.keys() - named_leaves(tree).keys())
  if missing:
    raise Damage(f"{listing(missing)} missing")


def check_owner(
  meta: Mapping[str, Any], run_id: str | None, directory: epath.Path
) -> None:
  """Raises UserError if a step is of another run than the one of that id."""
  found = meta.get("run", run_id)
  if run_id is not None and found != run_id:
    raise UserError(
      f"{directory} is a checkpoint of another run, {found}; the run in this"
      f" directory is {run_id} (run.json). Nothing was changed; move the"
      " checkpoint away."
    )


def check_merged(directory: epath.Path) -> None:
  """Raises Damage if Orbax wrote a step's arrays but no list of them."""
  state = directory / "state"
  with reading(directory):
    names = {path.name for path in state.iterdir()}
  if "manifest.ocdbt" not in names and any(
    name.startswith("ocdbt.process_") for name in names
  ):
    raise Damage(
      "its files of each process were never merged, as happened below a path"
      " with [ ] ? * or \\ in it; to rescue it, copy the run to a plain path"
      " and merge the files there (docs/reliability.md has the command)"
    )


def merge(workdir: str | os.PathLike) -> None:
  """Merges the files of each process, in all steps that lack it.

  Args:
    workdir: A run's directory, in a path without [ ] ? * and backslashes.
  """
  root = files.absolute(workdir) / run_directory.CHECKPOINTS
  for step in run_directory.steps_on_disk(root):
    directory = root / str(step)
    try:
      check_merged(directory)
    except Damage:
      context = ocp.type_handlers.get_ts_context(use_ocdbt=True)
      asyncio.run(
        ocp.type_handlers.merge_ocdbt_per_process_files(
          directory / "state", context, use_zarr3=False
        )
      )


@contextlib.contextmanager
def reading(directory: epath.Path) -> Iterator[None]:
  """Turns errors about the content, while reading it, into Damage.

  Any other error, of the network, say, or of the disk, stays what it is: the
  checkpoint may be good.
  """
  try:
    yield
  except (Damage, UserError):
    raise
  except Exception as error:
    if files.is_passing(error, directory):
      raise
    if not files.is_remote(directory):
      _check_accessible(directory)
    raise Damage(files.root_cause(error)) from error


def _check_accessible(directory: epath.Path) -> None:
  """Raises OSError if anything below may not be seen, or cannot be opened.

  Orbax takes for missing what it has no permission to see.
  """

  def judge(error: OSError) -> None:
    if files.is_passing(error, directory):
      raise error

  for folder, _, names in os.walk(directory, onerror=judge):
    for name in names:
      try:
        # Without waiting for the other end of a pipe.
        flags = os.O_RDONLY | os.O_NONBLOCK
        os.close(os.open(os.path.join(folder, name), flags))
      except OSError as error:
        judge(error)


def twice(read: Callable[[], T], directory: epath.Path) -> T:
  """Reads again what cannot be read; damage counts if it is there both times.

  Raises:
    Damage: The content is wrong.
    UserError: It cannot be read now, for a reason that may pass.
  """
  passing = None
  try:
    return read()
  except Damage:
    pass
  except Exception as error:
    passing = _only_passing(error, directory)
    time.sleep(_PAUSE_SECONDS)
  try:
    return read()
  except Damage:
    if passing is None:
      raise
  except Exception as error:
    passing = _only_passing(error, directory)
  raise UserError(
    f"Cannot read {directory}: {files.root_cause(passing)}. It may be good, and"
    " nothing was changed; run the same command again."
  ) from passing


def _only_passing(error: Exception, directory: epath.Path) -> Exception:
  """Returns an error that may pass; raises any other."""
  has_lost_peer = jax.process_count() > 1 and isinstance(
    error, jax.errors.JaxRuntimeError
  )
  if has_lost_peer or not files.is_passing(error, directory):
    raise error
  return error


def newest_usable(
  root: epath.Path,
  list_steps: Callable[[], Sequence[int]],
  step: int | None,
  read: Callable[[epath.Path], T],
) -> tuple[T, int, list[int]]:
  """Reads the newest good step, walking back over the damaged ones.

  Args:
    root: The directory of the checkpoints.
    list_steps: Returns the steps in it. Asked again if one cannot be read: a
      run in progress may just have deleted it.
    step: This step and no other; None for the newest good one.
    read: Reads one step's directory; raises Damage.

  Returns:
    (what `read` returned, its step, the damaged steps that were skipped).

  Raises:
    UserError: There is no such step, none that is undamaged, or one that cannot
      be read now.
  """
  skipped: dict[int, Damage] = {}
  unfinished_io.ignore()

  def left() -> list[int]:
    steps = list_steps()
    if not steps:
      exists = root.parent.exists()
      found = "holds no checkpoints" if exists else "does not exist"
      raise UserError(
        f"{root.parent} {found}. Expected the workdir of a training run that"
        " has saved at least once."
      )
    if step is not None and step not in steps:
      raise UserError(f"{root} holds no step {step}; it holds {list(steps)}.")
    wanted = steps if step is None else [step]
    return [number for number in wanted if number not in skipped]

  while candidates := left():
    candidate = max(candidates)
    directory = root / str(candidate)
    try:
      found = twice(functools.partial(read, directory), directory)
    except Damage as damage:
      if candidate in list_steps():
        logger.error("SKIPPING damaged checkpoint %d: %s.", candidate, damage)
        skipped[candidate] = damage
      continue
    if skipped:
      logger.error("FALLING BACK to step %d of %s.", candidate, root)
    return found, candidate, list(skipped)
  reason = next(iter(skipped.values()))
  raise UserError(
    f"No usable checkpoint in {root}: {list(skipped)} damaged, the first"
    f" because {reason}. Nothing was changed. Put a good copy back, or use a"
    " new --workdir to start over."
  )
