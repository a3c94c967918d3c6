"""Barlow Twins, VICReg and SimCLR at points computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard

from imsvd_jax.objectives import barlow_twins_loss, simclr_loss, vicreg_loss

# Eight images, seven features: mean 0, variance 1, no correlation.
IDEAL = jnp.asarray(hadamard(8)[:, 1:], jnp.float32)
SAME = jnp.ones((8, 7)) * jnp.arange(1.0, 8.0)


def test_barlow_twins_is_zero_on_a_decorrelated_invariant_code():
  loss, terms = barlow_twins_loss(IDEAL, IDEAL)
  np.testing.assert_allclose(loss, 0.0, atol=1e-8)
  assert set(terms) == {"invariance", "redundancy"}


def test_barlow_twins_by_hand():
  # Opposite views: C = -I. Seven times (1 + 1)^2.
  _, terms = barlow_twins_loss(IDEAL, -IDEAL)
  np.testing.assert_allclose(terms["invariance"], 7 * 4.0, rtol=1e-4)
  # All features equal: C_ij = 1 everywhere, 42 off-diagonal entries.
  equal = jnp.tile(IDEAL[:, :1], (1, 7))
  loss, terms = barlow_twins_loss(equal, equal)
  np.testing.assert_allclose(terms["redundancy"], 42.0, rtol=1e-4)
  np.testing.assert_allclose(loss, 42 * 0.0051, rtol=1e-4)
  # Constant features correlate with nothing: C = 0.
  _, terms = barlow_twins_loss(SAME, SAME)
  np.testing.assert_allclose(terms["invariance"], 7.0, rtol=1e-6)


def test_barlow_twins_ignores_scale_and_offset():
  rng = np.random.default_rng(0)
  z1, z2 = (jnp.asarray(rng.normal(size=(8, 7)), jnp.float32) for _ in "12")
  np.testing.assert_allclose(
    barlow_twins_loss(30 * z1 + 5, z2)[0], barlow_twins_loss(z1, z2)[0], 1e-4
  )


def test_vicreg_by_hand():
  # Unbiased variance 8/7 > 1: no hinge; the only term left is 0.
  loss, terms = vicreg_loss(IDEAL, IDEAL)
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)
  assert set(terms) == {"invariance", "variance", "covariance"}
  # Collapsed: standard deviation 0, hinge 1 - sqrt(1e-4) in each view.
  loss, terms = vicreg_loss(SAME, SAME)
  np.testing.assert_allclose(terms["variance"], 0.99, rtol=1e-5)
  np.testing.assert_allclose(loss, 25 * 0.99, rtol=1e-5)
  # A shift by 2 in one view: mean squared error 4, weight 25.
  loss, terms = vicreg_loss(IDEAL, IDEAL + 2)
  np.testing.assert_allclose(terms["invariance"], 4.0, rtol=1e-6)
  np.testing.assert_allclose(loss, 100.0, rtol=1e-5)
  # All features equal: 42 covariances of 8/7, over D = 7, in both views.
  equal = jnp.tile(IDEAL[:, :1], (1, 7))
  _, terms = vicreg_loss(equal, equal)
  np.testing.assert_allclose(
    terms["covariance"], 2 * 6 * (8 / 7) ** 2, rtol=1e-5
  )


def test_simclr_by_hand():
  # All 2N embeddings equal: 1 of 2N - 1 candidates is right.
  loss, _ = simclr_loss(SAME, SAME)
  np.testing.assert_allclose(loss, np.log(15), rtol=1e-6)
  # Orthogonal images, equal views, tau = 1/2: e^2 against 14 others of e^0.
  eye = jnp.eye(8)
  loss, terms = simclr_loss(eye, 3 * eye, temperature=0.5)
  np.testing.assert_allclose(loss, np.log(np.exp(2) + 14) - 2, rtol=1e-6)
  np.testing.assert_allclose(terms["alignment"], -2.0, rtol=1e-6)
  np.testing.assert_allclose(
    terms["uniformity"], np.log(np.exp(2) + 14), rtol=1e-6
  )


def test_wrong_arguments_raise():
  with pytest.raises(ValueError, match="batch of 1"):
    vicreg_loss(IDEAL[:1], IDEAL[:1])
  with pytest.raises(ValueError, match="temperature"):
    simclr_loss(IDEAL, IDEAL, temperature=0.0)
