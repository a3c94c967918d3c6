import numpy as np
import pytest
from sklearn.decomposition import PCA

from imsvd_jax.explain import embedding_map
from imsvd_jax.explain.analysis import Features


@pytest.fixture(scope="module")
def features():
  rng = np.random.default_rng(0)
  mixed = rng.normal(size=(300, 6)) * [5, 3, 1, 0.5, 0.2, 0.1]
  rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  return (mixed @ rotation + 10).astype(np.float32)


def test_principal_components_against_scikit_learn(features):
  covariance = np.cov(features.T.astype(np.float64), bias=True)
  mean = features.mean(0, dtype=np.float64)
  project = lambda rows: embedding_map.principal_components(
    Features(mean, np.arange(len(rows)), rows, covariance)
  )
  ours, explained = project(features)
  expected = PCA(2).fit(features.astype(np.float64))
  np.testing.assert_allclose(
    explained, expected.explained_variance_ratio_, rtol=1e-4
  )
  theirs = expected.transform(features)
  signs = np.sign((ours * theirs).sum(0))
  np.testing.assert_allclose(ours * signs, theirs, rtol=1e-3, atol=1e-3)
  components = project(mean + np.eye(6))[0].T
  peak = np.abs(components).argmax(1)
  assert (components[[0, 1], peak] > 0).all()


def test_t_sne_keeps_groups_together(monkeypatch):
  monkeypatch.setattr(embedding_map, "TSNE_IMAGES", 60)
  rng = np.random.default_rng(1)
  group = np.arange(90) % 3
  rows = rng.normal(size=(90, 5)) * 0.1 + 8 * np.eye(5)[group]
  of = lambda rows: Features(
    rows.mean(0), np.arange(90), rows, np.cov(rows.T, bias=True)
  )
  chosen, places = embedding_map.t_sne(of(rows.astype(np.float32)))
  assert len(chosen) == len(places) == 60
  assert (np.diff(chosen) > 0).all()
  apart = np.linalg.norm(places[:, None] - places, axis=2)
  np.fill_diagonal(apart, np.inf)
  assert (group[chosen][apart.argmin(1)] == group[chosen]).all()
  assert embedding_map.t_sne(of(np.ones((90, 5)))) is None  # All the same.


def test_spectrum_and_effective_rank():
  np.testing.assert_allclose(
    embedding_map.spectrum(np.diag([1.0, 3, 0])), [0.75, 0.25, 0], atol=1e-12
  )
  assert embedding_map.effective_rank(np.eye(7)) == pytest.approx(7)
  assert embedding_map.effective_rank(np.diag([4.0, 0, 0])) == pytest.approx(1)
  assert embedding_map.effective_rank(np.zeros((3, 3))) == 0


def test_neighbors_against_numpy_with_ties(features):
  features = np.concatenate([features, features])  # Equal cosines.
  rows, cosines = embedding_map.nearest_neighbors(features, 7)
  assert rows.shape == cosines.shape == (600, 7)
  unit = features / np.linalg.norm(features, axis=1, keepdims=True)
  for query in (3, 299, 310, 5, 599):
    row, cosine = rows[query], cosines[query]
    expected = unit @ unit[query]
    expected[query] = -np.inf
    assert query not in row
    np.testing.assert_allclose(cosine, np.sort(expected)[::-1][:7], rtol=1e-5)
    np.testing.assert_allclose(expected[row], cosine, rtol=1e-5)
  assert rows[3, 0] == 303  # The copy of row 3.


def test_fewer_rows_than_neighbors():
  rows, _ = embedding_map.nearest_neighbors(np.eye(3), 10)
  # Equal: the lower row first.
  np.testing.assert_array_equal(rows, [[1, 2], [0, 2], [0, 1]])


def test_neighbor_agreement():
  neighbors = np.array([[1, 2], [0, 2], [3, 0], [2, 1]])
  values = np.array([0, 0, 1, -1])
  share, chance = embedding_map.neighbor_agreement(neighbors, values)
  assert share == pytest.approx(2 / 5)  # 0-1, 0-2, 1-0, 1-2, 2-0 are known.
  assert chance == pytest.approx((2 / 3) ** 2 + (1 / 3) ** 2)
