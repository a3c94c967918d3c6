"""A batch in micro-batches: the loss and the gradients of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import micro_batches
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config

COUNT = 2


def build(**overrides):
  config = small_config(
    **{
      "batch_size": 32,
      "accumulate_steps": COUNT,
      "views.num_local": 2,
      "views.local.size": 16,
      "optimizer.name": "sgd",
      **overrides,
    }
  )
  return config, experiment_lib.build(config, 320)


def passes(experiment, state, batch, num_devices, function):
  """The result of `_whole` or `_accumulate`, on a number of devices."""
  mesh = devices.make_mesh(jax.devices()[:num_devices])
  rows, everywhere = devices.batch_sharded(mesh), devices.replicated(mesh)

  def run(state, batch):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return function(experiment, state, batch)

  run = jax.jit(run, out_shardings=everywhere)
  placed = jax.device_put(state, everywhere), jax.device_put(batch, rows)
  return jax.tree.map(np.asarray, run(*placed))


def by_parts(experiment, state, batch):
  """The reference: one loss of all micro-batches, differentiated at once."""
  parts = [
    micro_batches.take(batch, jnp.int32(k), COUNT) for k in range(COUNT)
  ]
  depth = step_lib.noise_key(state.rng, state.step, step_lib._DEPTH)

  def embed(variables, views, key):
    return step_lib.embed_views(
      experiment.model, variables["params"], variables["batch_stats"],
      views, key,
    )

  def loss_fn(params):
    online = {"params": params, "batch_stats": state.batch_stats}
    target, zs, targets = state.target, [], []
    for k, part in enumerate(parts):
      views = step_lib._views(experiment, state, part)
      z, stats = embed(online, views, jax.random.fold_in(depth, k))
      online = online | {"batch_stats": stats}
      zs.append(z)
      if target is not None:
        z, stats = embed(target, views[:1], None)
        target = target | {"batch_stats": stats}
        targets.append(z)
    join = lambda zs: [
      jnp.stack(z, axis=1).reshape(-1, z[0].shape[-1])
      for z in zip(*zs, strict=True)
    ]
    zs = join(zs)
    loss, terms = step_lib._objective(
      experiment, state, zs, join(targets) or None
    )
    return loss, (terms, zs, online["batch_stats"], target)

  (loss, (terms, zs, stats, target)), gradients = jax.value_and_grad(
    loss_fn, has_aux=True
  )(state.params)
  return step_lib._Passes(loss, terms, zs, gradients, stats, target)


def assert_close(actual, expected, tolerance=1e-5):
  """Each leaf, relative to its largest entry; gradients to their norm."""
  scale = lambda x: np.abs(x).max(initial=1e-30)
  for name, a, b in zip(actual._fields, actual, expected, strict=True):
    a, b = (jax.tree.leaves_with_path(x) for x in (a, b))
    total = max([scale(x) for _, x in b], default=0)
    for (path, x), (_, y) in zip(a, b, strict=True):
      least = total if name == "gradients" else scale(y)
      error = np.abs(x - y).max() / least
      assert error < tolerance, (name, jax.tree_util.keystr(path), error)


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_whole_batch(objective, num_devices):
  config, experiment = build(**{"objective.name": objective})
  state = step_lib.init_state(experiment)
  batch = experiment_lib.random_batch(config)
  batch = batch | {"index": np.arange(32, dtype=np.int32)}
  expected = passes(experiment, state, batch, 1, by_parts)
  actual = passes(
    experiment, state, batch, num_devices, step_lib._accumulate
  )
  assert_close(actual, expected)
