"""Stateless random numbers and shuffles."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf

from imsvd_jax.data import stateless


def permutation(size: int, epoch: int) -> np.ndarray:
  offsets = tf.range(size, dtype=tf.int64)
  keys = tf.fill([size], stateless.key(7, epoch))
  return stateless.permute(offsets, size, keys).numpy()


def test_fold_in_is_splitmix64():
  """The first outputs of the reference generator seeded with 0."""
  # Its n-th output hashes the seed plus n times the golden ratio; from key 0
  # fold_in(0, n - 1) hashes just that.
  zero = tf.constant(0, tf.uint64)
  outputs = [int(stateless.fold_in(zero, n)) for n in range(3)]
  known = "e220a8397b1dcdaf", "6e789e6aa1b965f4", "06c45d188009454f"
  assert [f"{word:016x}" for word in outputs] == list(known)


def test_uniform_is_uniform_and_uncorrelated():
  keys = stateless.fold_in(stateless.key(3), tf.range(4000, dtype=tf.int64))
  numbers = stateless.uniform(keys, 23).numpy()
  assert numbers.shape == (4000, 23)
  assert numbers.min() >= 0
  assert numbers.max() < 1
  np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.025)
  np.testing.assert_allclose(numbers.var(0), 1 / 12, atol=0.006)
  correlation = np.corrcoef(numbers.T) - np.eye(23)
  assert np.abs(correlation).max() < 0.08
  # Neighbouring keys, as neighbouring images have.
  assert abs(np.corrcoef(numbers[1:, 0], numbers[:-1, 0])[0, 1]) < 0.08


def test_keys_differ_by_every_part():
  parts = [(1, 2), (2, 1), (1, 3), (-1, 2), (2**40, 2), (1,), (1, 2, 0)]
  assert len({int(stateless.key(*p)) for p in parts}) == len(parts)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 40, 1437])
def test_permute_is_a_permutation_of_each_epoch(size):
  orders = [permutation(size, epoch) for epoch in range(3)]
  for order in orders:
    np.testing.assert_array_equal(np.sort(order), range(size))
  if size >= 10:
    assert (orders[0] != orders[1]).any()


def test_permute_has_no_runs():
  """With TensorFlow's default rounds, some epochs come out nearly in order."""
  size, epochs = 200, 100
  orders = np.stack([permutation(size, epoch) for epoch in range(epochs)])
  near = (np.abs(np.diff(orders)) <= 2).mean(1)
  assert near.max() < 0.07  # Expected 0.02; the default reaches 0.2.
  # Every image is equally often in every tenth of the epoch.
  positions = np.argsort(orders, axis=1) // (size // 10)
  counts = np.stack([(positions == part).sum(0) for part in range(10)])
  chi2 = ((counts - epochs / 10) ** 2 / (epochs / 10)).sum()
  assert abs(chi2 / (9 * size) - 1) < 0.12
  # Consecutive epochs have nothing to do with each other.
  ranks = np.argsort(orders, axis=1)
  correlation = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(ranks)]
  assert np.std(correlation) < 1.3 / np.sqrt(size)


def test_graph_equals_eager():
  offsets = tf.range(40, dtype=tf.int64)

  def numbers(step):
    keys = stateless.fold_in(stateless.key(1, 2), offsets + step)
    return stateless.uniform(keys, 3), stateless.permute(offsets, 40, keys)

  dataset = tf.data.Dataset.range(5, 6).map(numbers)
  graph = next(dataset.as_numpy_iterator())
  eager = numbers(tf.constant(5, tf.int64))
  for a, b in zip(graph, eager, strict=True):
    np.testing.assert_array_equal(a, b)
