"""IMSVD and MUSIC: closed forms, Theorem 1, symmetries, V views."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.objectives import OBJECTIVES, imsvd_loss, music_loss
from imsvd_jax.objectives.joint_entropy import joint_entropy_terms
from imsvd_jax.objectives.soft_variables import soft_discretize

M, B = 3, 4
LOG_B = np.log(B)
SHARP = 100.0  # A logit that makes q one-hot in float32.


# Every combination of bins once: N = b^M images.
CODE = np.array(list(itertools.product(range(B), repeat=M)))

imsvd = jax.jit(partial(imsvd_loss, num_bins=B))
music = jax.jit(partial(music_loss, num_bins=B))


@jax.jit
def imsvd_gradient(z1, z2):
  gradient = jax.grad(imsvd_loss, argnums=(0, 1), has_aux=True)
  return gradient(z1, z2, num_bins=B)[0]


def one_hot_logits(code, scale=SHARP):
  """Logits [N, M*b] of an integer code [N, M]."""
  return scale * jax.nn.one_hot(jnp.asarray(code), B).reshape(len(code), -1)


def random_views(n=B**M):
  rng = np.random.default_rng(0)
  return [jnp.asarray(rng.normal(size=(n, M * B)), jnp.float32) for _ in "12"]


@pytest.mark.parametrize(
  ("z", "diagonal", "off_diagonal", "invariance"),
  [
    (jnp.zeros((B**M, M * B)), -2 * LOG_B / B, -2 * LOG_B, LOG_B),
    (one_hot_logits(CODE), -LOG_B, -2 * LOG_B, 0.0),
    (one_hot_logits(np.zeros((B**M, M), int)), 0.0, 0.0, 0.0),
  ],
  ids=["uniform", "ideal", "collapsed"],
)
def test_closed_forms(z, diagonal, off_diagonal, invariance):
  loss, terms = imsvd(z, z)
  expected = dict(
    diagonal=diagonal, off_diagonal=off_diagonal, invariance=invariance
  )
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, atol=2e-5, err_msg=name)
  np.testing.assert_allclose(loss, sum(expected.values()), atol=5e-5)


def test_theorem_1_the_full_factorial_code_is_a_minimum():
  ideal = one_hot_logits(CODE)
  minimum, _ = imsvd(ideal, ideal)
  np.testing.assert_allclose(minimum, -3 * LOG_B, rtol=1e-5)
  gradients = imsvd_gradient(ideal, ideal)
  assert all(jnp.max(jnp.abs(g)) < 1e-6 for g in gradients)
  rng = np.random.default_rng(0)
  for scale in (60.0, 200.0):
    moved = [
      ideal + jnp.asarray(scale * rng.normal(size=ideal.shape), jnp.float32)
      for _ in "12"
    ]
    assert imsvd(*moved)[0] > minimum + 0.01


@pytest.mark.parametrize("loss", [imsvd, music], ids=["imsvd", "music"])
def test_optimum_is_invariant_non_trivial_and_diverse(loss):
  """The claims of both papers: each failure costs at least 0.1 nats."""
  ideal = one_hot_logits(CODE)
  minimum, _ = loss(ideal, ideal)
  np.testing.assert_allclose(minimum, -3 * LOG_B, rtol=1e-5)

  rolled = one_hot_logits(np.roll(CODE, 1, axis=0))
  soft = one_hot_logits(CODE, scale=1.0)
  redundant = one_hot_logits(np.repeat(CODE[:, :1], M, axis=1))
  half_used = one_hot_logits(CODE // 2)
  collapsed = one_hot_logits(0 * CODE)
  failures = dict(
    variant=(ideal, rolled),
    soft=(soft, soft),
    redundant=(redundant, redundant),
    half_used=(half_used, half_used),
    collapsed=(collapsed, collapsed),
  )
  for name, views in failures.items():
    assert loss(*views)[0] > minimum + 0.1, name


def test_views_may_be_exchanged():
  z1, z2 = random_views()
  loss, terms = imsvd(z1, z2)
  exchanged, exchanged_terms = imsvd(z2, z1)
  np.testing.assert_allclose(exchanged, loss, rtol=1e-6)
  for name, value in terms.items():
    np.testing.assert_allclose(exchanged_terms[name], value, rtol=1e-6)


def test_variables_and_bins_may_be_permuted():
  rng = np.random.default_rng(1)
  # Bins in an order of each variable's own, then variables.
  bins = np.stack([m * B + rng.permutation(B) for m in range(M)])
  order = bins[[2, 0, 1]].ravel()
  z1, z2 = random_views()
  np.testing.assert_allclose(
    imsvd(z1[:, order], z2[:, order])[0], imsvd(z1, z2)[0], rtol=1e-6
  )
  # Not if only one view is permuted: the test above can fail.
  assert abs(imsvd(z1[:, order], z1)[0] - imsvd(z1, z1)[0]) > 1e-3


def test_adding_to_all_bins_of_a_variable_changes_nothing():
  z1, z2 = random_views()
  shift = jnp.repeat(jnp.asarray([5.0, -3.0, 100.0]), B)
  np.testing.assert_allclose(
    imsvd(z1 + shift, z2)[0], imsvd(z1, z2)[0], rtol=1e-5
  )


def test_invariance_is_exact_and_its_gradient_bounded_at_extreme_logits():
  n = B**M
  first = one_hot_logits(np.zeros((n, M), int), scale=1e4)
  second = one_hot_logits(np.ones((n, M), int), scale=1e4)
  # log (q1.q2) = log (2 e^-1e4 + 2 e^-2e4 ...): a clamp would say 18.4 or 36.8.
  _, terms = imsvd(first, second)
  np.testing.assert_allclose(terms["invariance"], 1e4 - np.log(2), rtol=1e-6)
  for gradient in imsvd_gradient(first, second):
    assert jnp.all(jnp.isfinite(gradient))
    assert jnp.max(jnp.abs(gradient)) <= 1 / (n * M)
    assert jnp.max(jnp.abs(gradient)) > 0.4 / (n * M)


def test_music_is_imsvd_without_invariance():
  z1, z2 = random_views()
  loss, terms = music(z1, z2)
  _, expected = imsvd(z1, z2)
  for name, value in expected.items():
    np.testing.assert_allclose(terms[name], value, rtol=1e-6)
  np.testing.assert_allclose(
    loss, expected["diagonal"] + expected["off_diagonal"], rtol=1e-6
  )


def test_one_variable_has_no_off_diagonal_term():
  q = soft_discretize(random_views()[0], num_bins=M * B)
  diagonal, off_diagonal = joint_entropy_terms(q, q)
  assert off_diagonal == 0
  assert diagonal < 0


@pytest.mark.parametrize(
  ("num_views", "num_global", "pairs"),
  [
    (2, 2, [(0, 1)]),
    (2, 1, [(0, 1)]),
    (3, 1, [(0, 1), (0, 2)]),
    (4, 2, [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]),
    (3, 3, [(0, 1), (0, 2), (1, 2)]),
  ],
)
def test_more_views_are_the_mean_over_pairs_with_a_global_view(
  num_views, num_global, pairs
):
  zs = [z for _ in range(2) for z in random_views()]
  zs = [z * (1 + 0.2 * i) for i, z in enumerate(zs)][:num_views]
  v_views = jax.jit(
    partial(OBJECTIVES["imsvd"].loss, num_global=num_global, num_bins=B)
  )
  loss, terms = v_views(zs)
  results = [imsvd(zs[a], zs[b]) for a, b in pairs]
  np.testing.assert_allclose(loss, np.mean([r[0] for r in results]), rtol=1e-5)
  for name, value in terms.items():
    expected = np.mean([r[1][name] for r in results])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("num_global", [0, 3])
def test_wrong_number_of_global_views_raises(num_global):
  with pytest.raises(ValueError, match=f"{num_global} global of 2 views"):
    OBJECTIVES["imsvd"].loss(random_views(), num_global=num_global, num_bins=B)
