"""One suite over every registry entry."""

import inspect
from functools import cache, partial
from typing import NamedTuple

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


HYPERPARAMETERS = {
  "imsvd": {
    "num_bins": 4,
    "temperature": 0.7,
    "diagonal_weight": 0.5,
    "off_diagonal_weight": 2.0,
    "invariance_weight": 1.5,
  },
  "music": {"num_bins": 4},
  "mveb": {"group_size": N},
  "superinfo": {
    "temperature": 0.3,
    "superfluous_weight_1": 0.02,
    "superfluous_weight_2": 0.05,
    "minimum_scale": 1e-5,
  },
  "barlow_twins": {},
  "vicreg": {},
  "simclr": {"temperature": 0.2},
}
every_objective = pytest.mark.parametrize("name", sorted(OBJECTIVES))


def test_every_entry_is_covered():
  assert set(HYPERPARAMETERS) == set(OBJECTIVES)


def standard_noise():
  key = jax.random.key(KEY_SEED)
  draw = lambda view, row: jax.random.normal(
    jax.random.fold_in(jax.random.fold_in(key, view), row), (D // 2,)
  )
  rows = jax.vmap(draw, in_axes=(None, 0))
  return [np.float64(rows(v, jnp.arange(N))) for v in range(NUM_VIEWS)]


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


def expected(name, zs):
  """The reference of data(), of which one value of `zs` may be changed."""
  constant = {}
  if name == "superinfo":
    constant = {"noise": data().noise}
  if name == "mveb":
    scores = reference.mveb_scores(data().zs, N)
    constant = {"targets": data().targets, "scores": scores}
  arguments = HYPERPARAMETERS[name] | constant
  return getattr(reference, name)(zs, num_global=NUM_GLOBAL, **arguments)


def arguments(zs=None, dtype=jnp.float32):
  """The registry call's zs, targets and key."""
  zs = data().zs if zs is None else zs
  to_dtype = lambda arrays: [jnp.asarray(a, dtype) for a in arrays]
  return to_dtype(zs), to_dtype(data().targets), jax.random.key(KEY_SEED)


def value_and_gradients(name):
  """Returns f(zs, targets, key) -> ((loss, terms), dloss/dzs)."""
  loss = partial(
    OBJECTIVES[name].loss, num_global=NUM_GLOBAL, **HYPERPARAMETERS[name]
  )
  function = lambda zs, targets, key: loss(zs, targets=targets, key=key)
  return jax.value_and_grad(function, has_aux=True)


@cache
def jitted(name):
  return jax.jit(value_and_gradients(name))


def assert_close(actual, expected, rtol=2e-5):
  """Compares two trees, to rtol of each leaf's largest entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    scale = np.max(np.abs(np.float64(e)))
    limit = rtol * scale + 1e-6
    np.testing.assert_allclose(np.float64(a), np.float64(e), rtol=0, atol=limit)


def finite(tree):
  return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@every_objective
def test_value_and_terms_equal_the_reference(name):
  value, _ = jitted(name)(*arguments())
  assert_close(value, expected(name, data().zs))
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(value))
  assert all(x.shape == () for x in jax.tree.leaves(value))


@every_objective
def test_gradients_equal_finite_differences_of_the_reference(name):
  _, gradients = jitted(name)(*arguments())
  step = 1e-5
  zs = [z.copy() for z in data().zs]
  for view, z in enumerate(zs):
    slopes = np.zeros_like(z)
    for entry in np.ndindex(z.shape):
      center, sides = z[entry], []
      for moved in (center + step, center - step):
        z[entry] = moved
        sides.append(expected(name, zs)[0])
      z[entry] = center
      slopes[entry] = (sides[0] - sides[1]) / (2 * step)
    assert_close(gradients[view], slopes, rtol=1e-4)


@every_objective
def test_jit_equals_eager(name):
  eager = value_and_gradients(name)(*arguments())
  assert_close(eager, jitted(name)(*arguments()))


@every_objective
def test_one_device_equals_eight(name):
  forward = idioms.make_step(
    OBJECTIVES[name].loss, num_global=NUM_GLOBAL, **HYPERPARAMETERS[name]
  )
  rng = np.random.default_rng(1)
  w = jnp.asarray(np.eye(D) + 0.1 * rng.normal(size=(D, D)), jnp.float32)
  xs, targets, key = arguments()
  args = (w, xs[:2], targets, key)
  alone = jax.jit(idioms.one_device(forward))(*args)
  results = idioms.sharded(forward)(*args)
  results["pmap"] = idioms.pmapped(forward)(*args)
  for idiom, result in results.items():
    try:
      assert_close(result, alone)
    except AssertionError as error:
      raise AssertionError(idiom) from error


@every_objective
def test_bfloat16_input_computes_in_float32(name):
  rounded, targets, key = arguments(dtype=jnp.bfloat16)
  wide = [[a.astype(jnp.float32) for a in x] for x in (rounded, targets)]
  value, gradients = jitted(name)(rounded, targets, key)
  expected_value, expected_gradients = jitted(name)(*wide, key)
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
  assert finite(jitted(name)(*arguments(zs)))


@every_objective
def test_permuting_the_images_changes_nothing(name):
  order = np.random.default_rng(3).permutation(N)
  zs, targets, key = arguments()
  if name == "superinfo":  # Scales at which the images' noise does not count.
    zs = [z.at[:, D // 2 :].set(-50.0) for z in zs]
  permute = lambda arrays: [a[order] for a in arrays]
  value, gradients = jitted(name)(zs, targets, key)
  permuted = jitted(name)(permute(zs), permute(targets), key)
  assert_close(permuted, (value, permute(gradients)), rtol=1e-4)


@every_objective
def test_two_views_are_the_public_function(name):
  zs, targets, key = arguments()
  function = getattr(objectives, f"{name}_loss")
  hyperparameters = HYPERPARAMETERS[name]
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
      **HYPERPARAMETERS[name],
    )


@every_objective
def test_integer_embeddings_raise(name):
  zs = [jnp.zeros((N, D), jnp.int32)] * 2
  with pytest.raises(ValueError, match="int32"):
    OBJECTIVES[name].loss(
      zs, targets=zs, key=jax.random.key(0), **HYPERPARAMETERS[name]
    )
