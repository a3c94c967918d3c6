"""-log p of codes, against the definition, and on planted foreign images."""

import numpy as np
from sklearn.metrics import roc_auc_score

from imsvd_jax.explain import rarity
from tests.run_command import one_line_error


def drawn(count, seed):
  """Codes of four variables of five bins, the second a copy of the first."""
  rng = np.random.default_rng(seed)
  codes = rng.choice(5, (count, 4), p=[0.4, 0.3, 0.2, 0.08, 0.02])
  codes[:, 1] = codes[:, 0]
  return codes.astype(np.uint8)


def test_surprise_is_its_definition():
  codes, b = drawn(300, 0), 5
  count, m = codes.shape
  expected = np.zeros((2, count))
  for n, code in enumerate(codes):
    for i in range(m):
      p_i = ((codes[:, i] == code[i]).sum() + 0.5) / (count + 2.5)
      expected[0, n] -= np.log(p_i)
      for j in set(range(m)) - {i}:
        both = ((codes[:, i] == code[i]) & (codes[:, j] == code[j])).sum()
        p_j = ((codes[:, j] == code[j]).sum() + 0.5) / (count + 2.5)
        p_both = (both + 0.5 / b) / (count + 2.5)
        expected[1, n] -= np.log(p_both / p_j) / (m - 1)
  np.testing.assert_allclose(
    rarity.marginal_surprise(codes, b), expected[0], rtol=1e-5
  )
  np.testing.assert_allclose(
    rarity.pair_surprise(codes, b), expected[1], rtol=1e-4
  )


def test_pairs_find_what_marginals_cannot():
  usual, foreign = drawn(2000, 1), drawn(40, 2)
  foreign[:, 1] = (foreign[:, 0] + 1) % 2  # Common bins, never together.
  foreign[:, 0] %= 2
  codes = np.concatenate([usual, foreign])
  is_foreign = np.arange(len(codes)) >= 2000
  by_pairs = roc_auc_score(is_foreign, rarity.pair_surprise(codes, 5))
  by_marginals = roc_auc_score(is_foreign, rarity.marginal_surprise(codes, 5))
  assert by_pairs > 0.85 > by_marginals


def test_too_many_bins_are_one_line():
  with one_line_error("use --by=marginals"):
    rarity.pair_surprise(np.zeros((2, 100), np.uint16), 1000)
