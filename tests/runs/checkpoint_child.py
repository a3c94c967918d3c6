"""Runs that the checkpoint tests kill, starve of disk or run in pairs.

Each is a process of its own: `python checkpoint_child.py NAME ARGUMENTS`.
"""

import errno
import os
import pathlib
import sys
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from imsvd_jax.base.errors import Damage, UserError
from imsvd_jax.runs import checkpointer, verification, weights

CONFIG = {"data": {"seed": 1}, "log_every": 10}


@flax.struct.dataclass
class State:
  """Has the same fields and kinds of leaves as the trainer's state."""

  step: Any
  params: Any
  batch_stats: Any
  opt_state: Any
  target: Any
  rng: Any


def make_state(step: int, size: int = 32, target: bool = False) -> State:
  random = np.random.default_rng(step)
  params = {
    "backbone": {"kernel": random.normal(size=(size, 64)).astype(np.float32)},
    "projector": {"bias": random.normal(size=(16,)).astype(jnp.bfloat16)},
  }
  stats = {"backbone": {"mean": np.full((8,), step, np.float32)}}
  momentum = jax.tree.map(lambda leaf: leaf * 2, params)
  state = State(
    step=np.int32(step),
    params=params,
    batch_stats=stats,
    opt_state=({"trace": momentum}, (), {"count": np.int32(step)}),
    target={"params": params, "batch_stats": stats} if target else None,
    rng=jax.random.key(step),
  )
  return jax.tree.map(jnp.asarray, state)


def place(state: State, devices: list[jax.Device]) -> State:
  """Replicates the state over devices; the momentum is sharded instead."""
  mesh = jax.make_mesh(
    (len(devices),),
    ("data",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices,
  )
  replicated = jax.NamedSharding(mesh, jax.P())
  sharded = jax.NamedSharding(mesh, jax.P("data"))
  shardings = jax.tree.map(lambda _: replicated, state)
  momentum = jax.tree.map(lambda _: sharded, state.opt_state[0])
  shardings = shardings.replace(opt_state=(momentum, *shardings.opt_state[1:]))
  # device_put takes no typed key onto another process's devices.
  placed = jax.device_put(
    state.replace(rng=jax.random.key_data(state.rng)), shardings
  )
  return placed.replace(rng=jax.random.wrap_key_data(placed.rng))


def same(left: State, right: State) -> bool:
  """Whether two states agree in structure and in every bit."""
  equal = jax.tree.map(
    lambda a, b: (
      a.dtype == b.dtype and _bits(a).tobytes() == _bits(b).tobytes()
    ),
    left,
    right,
  )
  return all(jax.tree.leaves(equal))


def _bits(leaf: jax.Array) -> np.ndarray:
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    leaf = leaf.addressable_data(0)
  return np.asarray(leaf)


def save_forever(workdir: str) -> None:
  """Saves without a pause and prints each step before it saves it."""
  run = checkpointer.Checkpointer(workdir, keep_last=3, config=CONFIG)
  for step in range(1, 10000):
    print(step, flush=True)
    run.save(step, make_state(step, size=8192))


def small_disk(workdir: str) -> None:
  """Fills a disk of a few megabytes, then finds it read-only."""
  run = checkpointer.Checkpointer(workdir, keep_last=9, config=CONFIG)
  try:
    for step in range(1, 9):
      run.save(step, make_state(step, size=2048))
    run.wait()
  except UserError as error:
    print("FULL", error)
  restored, step = run.restore(make_state(0, size=2048))
  assert same(restored, make_state(step, size=2048))
  print("RESTORED", step)
  assert os.system(f"mount -o remount,ro {pathlib.Path(workdir).parent}") == 0
  try:
    run.save(100, make_state(100))
    run.wait()
  except UserError as error:
    print("READONLY", error)
  try:
    checkpointer.Checkpointer(workdir, keep_last=9, config=CONFIG)
  except UserError as error:
    print("AT START", error)
  print("LOADED", weights.load_variables(workdir).step)
  os._exit(0)  # A pending save cannot end well, and need not.


def hang(workdir: str) -> None:
  """The storage does not answer while a step is written."""
  run = checkpointer.Checkpointer(
    workdir, keep_last=3, config=CONFIG, deadline_minutes=0.05
  )
  run.save(1, make_state(1))
  run.wait()
  run._manager.wait_until_finished = lambda: time.sleep(1000)
  run.save(2, make_state(2))
  run.wait()


def _join(port: str, index: str) -> None:
  address = f"127.0.0.1:{port}"
  jax.distributed.initialize(
    address, 2, int(index), coordinator_bind_address=address
  )


def failures(workdir: str, port: str, index: str) -> None:
  """Process 1 fails in several ways; both say why, and go on here."""
  _join(port, index)
  is_faulty = jax.process_index() == 1
  state = place(make_state(1), jax.devices())

  def attempt(name, action):
    try:
      action()
    except UserError as error:
      print(name, error.exit_code, error, flush=True)
    else:
      print(name, "went well", flush=True)

  def open_run(path):
    return checkpointer.Checkpointer(path, keep_last=1, config=CONFIG)

  attempt("SEPARATE", lambda: open_run(f"{workdir}-{index}"))
  run = open_run(workdir)
  run.save(1, state)
  run.wait()
  run.save(2, place(make_state(2), jax.devices()))
  run.wait()
  read_meta = verification.read_meta
  if is_faulty:
    verification.read_meta = _raising(OSError(errno.EIO, "I/O error"))
  attempt("TRANSIENT", lambda: run.restore(state))
  verification.read_meta = read_meta
  print("RESTORED", run.restore(state)[1], flush=True)
  handler = ocp.StandardCheckpointHandler
  async_save = handler.async_save
  if is_faulty:
    handler.async_save = _raising(OSError(errno.EMFILE, "too many"))
  attempt("SAVE", lambda: run.save(3, state))
  handler.async_save = async_save
  other = open_run(workdir)  # Orbax's threads of the first one wait for ever.
  if is_faulty:
    assert os.system(f"mount -o remount,bind,ro {workdir}") == 0
  other.save(4, state)
  attempt("BACKGROUND", other.wait)
  attempt("AT START", lambda: open_run(workdir))
  os._exit(0)


def _raising(error: Exception) -> Any:
  def fail(*args: Any, **kwargs: Any) -> None:
    raise error

  return fail


def pair(workdir: str, port: str, index: str) -> None:
  """Two processes save; the newest step fails in one of them only."""
  _join(port, index)
  run = checkpointer.Checkpointer(workdir, keep_last=3, config=CONFIG)
  for step in (1, 2, 3):
    run.save(step, place(make_state(step), jax.devices()))
  like = place(make_state(0), jax.devices())
  restored, step = run.restore(like)
  assert step == 3
  assert same(restored, place(make_state(3), jax.devices()))
  if jax.process_index() == 1:
    _fail_to_read("3")
  restored, step = run.restore(like)
  assert same(restored, place(make_state(step), jax.devices()))
  run.save(3, place(make_state(3), jax.devices()))
  run.close()
  print("RESTORED", step)


def _fail_to_read(step: str) -> None:
  read_meta = verification.read_meta

  def read_meta_or_fail(directory):
    if directory.name == step:
      raise Damage("injected")
    return read_meta(directory)

  verification.read_meta = read_meta_or_fail


if __name__ == "__main__":
  globals()[sys.argv[1]](*sys.argv[2:])
