"""Two processes count every image once and train the head of one process."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest

from imsvd_jax.evaluation import features, linear, protocols
from tests.evaluation.pair import ROOT, run_pair

SCRIPT = pathlib.Path(__file__).with_name("two_processes.py")
IMAGES = np.random.default_rng(0).integers(0, 255, (37, 5)).astype(np.uint8)
LABELS = np.arange(37) % 3


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
  directory = tmp_path_factory.mktemp("two_processes")
  command = lambda port, i: [
    *(sys.executable, str(SCRIPT), str(i), str(port), str(directory))
  ]
  run_pair(command, {"PATH": "", "PYTHONPATH": str(ROOT)})
  return [np.load(directory / f"process{i}.npz") for i in range(2)]


def test_every_image_once_on_both(outputs):
  for found in outputs:
    np.testing.assert_array_equal(found["features"], 2.0 * IMAGES)
    np.testing.assert_array_equal(found["labels"], LABELS)


def test_the_head_is_that_of_one_process(outputs):
  embed = lambda images: images.astype(np.float32) / 255.0

  def train_epoch(epoch):
    order = np.random.default_rng(epoch).permutation(36)
    for start in range(0, 36, 12):
      rows = order[start : start + 12]
      yield {"image": IMAGES[rows], "label": LABELS[rows]}

  protocol = dataclasses.replace(
    protocols.PROTOCOLS["linear/imsvd"], epochs=2, learning_rate=0.5
  )
  test = features.Features(embed(IMAGES), LABELS)
  alone = linear.train_linear(embed, train_epoch, test, protocol, num_classes=3)
  for found in outputs:
    np.testing.assert_allclose(found["kernel"], alone.heads.kernel, atol=1e-6)


def test_the_failure_of_one_process_is_that_of_both(outputs):
  assert [str(found["failure"]) for found in outputs] == [
    "Process 1: MemoryError: no room",
    "MemoryError: no room",
  ]
