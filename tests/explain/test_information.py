import numpy as np
import pytest
from sklearn import metrics

from imsvd_jax.explain import information
from imsvd_jax.explain.analysis import Pairs


def joint_of(q):
  """[N, M, b] -> [D, D] float64."""
  flat = q.reshape(len(q), -1).astype(np.float64)
  return flat.T @ flat / len(q)


def one_hot(codes, num_bins):
  return np.eye(num_bins)[codes]


def test_entropy_of_zero_and_uniform():
  p = np.array([[0.25] * 4, [1, 0, 0, 0]])
  np.testing.assert_allclose(information.entropy(p), [np.log(4), 0])


def test_mutual_information_against_the_definition():
  rng = np.random.default_rng(0)
  q = rng.dirichlet(np.full(3, 0.3), (50, 2))
  joint = joint_of(q)
  p = q.mean(0)
  block = joint[:3, 3:]
  expected = np.sum(block * np.log(block / np.outer(p[0], p[1])))
  found = information.mutual_information(joint, 3)
  assert found[0, 1] == pytest.approx(expected, rel=1e-12)
  np.testing.assert_allclose(found, found.T, rtol=1e-12)


def test_mutual_information_of_copies_and_of_independent_variables():
  codes = np.array([[i // 4, i % 4, i // 4] for i in range(16)])
  found = information.mutual_information(joint_of(one_hot(codes, 4)), 4)
  np.testing.assert_allclose(found[0, 2], np.log(4), rtol=1e-12)
  np.testing.assert_allclose(found[0, 1], 0, atol=1e-12)


def test_floor_of_one_hot_codes_is_miller_and_madow():
  codes = np.stack([np.arange(60) % 5, np.arange(60) % 3], 1)
  floor = information.mutual_information_floor(
    joint_of(one_hot(codes, 5)), 5, 60
  )
  assert floor[0, 1] == pytest.approx((5 - 1) * (3 - 1) / 120)
  assert floor[0, 0] == pytest.approx((5 - 1) ** 2 / 120)


@pytest.mark.parametrize("concentration", [1e-3, 0.3, 3.0])
def test_floor_predicts_independent_variables(concentration):
  # Soft codes vary less, so they show less by chance: one-hot ones (1e-3)
  # and soft ones must both be met.
  rng = np.random.default_rng(1)
  q = rng.dirichlet(np.full(6, concentration), (400, 24))
  joint = joint_of(q)
  rows, columns = np.triu_indices(24, 1)
  found = information.mutual_information(joint, 6)[rows, columns]
  floor = information.mutual_information_floor(joint, 6, 400)[rows, columns]
  assert found.mean() == pytest.approx(floor.mean(), rel=0.06)


def test_redundant_pairs_rank_by_excess():
  value = np.array([[9, 0.5, 0.4], [0.5, 9, 0.1], [0.4, 0.1, 9]])
  floor = np.array([[0, 0.3, 0], [0.3, 0, 0], [0, 0, 0]])
  pairs = Pairs(np.zeros((3, 3)), value, floor)
  assert pairs.most_redundant(2) == [(0, 2), (0, 1)]
  assert pairs.excess()[0, 1] == pytest.approx(0.2)


def test_nmi_against_scikit_learn():
  rng = np.random.default_rng(2)
  a = rng.integers(0, 5, 300)
  b = (a + (rng.random(300) < 0.4) * rng.integers(0, 5, 300)) % 7
  counts = information.contingency(a, b, 5, 7)
  expected = metrics.normalized_mutual_info_score(a, b)
  found = information.normalized_mutual_information(counts)
  assert found == pytest.approx(expected, rel=1e-10)
  np.testing.assert_array_equal(
    counts, metrics.cluster.contingency_matrix(a, b)
  )


def test_nmi_of_constants_and_of_nothing():
  assert information.normalized_mutual_information(np.array([[7, 0]])) == 0
  assert information.normalized_mutual_information(np.zeros((2, 2), int)) == 0


def test_chance_of_nmi():
  rng = np.random.default_rng(3)
  tables = [
    information.contingency(*rng.integers(0, 6, (2, 500)), 6, 6)
    for _ in range(60)
  ]
  found = np.mean(
    [information.normalized_mutual_information(t) for t in tables]
  )
  chance = information.chance_normalized_mutual_information(tables[0])
  assert found == pytest.approx(chance, rel=0.1)
