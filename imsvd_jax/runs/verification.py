"""Whether a checkpoint is intact: checksums, damage, the newest good step.

A checksum is exact, sees the order of the elements, and is computed on the
devices that hold the leaf.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError, listing

logger = logging.getLogger(__name__)


class Damage(Exception):
  """This step cannot be trusted; another one may be."""


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
  found, _ = describe(tree)
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
    Damage: They cannot be read, or do not match their digest.
  """
  with reading(directory):
    meta = ocp.JsonCheckpointHandler().restore(
      directory / "meta", args=ocp.args.JsonRestore()
    )
    if not isinstance(meta, dict) or sealed(meta["body"]) != meta:
      raise Damage("meta does not match its own digest")
  return meta["body"]


def sealed(body: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the body with its digest, as `read_meta` expects it."""
  text = json.dumps(body, sort_keys=True)
  return {"body": body, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@contextlib.contextmanager
def reading(directory: epath.Path) -> Iterator[None]:
  """Turns any error of Orbax and TensorStore while reading into Damage."""
  try:
    yield
  except Damage:
    raise
  except PermissionError as error:
    raise UserError(f"May not read {directory}: {error}.") from error
  except Exception as error:
    if files.is_passing(error, directory):
      raise  # The network failed; the checkpoint may be good.
    raise Damage(_root_cause(error)) from error


def _root_cause(error: BaseException) -> str:
  while error.__cause__ is not None:
    error = error.__cause__
  first_line = (str(error).splitlines() or [""])[0][:300]
  return f"{type(error).__name__}: {first_line}"


def newest_usable(
  root: epath.Path,
  steps: Sequence[int],
  step: int | None,
  read: Callable[[epath.Path], Any],
) -> tuple[Any, int, list[int]]:
  """Reads the newest good step, walking back over the damaged ones.

  Args:
    root: The directory of the checkpoints.
    steps: The steps in it.
    step: This step and no other; None for the newest good one.
    read: Reads one step's directory; raises Damage.

  Returns:
    (what `read` returned, its step, the damaged steps that were skipped).

  Raises:
    UserError: There is no such step, or none that is undamaged.
  """
  if step is not None and step not in steps:
    raise UserError(f"{root} holds no step {step}; it holds {list(steps)}.")
  skipped: list[int] = []
  for candidate in [step] if step is not None else sorted(steps)[::-1]:
    try:
      found = read(root / str(candidate))
    except Damage as damage:
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
