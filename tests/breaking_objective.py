"""An objective that is not finite at some steps."""

import jax
import jax.numpy as jnp

from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config

NAN_LOSS = (5, 6)  # Steps, counted from 1.
NAN_GRADIENT = (8,)


def _happens(steps, key):
  """Whether `key` is that of one of the steps, of a run with seed 0."""
  run_key = jax.random.split(jax.random.key(0))[1]
  data = jax.random.key_data
  keys = [data(step_lib.noise_key(run_key, step - 1)) for step in steps]
  return jnp.any(jnp.all(jnp.stack(keys) == data(key), axis=-1))


def breaking_loss(embeddings, *, key, num_global=2, targets=None, **kwargs):
  """VICReg, not finite at some steps: a test-only objective."""
  del num_global, targets
  loss, terms = OBJECTIVES["vicreg"].loss(embeddings, **kwargs)
  broken = jnp.where(_happens(NAN_LOSS, key), jnp.nan, 1.0)
  # Zero, with an infinite derivative.
  edge = jax.lax.cond(
    _happens(NAN_GRADIENT, key),
    lambda: jnp.sqrt(jnp.sum(embeddings[0] * 0.0)),
    lambda: 0.0,
  )
  terms = {**terms, "variance": terms["variance"] * broken}
  return loss * broken + edge, terms


def config(monkeypatch):
  """Returns a small recipe with this objective, which it registers."""
  objective = OBJECTIVES["vicreg"]._replace(loss=breaking_loss)
  monkeypatch.setitem(OBJECTIVES, "breaking", objective)
  recipe = small_config(**{"eval.every_epochs": 0.0})
  with recipe.unlocked():
    recipe.objective.breaking = {}
    recipe.objective.name = "breaking"
  return recipe
