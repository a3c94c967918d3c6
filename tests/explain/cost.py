"""What the analysis costs beside plain features, as ratios within one process.

  python -m tests.explain.cost [ROUNDS]

The network of configs/shapes.py with random weights, over 2048 of its images;
CPU time, so that other programs on the machine do not count. Features, the scan
of the images and the comparison of two views (which cuts and augments them
first) take turns; the medians are compared. Compilation does not count: the
clock starts after the first batch.
"""

import statistics
import sys
import time

import jax
import numpy as np

from configs import shapes
from imsvd_jax import data
from imsvd_jax.base import devices
from imsvd_jax.explain import run_subject
from imsvd_jax.explain.images import Images, TwoViews
from imsvd_jax.explain.scan import scan
from imsvd_jax.explain.view_comparison import compare_views
from imsvd_jax.runs.encoder import LoadedEncoder
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

NUM_IMAGES, BATCH_SIZE = 2048, 256


def untrained_encoder():
  config = shapes.get_config()
  config.data.num_examples = NUM_IMAGES
  experiment = experiment_lib.build(config, NUM_IMAGES)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  return LoadedEncoder(config, variables, 0, batch_size=BATCH_SIZE)


class Clock:
  """Batches that note the CPU time from the second one to the end."""

  def __init__(self, batches):
    self._batches = batches
    self.seconds = None

  def __iter__(self):
    for number, batch in enumerate(self._batches):
      if number == 1:
        begin = time.process_time()
      yield batch
    self.seconds = time.process_time() - begin


def main():
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
  encoder = untrained_encoder()
  settings = encoder.config.data
  source = data.make_source(settings, "train")
  subject = run_subject.subject_of(encoder, "untrained")
  views = run_subject.two_views(source, encoder.config, BATCH_SIZE)
  mesh = devices.make_mesh(jax.local_devices())
  chosen = encoder.config.objective[encoder.config.objective.name]
  shape = (encoder.config.model.projector[-1] // chosen.num_bins,)
  shape += (chosen.num_bins,)
  # In memory: reading the images is the same for features and the scan.
  batches = list(run_subject.batches_of(source, settings, BATCH_SIZE))

  def features(clock):
    for batch in clock:
      encoder.features(batch["image"])

  def compare(clock):
    two = TwoViews(lambda: clock, views.augment)
    compare_views(subject, two, shape, examples=np.arange(1), mesh=mesh)

  scan_all = lambda clock: scan(subject, Images(lambda: clock), mesh=mesh)
  passes = {
    "features": (lambda: batches, features),
    "scan": (lambda: batches, scan_all),
    "two views": (views.crops, compare),
  }
  times = {name: [] for name in passes}
  for name, (given, run) in list(passes.items()) * rounds:
    clock = Clock(given())
    run(clock)
    times[name].append(clock.seconds)
  count = NUM_IMAGES - BATCH_SIZE
  median = {name: statistics.median(found) for name, found in times.items()}
  for name, found in times.items():
    spread = np.array([min(found), max(found)]) * 1000 / count
    print(
      f"{name}: {1000 * median[name] / count:.3f} CPU seconds per 1000 images"
      f" ({spread[0]:.3f} to {spread[1]:.3f}),"
      f" {median[name] / median['features']:.2f} times features"
    )


if __name__ == "__main__":
  main()
