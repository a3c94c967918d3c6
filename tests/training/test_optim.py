"""Optimizers against NumPy, schedules against their closed form."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.training import optim

STEPS = 60


def settings(name, **changes):
  values = {
    "name": name,
    "base_learning_rate": 0.3,
    "warmup_epochs": 2,
    "momentum": 0.9,
    "weight_decay": 0.02,
    "trust_coefficient": 1e-3,
    "decay_1d": False,
    "final_fraction": 1e-3,
    "b1": 0.9,
    "b2": 0.98,
    "eps": 1e-8,
  }
  return types.SimpleNamespace(**(values | changes))


def make(config):
  return optim.make_optimizer(
    config, batch_size=512, steps_per_epoch=5.5, total_steps=STEPS
  )


def learning_rate(step):
  """0.3 * 512 / 256 with 11 steps of warm-up, then half a cosine to 0.1%."""
  peak = 0.6
  if step < 11:
    return peak * step / 11
  cosine = 0.5 * (1 + np.cos(np.pi * (step - 11) / (STEPS - 11)))
  return peak * (0.001 + 0.999 * cosine)


def parameters():
  rng = np.random.default_rng(0)
  return {
    "conv": {"kernel": rng.normal(size=(3, 3, 4, 8))},
    "dense": {"kernel": rng.normal(size=(8, 5)), "bias": rng.normal(size=5)},
    "bn": {"scale": np.zeros(8), "bias": rng.normal(size=8)},
    "zero": {"kernel": np.zeros((4, 4))},
  }


def gradients(step):
  rng = np.random.default_rng(100 + step)
  scale = 10.0 ** rng.uniform(-2, 1)
  grads = jax.tree.map(lambda p: scale * rng.normal(size=p.shape), parameters())
  if step % 7 == 0:  # A zero gradient: the trust ratio divides by its norm.
    grads["conv"]["kernel"] = np.zeros_like(grads["conv"]["kernel"])
  return grads


class Lars:
  """w and m of one tensor, step by step in float64."""

  def __init__(self, w, config):
    self.w, self.m, self.config = (
      np.array(w, np.float64),
      np.zeros(w.shape),
      config,
    )

  def step(self, g, lr):
    c, w = self.config, self.w
    matrix = w.ndim != 1
    if matrix or c.decay_1d:
      g = g + c.weight_decay * w
    if matrix:
      norm_w, norm_g = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(g**2))
      if norm_w > 0 and norm_g > 0:
        g = g * (c.trust_coefficient * norm_w / norm_g)
    self.m = c.momentum * self.m + g
    self.w = w - lr * self.m


class Sgd(Lars):
  def step(self, g, lr):
    if self.w.ndim != 1 or self.config.decay_1d:
      g = g + self.config.weight_decay * self.w
    self.m = self.config.momentum * self.m + g
    self.w = self.w - lr * self.m


class AdamW(Lars):
  v, t = 0.0, 0

  def step(self, g, lr):
    c = self.config
    self.t += 1
    self.m = c.b1 * self.m + (1 - c.b1) * g
    self.v = c.b2 * self.v + (1 - c.b2) * g * g
    m, v = self.m / (1 - c.b1**self.t), self.v / (1 - c.b2**self.t)
    update = m / (np.sqrt(v) + c.eps)
    if self.w.ndim != 1 or c.decay_1d:
      update = update + c.weight_decay * self.w
    self.w = self.w - lr * update


class Adam(AdamW):
  def step(self, g, lr):
    c = self.config
    if self.w.ndim != 1 or c.decay_1d:
      g = g + c.weight_decay * self.w
    self.config = types.SimpleNamespace(**vars(c) | {"weight_decay": 0.0})
    super().step(g, lr)
    self.config = c


REFERENCES = {"lars": Lars, "sgd": Sgd, "adam": Adam, "adamw": AdamW}


def run(config):
  """Returns parameters after STEPS updates in float32."""
  optimizer, _ = make(config)
  params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), parameters())
  state = optimizer.init(params)

  @jax.jit
  def update(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  for step in range(STEPS):
    grads = jax.tree.map(lambda g: g.astype(np.float32), gradients(step))
    params, state = update(params, state, grads)
  return params


@pytest.mark.parametrize("decay_1d", [False, True])
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_many_steps_equal_numpy(name, decay_1d):
  config = settings(name, decay_1d=decay_1d)
  found = run(config)
  references = jax.tree.map(lambda p: REFERENCES[name](p, config), parameters())
  for step in range(STEPS):
    jax.tree.map(
      lambda r, g, step=step: r.step(g, learning_rate(step)),
      references,
      gradients(step),
    )
  start = parameters()

  def compare(path, leaf, reference, before):
    moved = np.abs(reference.w - before).max()
    assert moved > 0, path
    np.testing.assert_allclose(
      leaf, reference.w, rtol=1e-4, atol=1e-4 * moved, err_msg=str(path)
    )

  jax.tree.map_with_path(compare, found, references, start)


def test_learning_rate_is_the_closed_form():
  _, schedule = make(settings("sgd"))
  found = [float(schedule(step)) for step in range(STEPS + 1)]
  expected = [learning_rate(step) for step in range(STEPS + 1)]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
  assert found[0] == 0
  assert found[11] == pytest.approx(0.6)
  assert found[-1] == pytest.approx(0.6e-3, rel=1e-5)


def test_learning_rate_without_warm_up():
  _, schedule = make(settings("sgd", warmup_epochs=0, final_fraction=0.5))
  found = [float(schedule(step)) for step in (0, STEPS // 2, STEPS)]
  np.testing.assert_allclose(found, [0.6, 0.45, 0.3], rtol=1e-6)


def test_masks():
  mask = optim.not_1d(parameters())
  assert mask == {
    "conv": {"kernel": True},
    "dense": {"kernel": True, "bias": False},
    "bn": {"scale": False, "bias": False},
    "zero": {"kernel": True},
  }


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_one_dimensional_parameters_keep_still_without_gradient(name):
  zero = jax.tree.map(jnp.zeros_like, parameters())
  moved = {}
  for decay_1d in (False, True):
    config = settings(name, decay_1d=decay_1d, warmup_epochs=0)
    optimizer, _ = make(config)
    params = jax.tree.map(jnp.asarray, parameters())
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert np.abs(updates["dense"]["kernel"]).max() > 0
    moved[decay_1d] = float(np.abs(updates["dense"]["bias"]).max())
  assert moved[False] == 0
  assert moved[True] > 0


def test_a_warmup_that_is_not_shorter_than_the_run_is_a_tenth_of_it():
  _, schedule = make(settings("sgd", warmup_epochs=11))
  _, expected = make(settings("sgd", warmup_epochs=6 / 5.5))
  for step in (0, 3, 6, 30, 59):
    assert schedule(step) == expected(step)
  assert float(schedule(6)) == max(float(schedule(step)) for step in range(60))


def test_user_mistakes():
  with pytest.raises(UserError, match=r"'lar'.*'lars'.*adam, adamw, lars, sgd"):
    make(settings("lar"))
  with pytest.raises(UserError, match="at least one step"):
    optim.make_optimizer(
      settings("sgd"), batch_size=1, steps_per_epoch=1, total_steps=0
    )


def test_the_trust_ratio_is_that_of_optax_and_reads_less():
  params = {name: jnp.float32(p) for name, p in _kernels().items()}
  grads = {name: jnp.float32(g) for name, g in _kernels(seed=1).items()}
  grads["still"] *= 0
  other = optax.scale_by_trust_ratio(trust_coefficient=1e-3, eps=0.0)
  ours = optim._trust_ratio(1e-3)

  def scale(by):
    return jax.jit(lambda g, p: by.update(g, by.init(p), p)[0])

  np.testing.assert_equal(
    jax.tree.map(np.asarray, scale(ours)(grads, params)),
    jax.tree.map(np.asarray, scale(other)(grads, params)),
  )
  cost = [
    scale(by).lower(grads, params).compile().cost_analysis()["bytes accessed"]
    for by in (ours, other)
  ]
  assert cost[0] < 0.9 * cost[1]


def _kernels(seed=0):
  rng = np.random.default_rng(seed)
  made = {name: rng.normal(size=(64, 32)) for name in ("moving", "still")}
  return made | {"zero": np.zeros((4, 4))}
