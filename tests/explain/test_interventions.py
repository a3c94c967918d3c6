"""Changing one factor flips the variables that follow it, and no other."""

import numpy as np
import pytest

from imsvd_jax.explain import interventions

NAMES = ("shape", "color", "color")  # A color has two columns.


def draw(factors):
  return factors  # The picture tells all.


def codes_of(images):
  """v0 follows the shape, v1 red, v2 nothing, v3 the shape one time in two."""
  shape = images[:, 0].astype(int)
  red = (images[:, 1] > 0.5).astype(int)
  sometimes = np.where(images[:, 2] > 0.5, shape, 0)
  return np.stack([shape, red, np.zeros_like(red), sometimes], 1)


def found():
  rng = np.random.default_rng(1)
  factors = np.stack(
    [rng.integers(0, 4, 2000), rng.uniform(size=2000), rng.uniform(size=2000)],
    1,
  ).astype(np.float32)
  return interventions.intervene(codes_of, draw, factors, NAMES)


def test_a_variable_flips_with_its_factor_only():
  result = found()
  assert result.factors == ("shape", "color")
  assert result.images[0] == pytest.approx(1500, abs=80)  # The others stay.
  np.testing.assert_allclose(result.flips[0], [1, 0, 0, 0.5], atol=0.05)
  np.testing.assert_allclose(result.flips[1], [0, 0.5, 0, 0.375], atol=0.05)


def test_selectivity_and_its_interval():
  shape, color = found().selectivity
  assert (shape.variable, color.variable) == (0, 1)
  assert shape.low < shape.ratio < shape.high
  assert shape.ratio == pytest.approx(6, rel=0.1)  # 1 over (0 + 0 + 0.5) / 3.
  assert color.ratio == pytest.approx(4, rel=0.2)


def test_the_table_has_wilson_intervals():
  text = found().table().splitlines()
  assert text[0] == "factor,variable,images,flips,low,high"
  assert len(text) == 1 + 2 * 4
  low, high = interventions.wilson(0.5, 100)
  assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-3)
  assert interventions.wilson(0.0, 50)[0] == 0


def test_nothing_to_change_and_nothing_to_compare_with():
  same = np.ones((20, 3), np.float32)
  assert interventions.intervene(codes_of, draw, same, NAMES) is None
  one = lambda images: codes_of(images)[:, :1]
  rows = np.arange(60, dtype=np.float32).reshape(20, 3)
  result = interventions.intervene(one, draw, rows, NAMES)
  assert result.flips.shape == (2, 1)
  assert result.selectivity == ()
  assert result.lines("title") == []
