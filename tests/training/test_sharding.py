"""A state that is split over the devices trains, saves and restores alike."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import digits
from imsvd_jax.base import devices
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import optim, sharding
from imsvd_jax.training import step as step_lib

NUM_EXAMPLES = 64
SPLIT = ("optimizer", "all")


def make_experiment(mode, **overrides):
  config = digits.get_config("debug")
  config.update_from_flattened_dict(
    {
      "model.projector": (64, 64),
      "optimizer.base_learning_rate": 0.1,
      "optimizer.eps": 1e-2,  # Adam divides by gradients; zeros are rounded.
      "sharding.state": mode,
      **overrides,
    }
  )
  return experiment_lib.build(config, NUM_EXAMPLES)


def start(experiment, count=8):
  """Returns a jitted step, its first state and a batch."""
  mesh = devices.make_mesh(jax.devices()[:count])
  replicated = devices.replicated(mesh)
  batch = experiment_lib.random_batch(experiment.config)
  return (
    step_lib.jit_train_step(experiment, replicated),
    step_lib.initial_state(experiment, replicated),
    devices.shard_batch(batch, mesh),
  )


@functools.cache
def trained(mode, optimizer, objective):
  """Returns host copies of the state after three steps, and its metrics."""
  experiment = make_experiment(
    mode, **{"optimizer.name": optimizer, "objective.name": objective}
  )
  step, state, batch = start(experiment)
  shardings = [leaf.sharding for leaf in jax.tree.leaves(state)]
  for _ in range(3):
    before, (state, metrics) = state, step(state, batch)
    split = before.opt_state, before.params
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(split))
  assert [leaf.sharding for leaf in jax.tree.leaves(state)] == shardings
  return jax.device_get((state.replace(rng=None), metrics))


def check_equal(mode, optimizer, objective):
  expected = trained("replicated", optimizer, objective)
  found = trained(mode, optimizer, objective)
  for a, b in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
    # Gradients that should be zero, as before BatchNorm, are rounding alone.
    a, b = np.float64(a), np.float64(b)
    scale = np.max(np.abs(a), initial=1e-3)
    np.testing.assert_allclose(b / scale, a / scale, atol=1e-4)


@pytest.mark.parametrize(
  ("shape", "expected"),
  [
    ((), ()),
    ((8192,), ()),  # A vector.
    ((16, 16), ()),  # Small.
    ((64, 64), ("data",)),  # The first of equals.
    ((64, 128), (None, "data")),
    ((3, 3, 64, 32), (None, None, "data")),
    ((64, 129), ("data",)),  # The largest does not divide.
    ((63, 129), ()),  # None does.
    ((1, 197, 384), (None, None, "data")),  # A ViT's positions.
  ],
)
def test_the_largest_dimension_that_divides_is_split(shape, expected):
  mesh = devices.make_mesh()
  leaf = jax.ShapeDtypeStruct(shape, np.float32)
  assert sharding.spec(leaf, mesh) == PartitionSpec(*expected)
  one = devices.make_mesh(jax.devices()[:1])
  assert sharding.spec(leaf, one) == PartitionSpec()


@pytest.mark.parametrize("mode", sharding.MODES)
def test_fields_that_are_split(mode):
  experiment = make_experiment(mode, **{"objective.name": "mveb"})
  replicated = devices.replicated(devices.make_mesh())
  state = step_lib.abstract_state(experiment, replicated)
  split = {
    field
    for field in ("params", "batch_stats", "opt_state", "target", "skips")
    for leaf in jax.tree.leaves(getattr(state, field))
    if leaf.sharding.spec
  }
  assert split == set(sharding.MODES[mode])


@pytest.mark.parametrize("mode", SPLIT)
def test_numbers_are_those_of_a_replicated_state(mode):
  check_equal(mode, "adamw", "mveb")


@pytest.mark.proof
@pytest.mark.parametrize("mode", SPLIT)
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_numbers_of_every_optimizer(optimizer, mode):
  """LARS takes norms of whole leaves."""
  check_equal(mode, optimizer, "imsvd")
