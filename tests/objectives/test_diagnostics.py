"""Diagnostics: closed forms, devices, the floor, and two runs that collapse."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.objectives import OBJECTIVES, diagnostics, off_diagonal_floor
from imsvd_jax.training import verdict
from tests.objectives import idioms

M, B = 3, 4
NAMES = (
  *("embedding_std", "marginal_entropy_mean", "marginal_entropy_min"),
  *("information", "max_probability", "argmax_agreement", "dead_bins"),
)
CODE = np.array(list(itertools.product(range(B), repeat=M)))  # [64, M]


def logits(code):
  return 100.0 * jax.nn.one_hot(jnp.asarray(code), B).reshape(len(code), -1)


def figures(z1, z2=None):
  zs = [z1, z1 if z2 is None else z2]
  return {k: float(v) for k, v in diagnostics(zs, num_bins=B).items()}


# One variable constant, one that uses two of four bins.
PARTLY = CODE * [0, 1, 1] // [1, 2, 1]


@pytest.mark.parametrize(
  ("z", "expected"),  # In the order of NAMES; None is not checked.
  [
    (logits(CODE), (None, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0)),
    (logits(0 * CODE), (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.75)),
    (jnp.ones((64, M * B)), (0.0, 1.0, 1.0, 0.0, 0.25, None, 0.0)),
    (logits(PARTLY), (None, 0.5, 0.0, 0.5, None, None, (3 + 2) / 12)),
  ],
  ids=["ideal", "one bin", "uniform", "partly"],
)
def test_closed_forms(z, expected):
  found = figures(z)
  for name, value in zip(NAMES, expected, strict=True):
    if value is not None:
      np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)


def test_agreement_counts_equal_arg_max():
  other = CODE.copy()
  other[:16, 0] = (other[:16, 0] + 1) % B  # 16 of 64 images, 1 of 3 variables.
  found = figures(logits(CODE), logits(other))
  np.testing.assert_allclose(found["argmax_agreement"], 1 - 16 / 64 / 3)


def test_embedding_std_of_isotropic_embeddings_is_one():
  z = jnp.asarray(np.random.default_rng(0).normal(size=(4096, 32)), jnp.float32)
  for scale in (1.0, 1000.0):
    found = diagnostics([scale * z, z])
    np.testing.assert_allclose(found["embedding_std"], 1.0, atol=0.01)
  assert set(found) == {"embedding_std"}


def test_figures_do_not_depend_on_the_devices():
  rng = np.random.default_rng(0)
  zs = [jnp.asarray(rng.normal(size=(16, M * B)), jnp.float32) for _ in "12"]
  split = jax.shard_map(
    partial(diagnostics, num_bins=B, axis_name=idioms.AXIS),
    mesh=idioms.mesh(),
    in_specs=idioms.P(idioms.AXIS),
    out_specs=idioms.P(),
  )
  on_eight = jax.jit(split)(zs)
  on_one = jax.jit(partial(diagnostics, num_bins=B))(zs)
  for name, value in on_one.items():
    np.testing.assert_allclose(on_eight[name], value, rtol=1e-5, err_msg=name)


def test_figures_have_no_gradient_and_build_no_square():
  z = jnp.ones((8, 4096))
  step = jax.jit(lambda z: diagnostics([z, z], num_bins=B))
  memory = step.lower(z).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4096 * 4096
  z = jnp.asarray(np.random.default_rng(0).normal(size=(8, M * B)), jnp.float32)
  gradient = jax.grad(
    lambda z: diagnostics([z, z], num_bins=B)["max_probability"]
  )(z)
  assert jnp.all(gradient == 0)


@pytest.mark.parametrize(
  ("batch_size", "gap"), [(2048, 1.34), (1024, 1.95), (512, 2.58), (256, 3.25)]
)
def test_floor_equals_simulated_gaps_at_80_bins(batch_size, gap):
  floor = off_diagonal_floor(80, batch_size)
  np.testing.assert_allclose(2 * np.log(80) + floor, gap, atol=0.02)


def test_floor_is_miller_madow_for_many_images_and_zero_for_one():
  gap = 2 * np.log(4) + off_diagonal_floor(4, 20_000)
  np.testing.assert_allclose(gap, (16 - 1) / (2 * 20_000), rtol=0.01)
  assert off_diagonal_floor(4, 1) == 0
  # Two images share a cell with probability 1/16, else their entropy is log 2.
  np.testing.assert_allclose(
    off_diagonal_floor(4, 2), -(15 / 16) * np.log(2), rtol=1e-9
  )


def test_one_view_raises():
  with pytest.raises(ValueError, match="two views"):
    diagnostics([jnp.ones((4, 8))])


def kind(found):
  """What the verdict on a run calls the collapse in these figures, if any."""
  judged = verdict.judge([{"step": verdict.MIN_STEPS, "loss": 0.0, **found}])
  return judged.kind


def test_the_verdict_says_which_collapse():
  assert kind(figures(logits(CODE))) == ""
  # All images in one bin of each variable: the embeddings are equal, too.
  assert kind(figures(logits(0 * CODE))) == "constant"
  assert kind(figures(logits(0 * CODE)) | {"embedding_std": 1.0}) == "dead bins"
  rng = np.random.default_rng(0)
  noise = jnp.asarray(1e-3 * rng.normal(size=(64, M * B)), jnp.float32)
  uniform = figures(noise)
  assert uniform["embedding_std"] > 0.5  # Directions still differ.
  assert kind(uniform) == kind(figures(1.0 + noise)) == "constant"
  assert kind({"embedding_std": 0.01}) == "constant"
  assert kind({"embedding_std": 0.8}) == ""


def train(name, steps=100, **hyperparameters):
  """Trains a small network for `steps` on noisy copies; returns figures."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  images, noise = draw(128, 16), 0.3 * draw(2, 128, 16)
  weights = {"hidden": draw(16, 64) / 4, "out": draw(64, 32) / 16}
  discrete = {"num_bins": 8} if OBJECTIVES[name].discrete else {}

  def embed(weights, x):
    h = x @ weights["hidden"]
    h = (h - jnp.mean(h, axis=0)) / jnp.std(h, axis=0)
    return jax.nn.relu(h) @ weights["out"]

  def loss(weights):
    zs = [embed(weights, images + noise[view]) for view in range(2)]
    value, _ = OBJECTIVES[name].loss(zs, **discrete, **hyperparameters)
    return value, diagnostics(zs, **discrete)

  def step(weights, _):
    gradient, found = jax.grad(loss, has_aux=True)(weights)
    return jax.tree.map(lambda w, g: w - 2.0 * g, weights, gradient), found

  _, found = jax.jit(lambda weights: jax.lax.scan(step, weights, length=steps))(
    weights
  )
  return [{k: float(v[i]) for k, v in found.items()} for i in (0, steps - 1)]


def test_a_collapsing_run_is_named_within_a_hundred_steps():
  first, last = train("imsvd")
  assert kind(first) == kind(last) == ""
  first, last = train("imsvd", diagonal_weight=0.0, off_diagonal_weight=0.0)
  assert kind(first) == ""
  assert kind(last) == "dead bins"
