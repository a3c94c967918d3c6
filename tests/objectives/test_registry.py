"""One suite over every registry entry."""

import inspect
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax import objectives
from imsvd_jax.objectives import OBJECTIVES
from tests.objectives import idioms
from tests.objectives import numpy_objectives as reference

N, D, NUM_GLOBAL, NUM_VIEWS = 16, 12, 2, 3
KEY_SEED = 7


class Case(NamedTuple):
  hyperparameters: dict[str, Any]
  # (zs, originals) -> (loss, terms); what the loss holds constant, it takes
  # from the originals.
  reference: Any
  # Makes embeddings on which the noise of a stochastic loss does not count.
  quiet: Any = staticmethod(lambda z: z)


def standard_noise():
  key = jax.random.key(KEY_SEED)
  draw = lambda view, row: jax.random.normal(
    jax.random.fold_in(jax.random.fold_in(key, view), row), (D // 2,)
  )
  rows = jax.vmap(draw, in_axes=(None, 0))
  return [np.float64(rows(v, jnp.arange(N))) for v in range(NUM_VIEWS)]


def mveb_reference(zs, originals):
  group_size = CASES["mveb"].hyperparameters["group_size"]
  return reference.mveb(
    zs,
    data().targets,
    num_global=NUM_GLOBAL,
    group_size=group_size,
    scores=reference.mveb_scores(originals, group_size),
  )


def superinfo_reference(zs, originals):
  del originals
  hyperparameters = CASES["superinfo"].hyperparameters
  return reference.superinfo(
    zs,
    num_global=NUM_GLOBAL,
    noise=data().noise,
    temperature=hyperparameters["temperature"],
    minimum_scale=hyperparameters["minimum_scale"],
    weights=(
      hyperparameters["superfluous_weight_1"],
      hyperparameters["superfluous_weight_2"],
    ),
  )


def plain_reference(function, **hyperparameters):
  return lambda zs, originals: function(
    zs, num_global=NUM_GLOBAL, **hyperparameters
  )


CASES = {
  "imsvd": Case(
    dict(
      num_bins=4,
      temperature=0.7,
      diagonal_weight=0.5,
      off_diagonal_weight=2.0,
      invariance_weight=1.5,
    ),
    plain_reference(
      reference.imsvd, num_bins=4, temperature=0.7, weights=(0.5, 2.0, 1.5)
    ),
  ),
  "music": Case(
    dict(num_bins=4),
    plain_reference(reference.imsvd, num_bins=4, weights=(1.0, 1.0, 0.0)),
  ),
  "mveb": Case(dict(group_size=N), mveb_reference),
  "superinfo": Case(
    dict(
      temperature=0.3,
      superfluous_weight_1=0.02,
      superfluous_weight_2=0.05,
      minimum_scale=1e-5,
    ),
    superinfo_reference,
    quiet=lambda z: z.at[:, D // 2 :].set(-50.0),
  ),
  "barlow_twins": Case({}, plain_reference(reference.barlow_twins)),
  "vicreg": Case({}, plain_reference(reference.vicreg)),
  "simclr": Case(
    dict(temperature=0.2), plain_reference(reference.simclr, temperature=0.2)
  ),
}
every_objective = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def test_every_entry_is_covered():
  assert set(CASES) == set(OBJECTIVES)


class Data(NamedTuple):
  zs: list[np.ndarray]  # float64, exact in float32
  targets: list[np.ndarray]
  noise: list[np.ndarray]


@cache
def data():
  rng = np.random.default_rng(0)
  common = rng.normal(size=(N, D))
  draw = lambda: np.float64(np.float32(common + rng.normal(size=(N, D))))
  return Data(
    [draw() for _ in range(NUM_VIEWS)],
    [draw() for _ in range(NUM_GLOBAL)],
    standard_noise(),
  )


def arguments(zs=None, dtype=jnp.float32):
  """The registry call's zs, targets and key."""
  zs = data().zs if zs is None else zs
  to_dtype = lambda arrays: [jnp.asarray(a, dtype) for a in arrays]
  return to_dtype(zs), to_dtype(data().targets), jax.random.key(KEY_SEED)


def value_and_gradients(name):
  """Returns f(zs, targets, key) -> ((loss, terms), dloss/dzs)."""
  loss = partial(
    OBJECTIVES[name].loss,
    num_global=NUM_GLOBAL,
    **CASES[name].hyperparameters,
  )
  function = lambda zs, targets, key: loss(zs, targets=targets, key=key)
  return jax.value_and_grad(function, has_aux=True)


@cache
def jitted(name):
  return jax.jit(value_and_gradients(name))


def assert_close(actual, expected, rtol=2e-5, atol=None):
  """Compares two trees, to rtol of each leaf's largest entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    scale = np.max(np.abs(np.float64(e)))
    limit = rtol * scale + 1e-6 if atol is None else atol
    np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=0, atol=limit)


def finite(tree):
  return all(
    bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree)
  )


@every_objective
def test_value_and_terms_equal_the_reference(name):
  value, _ = jitted(name)(*arguments())
  assert_close(value, CASES[name].reference(data().zs, data().zs))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(value))
  assert all(x.shape == () for x in jax.tree.leaves(value))


@every_objective
def test_gradients_equal_finite_differences_of_the_reference(name):
  _, gradients = jitted(name)(*arguments())
  step = 1e-5
  zs = [z.copy() for z in data().zs]
  for view, z in enumerate(zs):
    expected = np.zeros_like(z)
    for entry in np.ndindex(z.shape):
      center, sides = z[entry], []
      for moved in (center + step, center - step):
        z[entry] = moved
        sides.append(CASES[name].reference(zs, data().zs)[0])
      z[entry] = center
      expected[entry] = (sides[0] - sides[1]) / (2 * step)
    assert_close(gradients[view], expected, rtol=1e-4)


@every_objective
def test_jit_equals_eager(name):
  zs, targets, key = arguments()
  assert_close(
    value_and_gradients(name)(zs, targets, key),
    jitted(name)(zs, targets, key),
  )


@every_objective
def test_one_device_equals_eight(name):
  forward = idioms.make_step(
    OBJECTIVES[name].loss,
    num_global=NUM_GLOBAL,
    **CASES[name].hyperparameters,
  )
  rng = np.random.default_rng(1)
  w = jnp.asarray(np.eye(D) + 0.1 * rng.normal(size=(D, D)), jnp.float32)
  xs, targets, key = arguments()
  args = (w, xs[:2], targets, key)
  (loss, terms), gradient = jax.jit(idioms.one_device(forward))(*args)
  for idiom, result in {
    **idioms.sharded(forward)(*args),
    "pmap": idioms.pmapped(forward)(*args),
  }.items():
    (loss8, terms8), gradient8 = result
    try:
      assert_close(((loss8, terms8), gradient8), ((loss, terms), gradient))
    except AssertionError as error:
      raise AssertionError(idiom) from error


@every_objective
def test_bfloat16_input_computes_in_float32(name):
  rounded, targets, key = arguments(dtype=jnp.bfloat16)
  to_float32 = lambda arrays: [a.astype(jnp.float32) for a in arrays]
  value, gradients = jitted(name)(rounded, targets, key)
  expected_value, expected_gradients = jitted(name)(
    to_float32(rounded), to_float32(targets), key
  )
  assert finite((value, gradients))
  # The same arithmetic: only the input and the gradient are rounded.
  assert_close(value, expected_value)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(value))
  assert all(g.dtype == jnp.bfloat16 for g in gradients)
  assert_close(gradients, expected_gradients, rtol=1e-2)


def extreme_embeddings():
  rng = np.random.default_rng(2)
  signs = [rng.choice([-1e4, 1e4], size=(N, D)) for _ in range(NUM_VIEWS)]
  row = rng.normal(size=D)
  almost = [row + 1e-4 * rng.normal(size=(N, D)) for _ in range(NUM_VIEWS)]
  return {
    "signs": signs,
    "opposite": [signs[0], -signs[0], -signs[0]],
    "constant 1e4": [np.full((N, D), 1e4)] * NUM_VIEWS,
    "constant -1e4": [np.full((N, D), -1e4)] * NUM_VIEWS,
    "one bin": [1e4 * np.eye(1, D).repeat(N, axis=0)] * NUM_VIEWS,
    "zeros": [np.zeros((N, D))] * NUM_VIEWS,
    "almost equal": almost,
    "equal rows": [np.tile(row, (N, 1))] * NUM_VIEWS,
  }


@every_objective
@pytest.mark.parametrize("kind", extreme_embeddings())
def test_extreme_embeddings_have_finite_loss_and_gradients(name, kind):
  zs = extreme_embeddings()[kind]
  value, gradients = jitted(name)(*arguments(zs))
  assert finite(value)
  assert finite(gradients)


@every_objective
def test_permuting_the_images_changes_nothing(name):
  order = np.random.default_rng(3).permutation(N)
  zs, targets, key = arguments()
  zs = [CASES[name].quiet(z) for z in zs]
  permute = lambda arrays: [a[order] for a in arrays]
  value, gradients = jitted(name)(zs, targets, key)
  permuted, permuted_gradients = jitted(name)(
    permute(zs), permute(targets), key
  )
  assert_close(permuted, value, rtol=1e-4)
  assert_close(permuted_gradients, permute(gradients), rtol=1e-4)


@every_objective
def test_two_views_are_the_public_function(name):
  zs, targets, key = arguments()
  function = getattr(objectives, f"{name}_loss")
  hyperparameters = CASES[name].hyperparameters
  if OBJECTIVES[name].uses_target:
    function = partial(function, target1=targets[0], target2=targets[1])
  if "key" in inspect.signature(function).parameters:
    function = partial(function, key=key)

  @jax.jit
  def both(zs):
    by_name = OBJECTIVES[name].loss(
      zs, targets=targets, key=key, **hyperparameters
    )
    return by_name, function(*zs, **hyperparameters)

  by_name, public = both(zs[:2])
  assert_close(public, by_name)


@every_objective
@pytest.mark.parametrize(
  ("shapes", "message"),
  [
    ([(N, D, 1), (N, D, 1)], "expected embeddings"),
    ([(N,), (N,)], "expected embeddings"),
    ([(N, D), (N // 2, D)], "same shape"),
    ([(N, D), (N, D + D)], "same shape"),
    ([(N, D)], "expected two views"),
  ],
)
def test_wrong_shapes_raise(name, shapes, message):
  zs = [jnp.zeros(shape) for shape in shapes]
  targets = [jnp.zeros((N, D))] * NUM_GLOBAL
  with pytest.raises(ValueError, match=message):
    OBJECTIVES[name].loss(
      zs,
      num_global=min(2, len(zs)),
      targets=targets,
      key=jax.random.key(0),
      **CASES[name].hyperparameters,
    )


@every_objective
def test_integer_embeddings_raise(name):
  zs = [jnp.zeros((N, D), jnp.int32)] * 2
  with pytest.raises(ValueError, match="int32"):
    OBJECTIVES[name].loss(
      zs, targets=zs, key=jax.random.key(0), **CASES[name].hyperparameters
    )
