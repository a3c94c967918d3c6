import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.objectives import entropy, joint_probability, soft_discretize
from tests.objectives import numpy_objectives as reference


def random_embeddings(seed=0):
  return np.random.default_rng(seed).normal(size=(6, 12))


@pytest.fixture
def two_views():
  """Soft variables of two views, float64."""
  return [reference.softmax(random_embeddings(seed), 4, 1.0) for seed in (0, 1)]


def test_soft_discretize_is_a_softmax_over_the_bins():
  z = random_embeddings()
  q = soft_discretize(jnp.asarray(z, jnp.float32), num_bins=4, temperature=0.5)
  assert q.shape == (6, 3, 4)
  assert q.dtype == jnp.float32
  np.testing.assert_allclose(q, reference.softmax(z, 4, 0.5), rtol=1e-5)


def test_bins_of_a_variable_are_neighbours_in_the_embedding():
  z = jnp.zeros((1, 6)).at[0, 4].set(50.0)
  q = soft_discretize(z, num_bins=3)
  np.testing.assert_allclose(q[0, 1], [0.0, 1.0, 0.0], atol=1e-6)
  np.testing.assert_allclose(q[0, 0], [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_becomes_float32(dtype):
  z = jnp.asarray(random_embeddings(), dtype)
  q = soft_discretize(z, num_bins=4)
  assert q.dtype == jnp.float32
  np.testing.assert_allclose(jnp.sum(q, axis=-1), 1.0, rtol=1e-6)
  assert entropy(z[:, :4] * 0, axis=1).dtype == jnp.float32


def test_float64_stays_float64():
  with jax.enable_x64(True):
    z = jnp.asarray(random_embeddings())
    q = soft_discretize(z, num_bins=4)
    assert q.dtype == jnp.float64
    np.testing.assert_allclose(q, reference.softmax(z, 4, 1.0), rtol=1e-13)
    assert joint_probability(q, q).dtype == jnp.float64
    assert entropy(q, axis=-1).dtype == jnp.float64


def test_joint_probability_equals_its_definition(two_views):
  q1, q2 = two_views
  p = joint_probability(*map(jnp.float32, two_views))
  assert p.shape == (3, 4, 3, 4)
  for m1, d1, m2, d2 in itertools.product(range(3), range(4), repeat=2):
    expected = np.mean(q1[:, m1, d1] * q2[:, m2, d2])
    np.testing.assert_allclose(p[m1, d1, m2, d2], expected, rtol=1e-5)


def test_joint_probability_has_the_marginals(two_views):
  q1, q2 = map(jnp.float32, two_views)
  p = joint_probability(q1, q2)
  np.testing.assert_allclose(jnp.sum(p, axis=(1, 3)), 1.0, rtol=1e-5)
  marginal = jnp.broadcast_to(jnp.mean(q1, axis=0)[..., None], (3, 4, 3))
  np.testing.assert_allclose(jnp.sum(p, axis=3), marginal, rtol=1e-5)


@pytest.mark.parametrize(
  ("p", "expected"),
  [
    ([0.25] * 4, np.log(4)),
    ([1.0, 0.0, 0.0, 0.0], 0.0),
    ([0.5, 0.5, 0.0, 0.0], np.log(2)),
  ],
)
def test_entropy_in_nats(p, expected):
  p = jnp.asarray(p)
  np.testing.assert_allclose(entropy(p, axis=0), expected, atol=1e-6)


def test_entropy_has_a_finite_slope_at_zero():
  tiny = np.finfo(np.float32).tiny
  p = jnp.asarray([1.0, 0.0, 1e-45, tiny / 2])
  slope = jax.grad(lambda p: entropy(p, axis=0))(p)
  np.testing.assert_allclose(slope[0], -1.0)
  np.testing.assert_allclose(slope[1:], -np.log(tiny), rtol=1e-6)
  assert jnp.isfinite(entropy(p, axis=0))


def test_entropy_over_several_axes():
  p = jnp.full((2, 3, 5, 3), 1 / 9)
  value = entropy(p, axis=(1, 3))
  np.testing.assert_allclose(value, np.full((2, 5), np.log(9)), rtol=1e-6)


@pytest.mark.parametrize(
  ("shape", "arguments", "message"),
  [
    ((4, 10), dict(num_bins=4), "10 entries does not divide"),
    ((4, 8), dict(num_bins=1), "at least 2"),
    ((4, 8), dict(num_bins=4, temperature=0.0), "temperature"),
    ((8,), dict(num_bins=4), r"shape \(8,\)"),
    ((0, 8), dict(num_bins=4), r"shape \(0, 8\)"),
  ],
)
def test_wrong_arguments_raise(shape, arguments, message):
  with pytest.raises(ValueError, match=message):
    soft_discretize(jnp.zeros(shape), **arguments)


def test_joint_probability_of_different_shapes_raises():
  for shapes in (((4, 2, 3), (4, 3, 2)), ((4, 6), (4, 6))):
    with pytest.raises(ValueError, match="expected both"):
      joint_probability(*map(jnp.ones, shapes))
