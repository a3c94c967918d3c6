"""What never losing a run costs per step, as ratios within one process.

  python tests/soak/cost.py [ROUNDS]

Trains configs/digits.py on random bytes; CPU time, so that other programs on
the machine do not count. Rounds with and without take turns; the medians are
compared.
"""

import functools
import statistics
import sys
import tempfile
import time
import unittest.mock

import jax
import numpy as np

from configs import digits
from imsvd_jax import checkpoint
from imsvd_jax import train_step as step_lib

STEPS = 10


def compile_step(experiment, state, batch, *, checked):
  """Returns the compiled step; without the checks, as it was before them."""
  unchecked = lambda old, new, metrics: (
    new.replace(step=old.step + 1),
    metrics,
  )
  replacement = step_lib._discard_unless_finite if checked else unchecked
  with unittest.mock.patch.object(
    step_lib, "_discard_unless_finite", replacement
  ):
    step = jax.jit(
      functools.partial(step_lib.train_step, experiment), donate_argnums=0
    )
    return step.lower(state, batch).compile()


def seconds(step, state, batch):
  """Returns the CPU seconds of some steps, and the state after them."""
  begin = time.process_time()
  for _ in range(STEPS):
    state, _ = step(state, batch)
  jax.block_until_ready(state.params)
  return time.process_time() - begin, state


def main():
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
  config = digits.get_config()
  experiment = step_lib.build(config, 1437)
  rng = np.random.default_rng(0)
  size, batch_size = config.views.view1.size, config.batch_size
  views = rng.integers(0, 256, (batch_size, 2, size, size, 3), np.uint8)
  batch = {
    "views": (views,),
    "index": np.arange(batch_size, dtype=np.int32),
    "epoch": np.zeros(batch_size, np.int32),
  }
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  checked, unchecked = (
    compile_step(experiment, state, batch, checked=c) for c in (True, False)
  )
  times = {"with": [], "without": [], "save": []}
  with tempfile.TemporaryDirectory() as workdir:
    run = checkpoint.Checkpointer(workdir, keep_last=3, config={})
    for number in range(rounds):
      for name, step in (("with", checked), ("without", unchecked)):
        elapsed, state = seconds(step, state, batch)
        times[name].append(elapsed / STEPS)
      begin = time.process_time()
      run.save(number + 1, state)
      run.wait()
      times["save"].append(time.process_time() - begin)
    run.close()
  with_, without, save = (statistics.median(t) for t in times.values())
  every = config.checkpoint.every_steps
  print(f"CPU seconds per step: {with_:.4f} with checks, {without:.4f} without")
  print(f"finiteness checks: {with_ / without - 1:+.2%} per step")
  print(
    f"a save: {save:.3f} CPU seconds; at every {every} steps"
    f" {save / every / without:+.2%} per step"
  )


if __name__ == "__main__":
  main()
