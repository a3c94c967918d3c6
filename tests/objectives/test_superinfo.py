"""SuperInfo: the KL, the sampling, and InfoNCE at lambda = 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.objectives import OBJECTIVES, superinfo_loss
from imsvd_jax.objectives.superinfo import (
  Gaussian,
  kl_divergence,
  standard_noise,
)
from tests.objectives import idioms
from tests.objectives import numpy_objectives as reference

N, D = 8, 5


def head_outputs():
  zs = np.random.default_rng(0).normal(size=(2, N, 2 * D))
  return list(jnp.asarray(zs, jnp.float32))


def test_kl_equals_a_monte_carlo_estimate():
  rng = np.random.default_rng(0)
  mean_p, mean_q = rng.normal(size=(2, N, D))
  scale_p, scale_q = rng.uniform(0.5, 1.5, size=(2, N, D))
  z = mean_p + scale_p * rng.normal(size=(100_000, N, D))
  log_density = lambda mean, scale: (
    -(((z - mean) / scale) ** 2) / 2 - np.log(scale)
  ).sum(-1)
  ratio = log_density(mean_p, scale_p) - log_density(mean_q, scale_q)
  error = ratio.std(0) / np.sqrt(len(z))

  to_float32 = lambda *xs: Gaussian(*(jnp.asarray(x, jnp.float32) for x in xs))
  closed_form = kl_divergence(
    to_float32(mean_p, scale_p), to_float32(mean_q, scale_q)
  )
  assert np.all(np.abs(closed_form - ratio.mean(0)) < 5 * error)
  assert np.all(error < 0.02 * closed_form)


def test_kl_is_zero_only_for_equal_gaussians():
  p = Gaussian(jnp.zeros((1, D)), jnp.ones((1, D)))
  q = Gaussian(jnp.zeros((1, D)), 2 * jnp.ones((1, D)))
  assert kl_divergence(p, p) == 0
  assert kl_divergence(p, q) > 0
  assert kl_divergence(q, p) > kl_divergence(p, q)  # Not symmetric.


def test_without_superfluous_terms_it_is_info_nce_of_the_samples():
  key = jax.random.key(3)
  zs = head_outputs()
  off = {"superfluous_weight_1": 0.0, "superfluous_weight_2": 0.0}
  loss, terms = superinfo_loss(*zs, key=key, temperature=0.4, **off)
  noise = standard_noise(key, 2, zs[0][:, :D])
  samples = [
    z[:, :D] + (np.log1p(np.exp(z[:, D:])) + 1e-3) * e
    for z, e in zip(np.float64(zs), np.float64(noise), strict=True)
  ]
  np.testing.assert_allclose(loss, reference.info_nce(*samples, 0.4), rtol=1e-5)
  assert terms["superfluous_1"] > 0


def test_equal_views_have_nothing_superfluous():
  z = head_outputs()[0]
  _, terms = superinfo_loss(z, z, key=jax.random.key(0))
  np.testing.assert_allclose(terms["superfluous_1"], 0.0, atol=1e-6)
  np.testing.assert_allclose(terms["superfluous_2"], 0.0, atol=1e-6)


def test_exchanging_views_exchanges_the_superfluous_terms():
  z1, z2 = head_outputs()
  _, terms = superinfo_loss(z1, z2, key=jax.random.key(0))
  _, exchanged = superinfo_loss(z2, z1, key=jax.random.key(0))
  for a, b in (("1", "2"), ("2", "1")):
    np.testing.assert_allclose(
      exchanged[f"superfluous_{a}"], terms[f"superfluous_{b}"], rtol=1e-5
    )


def test_noise_is_standard_normal_and_differs_everywhere():
  noise = standard_noise(jax.random.key(0), 2, jnp.zeros((512, 16)))
  assert noise.shape == (2, 512, 16)
  assert abs(jnp.mean(noise)) < 0.03
  assert abs(jnp.std(noise) - 1) < 0.03
  assert len(np.unique(noise)) > 0.99 * noise.size
  other_key = standard_noise(jax.random.key(1), 2, jnp.zeros((512, 16)))
  assert not np.any(noise[:, 0] == other_key[:, 0])


def test_noise_is_the_same_on_eight_devices():
  P, axis = idioms.P, idioms.AXIS
  key, like = jax.random.key(0), jnp.zeros((16, D))
  split = jax.shard_map(
    lambda key, like: standard_noise(key, 2, like, axis),
    mesh=idioms.mesh(),
    in_specs=(P(), P(axis)),
    out_specs=P(None, axis),
  )
  on_eight = jax.jit(split)(key, like)
  np.testing.assert_array_equal(on_eight, standard_noise(key, 2, like))


def test_a_legacy_key_works_too():
  z1, z2 = head_outputs()
  typed, _ = superinfo_loss(z1, z2, key=jax.random.key(0))
  legacy, _ = superinfo_loss(z1, z2, key=jax.random.PRNGKey(0))
  assert typed == legacy


@pytest.mark.parametrize(
  ("shape", "change", "message"),
  [
    ((N, 2 * D), dict(key=None), "pass a key"),
    ((N, 2 * D + 1), dict(), "even number"),
    ((N, 2 * D), dict(temperature=0.0), "temperature"),
    ((N, 2 * D), dict(minimum_scale=0.0), "minimum_scale"),
  ],
)
def test_wrong_arguments_raise(shape, change, message):
  zs = [jnp.zeros(shape)] * 2
  with pytest.raises(ValueError, match=message):
    OBJECTIVES["superinfo"].loss(zs, **(dict(key=jax.random.key(0)) | change))
