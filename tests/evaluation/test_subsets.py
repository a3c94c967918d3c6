"""Parts of a training set: balanced, nested, fixed."""

import numpy as np
import pytest

from imsvd_jax.base import hashing
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import subsets

LABELS = np.repeat(np.arange(10), 130)
FIXED_ORDER = [4, 6, 0, 3, 1, 7, 5, 2]
FIXED_SUBSET = [28, 48, 118, 191, 193, 249]


def test_every_class_gives_the_same_number():
  taken = subsets.subset(LABELS, 0.01, seed=0)
  np.testing.assert_array_equal(np.bincount(LABELS[taken]), np.full(10, 1))
  taken = subsets.subset(LABELS, 0.1, seed=0)
  np.testing.assert_array_equal(np.bincount(LABELS[taken]), np.full(10, 13))
  assert (np.diff(taken) > 0).all()


def test_parts_are_nested_and_follow_the_seed():
  small, large = (subsets.subset(LABELS, f, seed=3) for f in (0.02, 0.1))
  assert set(small) < set(large)
  other = subsets.subset(LABELS, 0.1, seed=4)
  assert len(set(large) & set(other)) < 40
  np.testing.assert_array_equal(
    subsets.subset(LABELS, 1.0, seed=0), np.arange(1300)
  )


def test_the_list_is_fixed_for_ever():
  # Published numbers depend on these: a change here is a mistake.
  assert hashing.hash_order(8, seed=0).tolist() == FIXED_ORDER
  assert subsets.subset(LABELS[:260], 0.02, seed=1).tolist() == FIXED_SUBSET


def test_order_is_uniform():
  places = np.stack([hashing.hash_order(6, seed=s) for s in range(3000)])
  counts = np.stack([np.bincount(column, minlength=6) for column in places.T])
  assert np.abs(counts - 500).max() < 5 * np.sqrt(500)


def test_unlabelled_images_and_rare_classes():
  labels = np.array([-1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, -1])
  taken = subsets.subset(labels, 0.8, seed=0)  # mean class size 5: 4 of each
  np.testing.assert_array_equal(np.bincount(labels[taken]), [4, 2])


def test_split_keeps_and_gives_in_every_class():
  labels = np.array([0] * 10 + [1] * 2 + [2])
  stay, away = subsets.split_classes(labels, 0.2, seed=0)
  np.testing.assert_array_equal(np.sort([*stay, *away]), np.arange(13))
  np.testing.assert_array_equal(np.bincount(labels[away]), [2, 1])
  np.testing.assert_array_equal(np.bincount(labels[stay]), [8, 1, 1])


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: subsets.subset(LABELS, 0, seed=0), "part of 0 of the labels"),
    (lambda: subsets.subset(LABELS, 10, seed=0), "at most 1"),
    (lambda: subsets.subset(-np.ones(5, int), 0.1, seed=0), "no labels"),
    (lambda: subsets.split_classes(np.arange(5), 0.5, seed=0), "one image"),
  ],
)
def test_a_mistake_is_one_clear_line(call, message):
  with pytest.raises(UserError, match=message):
    call()
