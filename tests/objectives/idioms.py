"""Every way a training loop may run an objective on several devices.

Each is a step with shared weights W, z_v = x_v W, that returns
((loss, terms), dloss/dW), as a data-parallel training step has it.
"""

from functools import partial

import jax
import jax.numpy as jnp

P = jax.sharding.PartitionSpec
AXIS = "data"


def mesh():
  return jax.make_mesh((8,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def make_step(loss, **hyperparameters):
  """Returns step(w, xs, targets, key, axis_name) for a registry loss."""

  def forward(w, xs, targets, key, axis_name):
    zs = [jnp.dot(x, w, precision="highest") for x in xs]
    return loss(
      zs, targets=targets, key=key, axis_name=axis_name, **hyperparameters
    )

  return forward


def one_device(forward):
  """jit, or eager when called without it."""
  step = partial(forward, axis_name=None)
  return jax.value_and_grad(step, has_aux=True)


def sharded(forward):
  """One jitted function that runs four idioms on 8 devices."""
  devices = mesh()
  inner = jax.value_and_grad(partial(forward, axis_name=AXIS), has_aux=True)
  outer = partial(forward, axis_name=AXIS)
  specs = (P(), P(AXIS), P(AXIS), P())
  gradient_specs = ((P(), P()), P())
  shard_map = partial(jax.shard_map, mesh=devices, in_specs=specs)

  def averaged(*args):
    value, gradient = inner(*args)
    return value, jax.lax.pmean(gradient, AXIS)

  def every(*args):
    return {
      "plain jit": one_device(forward)(*args),
      "shard_map": shard_map(inner, out_specs=gradient_specs)(*args),
      "shard_map, check_vma=False, pmean": shard_map(
        averaged, out_specs=gradient_specs, check_vma=False
      )(*args),
      "gradient of shard_map": jax.value_and_grad(
        shard_map(outer, out_specs=(P(), P())), has_aux=True
      )(*args),
      "gradient of shard_map, check_vma=False": jax.value_and_grad(
        shard_map(outer, out_specs=(P(), P()), check_vma=False), has_aux=True
      )(*args),
    }

  rows = jax.sharding.NamedSharding(devices, P(AXIS))
  everywhere = jax.sharding.NamedSharding(devices, P())
  return jax.jit(every, in_shardings=(everywhere, rows, rows, everywhere))


def pmapped(forward):
  """pmap with a pmean of gradients, on 8 devices; takes the global batch."""
  inner = jax.value_and_grad(partial(forward, axis_name=AXIS), has_aux=True)

  def averaged(*args):
    value, gradient = inner(*args)
    return value, jax.lax.pmean(gradient, AXIS)

  mapped = jax.pmap(averaged, axis_name=AXIS, in_axes=(None, 0, 0, None))

  def step(w, xs, targets, key):
    split = lambda x: x.reshape(8, -1, x.shape[-1])
    xs, targets = jax.tree.map(split, (xs, targets))
    return jax.tree.map(lambda x: x[0], mapped(w, xs, targets, key))

  return step
