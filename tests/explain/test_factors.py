import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import factors


def test_continuous_factor_is_cut_by_quantiles():
  values = np.append(np.arange(100.0), np.nan)
  factor = factors.make_factor("size", values)
  assert factor.values[-1] == -1
  np.testing.assert_array_equal(np.bincount(factor.values[:-1]), [10] * 10)
  assert len(factor.names) == 10


def test_continuous_factor_keeps_equal_values_together():
  values = np.array([0.0] * 60 + [1.0] * 40)
  factor = factors.make_factor("switch", values)
  assert len(set(factor.values[:60])) == 1
  assert len(set(factor.values[60:])) == 1
  assert factor.values[0] != factor.values[-1]
  assert factor.values.max() < len(factor.names)


def test_categories_of_integers_and_strings():
  factor = factors.make_factor("label", np.array([1, -1, 0]), ["a", "b"])
  assert factor.names == ("a", "b")
  np.testing.assert_array_equal(factor.values, [1, -1, 0])
  factor = factors.make_factor("word", np.array(["pear", "fig", "pear"]))
  assert factor.names == ("fig", "pear")
  np.testing.assert_array_equal(factor.values, [1, 0, 1])


def test_the_label_comes_first_and_values_follow_the_indices():
  indices, labels = np.array([2, 5]), np.array([1, 0])
  values = {"size": [0, 1, 2, 3, 4, 9], "word": {2: "a", 5: "b"}}
  label, size, word = factors.known_factors(
    indices, labels, values, ("ant", "bee")
  )
  assert label.names == ("ant", "bee")
  np.testing.assert_array_equal(size.values, [2, 9])
  assert [word.names[k] for k in word.values] == ["a", "b"]
  unlabeled = factors.known_factors(indices, labels * 0 - 1, {}, None)
  assert unlabeled == ()
  with pytest.raises(UserError, match="'size' has 3 values"):
    factors.known_factors(indices, labels, {"size": [1, 2, 3]}, None)
