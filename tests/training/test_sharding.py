"""A state that is split over the devices trains, saves and restores alike."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import digits
from imsvd_jax.base import devices
from imsvd_jax.base.errors import Damage
from imsvd_jax.benchmarks.costs import hlo
from imsvd_jax.runs import verification, weights
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import optim, sharding
from imsvd_jax.training import step as step_lib
from tests.runs.made_runs import open_run

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
def trained(mode, optimizer, objective, micro_batches):
  """Returns host copies of the state after three steps, and its metrics."""
  experiment = make_experiment(
    mode,
    **{
      "optimizer.name": optimizer,
      "objective.name": objective,
      "accumulate_steps": micro_batches,
    },
  )
  step, state, batch = start(experiment)
  shardings = [leaf.sharding for leaf in jax.tree.leaves(state)]
  for _ in range(3):
    before, (state, metrics) = state, step(state, batch)
    split = before.opt_state, before.params
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(split))
  assert [leaf.sharding for leaf in jax.tree.leaves(state)] == shardings
  return jax.device_get((state.replace(rng=None), metrics))


def check_equal(mode, *how):
  expected = trained("replicated", *how)
  found = trained(mode, *how)
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
  check_equal(mode, "adamw", "mveb", 1)


@pytest.mark.proof
@pytest.mark.parametrize("mode", SPLIT)
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_numbers_of_every_optimizer(optimizer, mode):
  """LARS takes norms of whole leaves."""
  check_equal(mode, optimizer, "imsvd", 1)


@pytest.mark.proof
@pytest.mark.parametrize("mode", SPLIT)
def test_numbers_of_micro_batches(mode):
  """With a target, whose statistics follow each micro-batch too."""
  check_equal(mode, "adamw", "mveb", 2)


# --- Checkpoints --------------------------------------------------------------


def abstract(mode, count=8):
  experiment = make_experiment(mode, **{"objective.name": "mveb"})
  mesh = devices.make_mesh(jax.devices()[:count])
  return step_lib.abstract_state(experiment, devices.replicated(mesh))


def placed(state, like):
  return jax.tree.map(
    lambda leaf, want: jax.device_put(leaf, want.sharding), state, like
  )


def check_same(found, state, like):
  keyless = lambda tree: jax.tree.leaves(tree.replace(rng=None))
  for a, b in zip(*map(keyless, (found, state)), strict=True):
    np.testing.assert_array_equal(a, b)
  where = lambda tree: [leaf.sharding for leaf in jax.tree.leaves(tree)]
  assert where(found) == where(like)


@pytest.fixture(scope="module")
def first_state():
  """A state on one device."""
  experiment = make_experiment("replicated", **{"objective.name": "mveb"})
  return jax.jit(lambda: step_lib.init_state(experiment))()


def test_checkpoints_restore_across_modes_and_devices(tmp_path, first_state):
  """Each is written as the one before was restored."""
  state = placed(first_state, abstract("replicated"))
  chain = [("all", 8), ("optimizer", 8), ("all", 1), ("all", 8)]
  run = open_run(tmp_path)
  for step, (mode, count) in enumerate(chain, start=1):
    assert run.save(step, state)
    like = abstract(mode, count)
    state, found = run.restore(like)
    assert found == step
    check_same(state, first_state, like)
  run.close()


def test_weights_of_a_split_state(tmp_path, first_state):
  """What evaluate, explain, export and embed read, and what init_from takes."""
  run = open_run(tmp_path)
  run.save(1, placed(first_state, abstract("all")))
  run.close()
  loaded = weights.load_variables(tmp_path)
  expected = first_state.params, first_state.target
  for a, b in zip(
    *map(jax.tree.leaves, ((loaded.params, loaded.target), expected)),
    strict=True,
  ):
    assert isinstance(a, np.ndarray)
    np.testing.assert_array_equal(a, b)
  for mode in sharding.MODES:
    like = abstract(mode)
    state, _ = weights.init_from(tmp_path, placed(first_state, like))
    check_same(state, first_state, like)


def test_damage_of_a_split_leaf_is_found(first_state):
  state = placed(first_state, abstract("all"))
  leaves, non_finite = verification.describe(state)
  assert not non_finite
  assert leaves == verification.describe(first_state)[0]
  kernel = state.params["projector"]["dense_0"]["kernel"]
  assert kernel.sharding.spec
  verification.verify(leaves, state)
  for broken in (kernel.at[0, 0].add(1), kernel[::-1]):
    broken = jax.device_put(broken, kernel.sharding)
    state.params["projector"]["dense_0"]["kernel"] = broken
    with pytest.raises(Damage, match="projector/dense_0/kernel"):
      verification.verify(leaves, state)


# --- The compiled program -----------------------------------------------------


def collectives(mode):
  """Returns {kind: bytes sent} of a step on eight CPU devices."""
  experiment = make_experiment(mode, **{"objective.name": "vicreg"})
  step, state, batch = start(experiment)
  program = hlo.Program(step.lower(state, batch).compile().as_text())
  sent = dict.fromkeys(hlo.COLLECTIVES, 0.0)
  for one in program.collectives():
    sent[one.kind] += one.runs * one.sent_bytes
  return sent


def test_weights_are_gathered_once():
  """Not for each view, and no activations are."""
  state = abstract("all")
  split = sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(state.params)
    if leaf.sharding.spec
  )
  found = {mode: collectives(mode) for mode in sharding.MODES}
  for mode in SPLIT:
    more = found[mode]["all-gather"] - found["replicated"]["all-gather"]
    assert more == split * 7 / 8, mode
    for kind in ("all-to-all", "collective-permute"):
      assert found[mode][kind] == found["replicated"][kind], (mode, kind)
