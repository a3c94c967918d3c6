"""One of two processes: extracts features, caches them, trains a head.

Run by test_two_processes.py: python two_processes.py INDEX PORT OUTPUT_DIR
"""

import os
import sys

index, port, output = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import dataclasses  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from imsvd_jax.base import devices  # noqa: E402
from imsvd_jax.evaluation import (  # noqa: E402
  feature_cache,
  features,
  linear,
  protocols,
)

jax.distributed.initialize(
  f"127.0.0.1:{port}", 2, index, coordinator_bind_address=f"127.0.0.1:{port}"
)
mesh = devices.make_mesh()
double = jax.jit(lambda images: images.astype(np.float32) * 2.0)
IMAGES = np.random.default_rng(0).integers(0, 255, (37, 5)).astype(np.uint8)
LABELS = np.arange(37) % 3


def embed(images):
  """The rows of both processes as one array, as the trainer embeds."""
  return double(devices.shard_batch(images, mesh))


def eval_batches():
  """This process's share: 19 and 18 images, three batches of 8 each."""
  share = np.arange(37)[index * 19 : (index + 1) * 19]
  for start in range(0, 24, 8):
    rows = share[start : start + 8]
    padding = (0, 8 - len(rows))
    yield {
      "image": np.pad(IMAGES[rows], (padding, (0, 0))),
      "label": np.pad(LABELS[rows], padding, constant_values=-1),
      "index": np.pad(rows, padding, constant_values=-1),
      "mask": np.arange(8) < len(rows),
    }


calls = []


def extract():
  calls.append(1)
  return features.extract(embed, eval_batches())


found, again = (
  feature_cache.cached_features(
    Path(output) / "cache", {"weights": "x"}, extract
  )
  for _ in range(2)
)
np.testing.assert_array_equal(found.features, again.features)
assert len(calls) == 1


def local_double(images):
  return images * np.float32(2)


def breaking_batches():
  """The same; process 1 cannot read its second batch."""
  for number, batch in enumerate(eval_batches()):
    if (number, index) == (1, 1):
      raise MemoryError("no room")
    yield batch


# Both end, and can go on.
try:
  features.extract(local_double, breaking_batches())
  failure = ""
except Exception as error:
  failure = features.reason_of(error)
np.testing.assert_array_equal(
  features.extract(embed, eval_batches()).features, found.features
)


def train_epoch(epoch):
  """Global batches of 12 images, six from each process."""
  order = np.random.default_rng(epoch).permutation(36)
  for start in range(0, 36, 12):
    rows = order[start : start + 12][index * 6 : (index + 1) * 6]
    yield {"image": IMAGES[rows], "label": LABELS[rows]}


def local_embed(images):
  return images.astype(np.float32) / 255.0


protocol = dataclasses.replace(
  protocols.PROTOCOLS["linear/imsvd"], epochs=2, learning_rate=0.5
)
test = features.Features(local_embed(IMAGES), LABELS)
result = linear.train_linear(
  local_embed, train_epoch, test, protocol, num_classes=3
)
np.savez(
  Path(output) / f"process{index}.npz",
  features=found.features,
  labels=found.labels,
  kernel=result.heads.kernel,
  failure=failure,
)
