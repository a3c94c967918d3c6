"""MVEB: the Stein score, groups, devices and memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.objectives import OBJECTIVES, mveb_loss
from imsvd_jax.objectives.mveb import grouped_score, mveb_views, stein_score
from imsvd_jax.objectives.numerics import unit_rows
from tests.objectives import idioms
from tests.objectives import numpy_objectives as reference


def random_rows(seed, n=16, dimensions=8, mean=0.0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(mean + rng.normal(size=(n, dimensions)), jnp.float32)


score = jax.jit(stein_score)


@pytest.mark.parametrize(
  ("mean", "tolerance"), [(0.0, 1e-4), (1.0, 1e-4), (4.0, 1e-2)]
)
def test_stein_score_equals_its_definition(mean, tolerance):
  """At mean 4 tau is at its least, and rounding sets the ridge, not eta."""
  z = unit_rows(random_rows(0, mean=mean))
  expected = reference.stein_score(np.float64(z))
  np.testing.assert_allclose(
    score(z), expected, atol=tolerance * np.max(np.abs(expected))
  )


def test_score_is_finite_however_close_the_embeddings_are():
  """With eta alone the factorization fails on nine in ten of these."""
  spreads = np.logspace(-4, -0.5, 32)[:, None, None]
  noise = np.random.default_rng(0).normal(size=(32, 64, 2))
  z = jnp.asarray(1 + spreads * noise, jnp.float32)
  scores = jax.jit(jax.vmap(lambda z: stein_score(unit_rows(z))))(z)
  assert jnp.all(jnp.isfinite(scores))


def test_float64_score_is_exact():
  with jax.enable_x64(True):
    z = reference.unit(np.random.default_rng(0).normal(1.0, 1.0, (16, 8)))
    np.testing.assert_allclose(
      score(jnp.asarray(z)), reference.stein_score(z), rtol=1e-9
    )


@jax.jit
def surrogate_gradients(zs, targets):
  """Gradients of the surrogate, and of the loss w.r.t. the targets."""

  def terms(zs, targets):
    loss, terms = mveb_loss(*zs, *targets, group_size=16)
    return terms["entropy_surrogate"], loss

  ascent = jax.grad(lambda zs: terms(zs, targets)[0])(zs)
  return ascent, jax.grad(lambda targets: terms(zs, targets)[1])(targets)


def test_surrogate_gradient_is_the_score_by_hand():
  """d/dz of the surrogate is -s / N, through the projection on the sphere."""
  zs = [random_rows(0), random_rows(1)]
  (gradient, _), _ = surrogate_gradients(zs, zs)
  z = np.float64(zs[0])
  norms = np.linalg.norm(z, axis=1, keepdims=True)
  u = z / norms
  # Averaged over two views and 16 images.
  by_hand = -reference.stein_score(u) / 16 / 2
  tangent = by_hand - u * np.sum(u * by_hand, axis=1, keepdims=True)
  np.testing.assert_allclose(
    gradient, tangent / norms, atol=1e-4 * np.max(np.abs(tangent / norms))
  )


def test_ascending_the_surrogate_spreads_the_embeddings():
  z = random_rows(0, mean=1.0)
  (ascent, _), _ = surrogate_gradients([z, z], [z, z])
  length = lambda z: np.linalg.norm(np.mean(reference.unit(z), axis=0))
  z, ascent = np.float64(z), np.float64(ascent)
  assert length(z + 5 * ascent) < 0.95 * length(z)


def test_targets_have_no_gradient():
  zs = [random_rows(i) for i in range(4)]
  _, gradients = surrogate_gradients(zs[:2], zs[2:])
  assert all(jnp.all(g == 0) for g in gradients)


def test_local_crops_align_with_both_targets():
  z, t1, t2 = (unit_rows(random_rows(i)) for i in range(3))
  zs = [z, z, z]
  _, terms = jax.jit(partial(mveb_views, group_size=16))(zs, targets=[t1, t2])
  c1, c2 = (np.mean(np.sum(z * t, axis=1)) for t in (t1, t2))
  expected = (c2 + c1 + (c1 + c2) / 2) / 3
  np.testing.assert_allclose(terms["alignment"], expected, rtol=1e-5)


def test_groups_are_consecutive_images_of_the_global_batch():
  z = unit_rows(random_rows(0))
  scores = jax.jit(partial(grouped_score, group_size=4))(z)
  expected = reference.mveb_scores([np.float64(z)], group_size=4)[0]
  np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("n", "group_size"), [(16, 2), (16, 8), (24, 4)])
def test_groups_do_not_depend_on_the_devices(n, group_size):
  """Whole groups per device, one group over devices, and groups askew."""
  forward = idioms.make_step(OBJECTIVES["mveb"].loss, group_size=group_size)
  rows = [random_rows(seed, n) for seed in range(4)]
  args = (jnp.eye(8), rows[:2], rows[2:], jax.random.key(0))
  expected = jax.jit(idioms.one_device(forward))(*args)
  close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, idioms.pmapped(forward)(*args), expected)


@pytest.mark.parametrize("group_size", [128, 512])
def test_nothing_of_n_n_d_is_built(group_size):
  n, dimensions = 512, 128
  rows = jax.ShapeDtypeStruct((n, dimensions), jnp.float32)
  loss = partial(mveb_loss, group_size=group_size)
  step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  memory = step.lower(rows, rows, rows, rows).compile().memory_analysis()
  square = n * n * 4  # Bytes of one [N, N].
  assert memory.temp_size_in_bytes < 8 * square < n * n * dimensions


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(group_size=5), "group_size is 5 and the batch is 16"),
    (dict(group_size=1), "group_size of 2 or more"),
    (dict(), "group_size is 128 and the batch is 16"),
    (dict(group_size=16, targets=None), "needs the target"),
    (dict(group_size=16, targets=[random_rows(2)]), "found 1"),
    (dict(group_size=16, num_global=1), "aligns global views"),
    (dict(group_size=16, targets=[random_rows(2, 8)] * 2), "same shape"),
  ],
)
def test_wrong_arguments_raise(change, message):
  zs = [random_rows(0), random_rows(1)]
  with pytest.raises(ValueError, match=message):
    mveb_views(zs, **(dict(targets=zs) | change))


def test_no_batched_factorization_that_could_hang_a_cpu():
  # Eight groups in each of two views: batched over the groups, this step
  # blocked every thread of a two-core machine for ever.
  z1, z2, t1, t2 = (random_rows(s, 64) for s in range(4))
  loss = jax.jit(partial(mveb_loss, group_size=8))
  text = loss.lower(z1, z2, t1, t2).compile().as_text()
  factors = [x for x in text.splitlines() if "potrf" in x and "call" in x]
  assert factors
  assert not any(re.search(r"f32\[\d+,\d+,\d+\]", x) for x in factors)
