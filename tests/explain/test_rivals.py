"""The sparse autoencoder finds planted atoms; the tests know good units."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from docs import explain_rivals, sparse_autoencoder
from docs.explain_rivals import Outputs, Units
from imsvd_jax.explain.factors import make_factor
from imsvd_jax.explain.images import Drawing

NUM_ATOMS, NUM_UNITS, SIZE, K = 24, 32, 20, 3


@pytest.fixture(scope="module")
def planted():
  """(unit vectors, sums of K of them, which ones) of 2000 images."""
  rng = np.random.default_rng(0)
  atoms = rng.normal(size=(NUM_ATOMS, SIZE))
  atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
  chosen = np.argsort(rng.random((2000, NUM_ATOMS)), axis=1)[:, :K]
  amounts = np.zeros((2000, NUM_ATOMS))
  np.put_along_axis(amounts, chosen, rng.uniform(0.5, 1.5, chosen.shape), 1)
  features = 3 + 2 * amounts @ atoms  # Neither centered nor scaled.
  return atoms, features.astype(np.float32), amounts > 0


@pytest.fixture(scope="module")
def trained(planted):
  return sparse_autoencoder.train(planted[1], NUM_UNITS, K, steps=2000)


def test_planted_atoms_are_found(planted, trained):
  atoms, features, is_active = planted
  directions = np.asarray(sparse_autoencoder.atoms(trained))
  np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-5)
  cosines = atoms @ directions.T
  assert (cosines.max(axis=1) > 0.95).mean() >= 0.9
  found = np.asarray(sparse_autoencoder.activity(trained, features, K)) > 0
  assert found.sum(axis=1).max() == K
  unit_of = cosines.argmax(axis=1)
  assert (found[:, unit_of] == is_active).mean() > 0.97
  assert sparse_autoencoder.unexplained(trained, features, K) < 0.1


def test_gradients(planted, trained):
  """Along atoms there is none; idle units learn from what is left."""
  gradient = jax.jit(
    jax.grad(sparse_autoencoder.loss, has_aux=True), static_argnums=3
  )
  x = (planted[1][:64] - trained.center) * trained.scale
  is_first = jnp.arange(NUM_UNITS) == 0
  weights = trained._replace(threshold=trained.threshold.at[0].set(-3.0))
  found, is_active = gradient(weights, x, is_first & False, K)
  assert jnp.abs(found.decoder).max() > 1e-4
  along = (found.decoder * weights.decoder).sum(axis=1)
  np.testing.assert_allclose(along, 0, atol=1e-6)
  assert not is_active[0]
  assert (found.decoder[0] == 0).all()
  found, _ = gradient(weights, x, is_first, K)
  assert jnp.abs(found.decoder[0]).max() > 0


# --- The tests of units -------------------------------------------------------

N = 3000
NAMES = ("shape", "size")


def factors_of_images():
  rng = np.random.default_rng(3)
  columns = [rng.integers(0, 4, N), rng.uniform(size=N)]
  return np.stack(columns, axis=1).astype(np.float32)


def judged(codes_of, num_bins, num_nameable):
  """What the tests find of units, for an encoder that says the factors."""
  rows = factors_of_images()
  outputs = lambda factors: Outputs(factors, factors[:, :1].astype(int))
  factors = [
    make_factor("shape", rows[:, 0].astype(int)),
    make_factor("size", rows[:, 1]),
  ]
  return explain_rivals.judge(
    Units("planted", codes_of, num_bins, num_nameable),
    outputs(rows),
    factors,
    [],
    Drawing(outputs, rows, NAMES),
  )


def test_units_that_mean_something_pass():
  by_shape = lambda x: (x.features[:, :1] != np.arange(4)).astype(int)
  by_size = lambda x: (x.features[:, 1:] > 0.8).astype(int)
  found = judged(lambda x: np.hstack([by_shape(x), by_size(x)]), 2, 1)
  assert (found["variables"], found["used"], found["named"]) == (5, 5, 4)
  # "size up to 0.8" is true of too many images for a name.
  assert found["nmi"]["shape"] > 0.5
  assert 0.2 < found["nmi"]["size"] < 0.5
  assert found["flips"]["size"]["variable"] == 4
  assert found["flips"]["size"]["ratio"] > 100
  assert found["flips"]["shape"]["ratio"] == pytest.approx(4 / 3, rel=0.1)


def test_a_busy_unit_is_no_more_selective_than_with_another_image():
  """It flips most, whatever changes: the last row says so."""

  def codes_of(x):
    noise = np.sin(1e4 * x.features.sum(axis=1, keepdims=True)) / 2 + 0.5
    return (noise > [0.5, 0.97, 0.98, 0.99, 1.0]).astype(int)

  found = judged(codes_of, 2, 1)
  assert found["variables"] == 5
  assert found["named"] == 0
  for name in ("shape", "size", explain_rivals.WHOLE_IMAGE):
    assert found["flips"][name]["variable"] == 0
    assert found["flips"][name]["ratio"] > 3


def test_quantiles_have_equal_shares_and_ignore_what_is_missing():
  values = np.random.default_rng(0).normal(size=(4000, 2))
  values[:3000, 1] = np.nan
  cut = explain_rivals.quantiles(values, 4)
  np.testing.assert_array_equal(np.bincount(cut(values)[:, 0]), [1000] * 4)
  np.testing.assert_array_equal(np.bincount(cut(values)[3000:, 1]), [250] * 4)
  nothing = explain_rivals.quantiles(np.full((5, 1), np.nan), 4)
  assert (nothing(np.ones((5, 1))) == 0).all()


def test_every_rival_has_as_many_bins_as_the_variables():
  rng = np.random.default_rng(0)
  own = Outputs(
    rng.normal(size=(512, 6)).astype(np.float32),
    rng.integers(0, 4, (512, 2)),
  )
  found = {u.title: u for u in explain_rivals.rivals(own, 4, seed=0, steps=2)}
  assert len(found) == 6  # Two sparse autoencoders: 2 and 1 units active.
  for units in found.values():
    codes = units.codes_of(own)
    assert len(codes) == 512
    assert 0 <= codes.min() <= codes.max() < units.num_bins
    # Outside of the training images, the same cuts.
    np.testing.assert_array_equal(
      units.codes_of(Outputs(own.features[:9], own.codes[:9])), codes[:9]
    )
