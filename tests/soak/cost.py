"""Measures the cost of finiteness checks and checkpoints, as ratios.

  python -m tests.soak.cost [ROUNDS [MODE]]

Trains configs/digits.py (or its mode MODE, "debug") on random bytes with the
trainer's own step. In each round the contenders take turns of ten steps:
without finiteness checks, with them, and with them and a checkpoint that is
written in the background, as in training. Turns are short because machines
change their speed within seconds; the cost of a checkpoint is then divided by
the number of steps between two checkpoints of the recipe. Ratios are computed
within each round, in wall-clock time (which other programs on the machine
affect) and in CPU time.
"""

import sys
import tempfile
import time
import unittest.mock

import jax
import numpy as np

from configs import digits
from imsvd_jax.base import devices
from imsvd_jax.runs import checkpointer
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import finite
from imsvd_jax.training import step as step_lib

_NUM_STEPS = 10  # Of a turn.


def compile_step(experiment, replicated, state, batch, *, checked):
  """Returns the compiled step, with or without the checks."""
  unchecked = lambda old, new, metrics: (
    new.replace(step=old.step + 1),
    metrics,
  )
  replacement = finite.discard_unless_finite if checked else unchecked
  with unittest.mock.patch.object(
    step_lib, "_discard_unless_finite", replacement
  ):
    step = step_lib.jit_train_step(experiment, replicated)
    return step.lower(state, batch).compile()


def one_turn(step, state, batch, run=None):
  """Returns the (wall-clock, CPU) seconds of a turn, and the new state.

  Args:
    step: The compiled step.
    state: The state to continue from.
    batch: Used for every step.
    run: Saves the state first, if given. The checkpoint must be on disk at the
      end of the turn, so that it does not slow the next contender.
  """
  clock, cpu = time.perf_counter(), time.process_time()
  if run is not None:
    assert run.save((run.latest_step() or 0) + 1, state)
  for _ in range(_NUM_STEPS):
    state, _ = step(state, batch)
  jax.block_until_ready(state.params)
  if run is not None:
    run.wait()
  return np.array(
    [time.perf_counter() - clock, time.process_time() - cpu]
  ), state


def main():
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
  config = digits.get_config(*sys.argv[2:])
  experiment = experiment_lib.build(config, 1437)
  mesh = devices.make_mesh()
  replicated = devices.replicated(mesh)
  rng = np.random.default_rng(0)
  size, batch_size = config.views.view1.size, config.batch_size
  shape = (batch_size, 2, size, size, config.data.channels)
  batch = {
    "views": (rng.integers(0, 256, shape, np.uint8),),
    "index": np.arange(batch_size, dtype=np.int32),
    "epoch": np.zeros(batch_size, np.int32),
  }
  batch = devices.shard_batch(batch, mesh)
  state = jax.jit(
    lambda: step_lib.init_state(experiment), out_shardings=replicated
  )()
  checked, unchecked = (
    compile_step(experiment, replicated, state, batch, checked=c)
    for c in (True, False)
  )
  every = config.checkpoint.every_steps
  with tempfile.TemporaryDirectory() as workdir:
    run = checkpointer.Checkpointer(workdir, keep_last=3, config={})
    contenders = [(unchecked, None), (checked, None), (checked, run)]
    turns = []
    for _ in range(rounds + 1):
      turns.append([])
      for step, saver in contenders:
        elapsed, state = one_turn(step, state, batch, saver)
        turns[-1].append(elapsed)
    run.close()
  # [rounds, 2]: clock and CPU. The first round warms up.
  without, checks, saves = np.swapaxes(turns[1:], 0, 1)
  save = saves - checks
  spread = 1 + save / (checks / _NUM_STEPS) / every
  print(f"{rounds} rounds of {_NUM_STEPS} steps; median [min, max]")
  for row, values in {
    "a step without checks, seconds": without / _NUM_STEPS,
    "with checks, relative to without": checks / without,
    "a checkpoint, seconds": save,
    f"a checkpoint every {every} steps, relative to none": spread,
  }.items():
    columns = zip(("clock", "CPU"), values.T, strict=True)
    texts = [
      f"{name} {np.median(v):.4f} [{v.min():.4f}, {v.max():.4f}]"
      for name, v in columns
    ]
    print(f"{row:44}" + "   ".join(texts))


if __name__ == "__main__":
  main()
