"""What never losing a run costs: time per step with and without, as ratios.

  python -m tests.soak.cost [ROUNDS [MODE]]

Trains configs/digits.py (or its form MODE, "debug") on random bytes with the
trainer's own step. In each round the contenders take turns, each for as many
steps as the recipe has between two checkpoints: without finiteness checks, with
them, and with a checkpoint too, written in the background as the trainer does.
Ratios of medians, by the clock and in CPU time: other programs on the machine
count in the first.
"""

import statistics
import sys
import tempfile
import time
import unittest.mock

import jax
import numpy as np

from configs import digits
from imsvd_jax import checkpoint, sharding
from imsvd_jax import train_step as step_lib


def compile_step(experiment, replicated, state, batch, *, checked):
  """Returns the compiled step; without the checks, as it was before them."""
  unchecked = lambda old, new, metrics: (
    new.replace(step=old.step + 1),
    metrics,
  )
  replacement = step_lib._discard_unless_finite if checked else unchecked
  with unittest.mock.patch.object(
    step_lib, "_discard_unless_finite", replacement
  ):
    step = step_lib.jit_train_step(experiment, replicated)
    return step.lower(state, batch).compile()


def one_period(step, state, batch, num_steps, run=None):
  """Returns (clock, CPU) seconds per step, and the state.

  Args:
    step: The compiled step.
    state: To go on from.
    batch: The same for every step.
    num_steps: How many.
    run: Where the state is saved first, if at all. It must be on disk at the
      end, so that no contender pays for another's.
  """
  clock, cpu = time.perf_counter(), time.process_time()
  if run is not None:
    assert run.save((run.latest_step() or 0) + 1, state)
  for _ in range(num_steps):
    state, _ = step(state, batch)
  jax.block_until_ready(state.params)
  if run is not None:
    run.wait()
  clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
  return (clock / num_steps, cpu / num_steps), state


def main():
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
  config = digits.get_config(*sys.argv[2:])
  experiment = step_lib.build(config, 1437)
  mesh = sharding.make_mesh()
  replicated = sharding.replicated(mesh)
  rng = np.random.default_rng(0)
  size, batch_size = config.views.view1.size, config.batch_size
  shape = (batch_size, 2, size, size, config.data.channels)
  batch = {
    "views": (rng.integers(0, 256, shape, np.uint8),),
    "index": np.arange(batch_size, dtype=np.int32),
    "epoch": np.zeros(batch_size, np.int32),
  }
  batch = sharding.shard_batch(batch, mesh)
  state = jax.jit(
    lambda: step_lib.init_state(experiment), out_shardings=replicated
  )()
  checked, unchecked = (
    compile_step(experiment, replicated, state, batch, checked=c)
    for c in (True, False)
  )
  every = config.checkpoint.every_steps
  with tempfile.TemporaryDirectory() as workdir:
    run = checkpoint.Checkpointer(workdir, keep_last=3, config={})
    contenders = {
      "without": (unchecked, None),
      "finiteness checks": (checked, None),
      "checks and checkpoints": (checked, run),
    }
    times = {name: [] for name in contenders}
    for number in range(rounds + 1):
      for name, (step, saver) in contenders.items():
        elapsed, state = one_period(step, state, batch, every, saver)
        if number:  # The first round warms up.
          times[name].append(elapsed)
    run.close()
  print(f"{rounds} rounds of {every} steps; seconds per step, medians:")
  base = None
  for name, pairs in times.items():
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    base = base or medians
    clock, cpu = medians
    print(
      f"{name:24}clock {clock:.4f} ({clock / base[0]:.4f} of without)"
      f"  CPU {cpu:.4f} ({cpu / base[1]:.4f})"
    )


if __name__ == "__main__":
  main()
