"""A batch in micro-batches: the loss and the gradients of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
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
  parts = [micro_batches.take(batch, jnp.int32(k), COUNT) for k in range(COUNT)]
  depth = step_lib.noise_key(state.rng, state.step, step_lib._DEPTH)

  def embed(variables, views, key):
    return step_lib.embed_views(
      experiment.model,
      variables["params"],
      variables["batch_stats"],
      views,
      key,
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


PLAIN = {
  f"views.{view}.jitter_prob": 0.0 for view in ("view1", "view2", "local")
}
# Stochastic depth must be the same in both passes.
DEPTH = {
  "model.backbone": "vit_micro",
  "model.patch_size": 8,
  "model.drop_path": 0.5,
}


@pytest.mark.parametrize(
  "overrides",
  [
    pytest.param(
      {"objective.name": name, **({} if name == "mveb" else PLAIN)},
      marks=() if name == "simclr" else pytest.mark.proof,
      id=name,
    )
    for name in OBJECTIVES
  ]
  + [pytest.param({**PLAIN, **DEPTH}, marks=pytest.mark.proof, id="depth")],
)
def test_equals_the_whole_batch(overrides):
  config, experiment = build(**overrides)
  state = step_lib.init_state(experiment)
  batch = experiment_lib.random_batch(config)
  batch = batch | {"index": np.arange(32, dtype=np.int32)}
  expected = passes(experiment, state, batch, 1, by_parts)
  for num_devices in (1, 8):
    actual = passes(experiment, state, batch, num_devices, step_lib._accumulate)
    assert_close(actual, expected)


def test_micro_batches_are_every_kth_image():
  rows = np.arange(24).reshape(12, 2)
  batch = {"views": (rows,), "index": rows[:, 0], "data_set": rows[:5]}
  part = micro_batches.take(batch, jnp.int32(1), 3)
  np.testing.assert_array_equal(part["views"][0], rows[1::3])
  np.testing.assert_array_equal(part["index"], rows[1::3, 0])
  assert part["data_set"] is batch["data_set"]
  parts = micro_batches.split(jnp.asarray(rows), 3)
  np.testing.assert_array_equal(parts[1], rows[1::3])
  np.testing.assert_array_equal(micro_batches.join(parts), rows)


def test_the_compiled_step_needs_less_memory():
  """Also with images that stay on the devices, and cut there."""

  def temporaries(count):
    _, experiment = build(
      **{
        **PLAIN,
        "batch_size": 256,
        "accumulate_steps": count,
        "views.num_local": 0,
      }
    )
    everywhere = devices.replicated(devices.make_mesh(jax.devices()[:1]))
    shape = lambda *size, dtype: jax.ShapeDtypeStruct(
      size, dtype, sharding=everywhere
    )
    batch = {
      "index": shape(256, dtype=jnp.int32),
      "epoch": shape(256, dtype=jnp.int32),
      "boxes": shape(256, 2, 5, dtype=jnp.float32),
      "data_set": shape(48, 16, 16, 3, dtype=jnp.uint8),
    }
    step = step_lib.jit_train_step(experiment, everywhere)
    state = step_lib.abstract_state(experiment, everywhere)
    stats = step.lower(state, batch).compile().memory_analysis()
    return stats.temp_size_in_bytes

  assert temporaries(8) < 0.4 * temporaries(1)
