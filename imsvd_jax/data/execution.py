"""How TensorFlow runs: on the host, in order, one thread for each core."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import tensorflow as tf

# The accelerators are JAX's; TensorFlow would reserve their memory. It raises
# if the caller has already used them, and then the choice is the caller's.
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], "GPU")
  tf.config.set_visible_devices([], "TPU")


def pipeline_options() -> tf.data.Options:
  """Returns the options of every pipeline."""
  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = True
  options.threading.private_threadpool_size = num_threads()
  # Images are the unit of parallelism; threads within one only add overhead.
  options.threading.max_intra_op_parallelism = 1
  return options


def read_all(dataset: tf.data.Dataset, count: int) -> np.ndarray:
  """Returns the elements of a dataset of `count` elements, stacked."""
  return next(dataset.batch(count).as_numpy_iterator())


def num_threads() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
