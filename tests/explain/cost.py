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
from imsvd_jax.explain.measurement import compare_views
from imsvd_jax.explain.scan import encoding_shapes, scan
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


def clocked(batches, seconds):
  """Yields the batches; appends the CPU time from the second one to the end."""
  for number, batch in enumerate(batches):
    if number == 1:
      begin = time.process_time()
    yield batch
  seconds.append(time.process_time() - begin)


def main():
  rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
  encoder = untrained_encoder()
  settings = encoder.config.data
  source = data.make_source(settings, "train")
  subject = run_subject.subject_of(encoder, "untrained")
  views = run_subject.two_views(source, encoder.config, BATCH_SIZE)
  mesh = devices.make_mesh(jax.local_devices())
  # In memory: reading the images is the same for features and the scan.
  batches = list(run_subject.batches_of(source, settings, BATCH_SIZE))
  encoding = encoding_shapes(subject, batches[0]["image"])
  shape = encoding.probabilities.shape[1:]

  def features(clocked_batches):
    for batch in clocked_batches:
      encoder.features(batch["image"])

  def compare(clocked_batches):
    two = TwoViews(lambda: clocked_batches, views.augment)
    compare_views(subject, two, shape, examples=np.arange(1), mesh=mesh)

  scan_all = lambda given: scan(subject, Images(lambda: given), mesh=mesh)
  passes = {
    "features": (lambda: batches, features),
    "scan": (lambda: batches, scan_all),
    "two views": (views.crops, compare),
  }
  times = {name: [] for name in passes}
  for name, (given, run) in list(passes.items()) * rounds:
    run(clocked(given(), times[name]))
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
