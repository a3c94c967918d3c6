"""Duplicates and outliers as the explorer shows them."""

import numpy as np
import pytest

from imsvd_jax.explain import duplicates, embedding_map, rarity
from imsvd_jax.explain.analysis import Code
from imsvd_jax.explain.explorer import findings


def test_groups_are_stars_around_their_first_image():
  # 0 - 1 - 2 is a chain: 2 is like 1 only. 5 and 6 repeat 4.
  pairs = [(1, 0), (1, 2), (4, 5), (6, 4), (5, 4), (3, 3)]
  assert duplicates.first_of(pairs) == {1: 0, 5: 4, 6: 4}


def test_planted_duplicates_are_the_groups():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(60, 20)).astype(np.float32)
  for copy, original in ((7, 3), (9, 3), (50, 20)):
    noise = rng.normal(size=20) * 0.01
    features[copy] = 2 * features[original] + noise  # The cosine sees no size.
  slots = np.arange(60) * 10
  near = embedding_map.nearest_neighbors(features, 12)
  found = findings.duplicate_groups(slots, features, *near)
  assert found["compared"] == 60
  assert [members for members, _ in found["groups"]] == [
    [30, 70, 90],
    [200, 500],
  ]
  for _, cosines in found["groups"]:
    assert cosines[0] == pytest.approx(1)
    assert min(cosines) >= found["threshold"] == duplicates.THRESHOLD


def code_of(codes, num_bins):
  m = codes.shape[1]
  return Code(
    codes=codes,
    marginal=np.full((m, num_bins), 1 / num_bins),
    usage=np.zeros((m, num_bins), int),
    conditional_entropy=np.zeros(m),
    confidence=np.ones(m),
    top_scores=np.zeros((m, num_bins, 1)),
    top_indices=np.zeros((m, num_bins, 1), int),
  )


def test_outliers_are_the_rarest_codes_of_the_shown_images():
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 3, (400, 4)).astype(np.uint8)
  codes[:, 1] = codes[:, 0]
  rows = np.arange(100, 400)
  codes[250, 1] = (codes[250, 0] + 1) % 3  # Slot 150: never together else.
  found = findings.outliers(code_of(codes, 3), rows)
  surprise = rarity.pair_surprise(codes[rows], 3)
  assert found["by"] == "pairs"
  assert found["slots"][0] == 150
  assert len(found["slots"]) == findings.NUM_OUTLIERS
  np.testing.assert_allclose(
    found["nats"], np.sort(surprise)[::-1][: len(found["nats"])], atol=0.006
  )
  assert found["median"] == pytest.approx(np.median(surprise), abs=0.006)


def test_one_variable_has_no_pairs():
  codes = np.array([[0]] * 9 + [[1]], np.uint8)
  found = findings.outliers(code_of(codes, 2), np.arange(10))
  assert found["by"] == "marginals"
  assert found["slots"][0] == 9
