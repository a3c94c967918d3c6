"""What keeps the hot loop fast: nothing compiles, copies or waits in it."""

import functools

import jax
import jax.numpy as jnp
import pytest

from imsvd_jax import models
from imsvd_jax.base import devices
from imsvd_jax.train import train_and_evaluate
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.train_child import small_config

COMPILED = "/jax/core/compile/backend_compile_duration"


class Unread:
  """A step's number that nobody may look at."""

  def __init__(self, step):
    self._step = step

  def _fail(self, *args, **kwargs):
    raise AssertionError(f"The host waits for the numbers of {self._step}.")

  __array__ = __float__ = __int__ = __bool__ = __index__ = __str__ = _fail
  block_until_ready = __repr__ = __format__ = item = tolist = _fail


@pytest.fixture(scope="module", params=["replicated", "all"])
def loop(request, tmp_path_factory):
  """The real trainer over nine steps; it logs the first, 4, 8 and the last.

  Returns:
    The names of the programs compiled after each step's dispatch and before
    the next one's, by step; whatever reads another step's numbers fails.
  """
  programs = []
  listen = lambda event, seconds, **about: (
    programs.append(about.get("fun_name", "?")) if event == COMPILED else None
  )
  during: dict[int, list] = {}
  jit_train_step = step_lib.jit_train_step

  def watched(experiment, replicated):
    train_step = jit_train_step(experiment, replicated)
    steps = iter(range(1, 100))

    def run(state, batch):
      step = next(steps)
      new_state, metrics = train_step(state, batch)
      assert state.params["projector"]["dense_0"]["kernel"].is_deleted()
      during[step] = list(programs)
      programs.clear()
      if step not in (1, 4, 8, 9):  # The console shows the first at once.
        metrics = jax.tree.map(lambda _: Unread(step), metrics)
      return new_state, metrics

    return run

  config = small_config(
    **{
      "log.every_steps": 4,
      "log.progress_seconds": 1e9,
      # Before step 1, and after 3, 6 and 9. On CPUs jax 0.11 donates no weight
      # of a split state that an evaluation has read.
      "eval.every_epochs": 1.0 if request.param == "replicated" else 0.0,
      "eval.collapse_images": 16,
      "checkpoint.every_steps": 1000,
      "sharding.state": request.param,
    }
  )
  workdir = tmp_path_factory.mktemp("run")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_lib, "jit_train_step", watched)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      train_and_evaluate(config, str(workdir))
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
  return during


def test_nothing_compiles_after_the_first_step(loop):
  assert len(loop) == 9
  assert loop[1]
  assert {step: names for step, names in loop.items() if names} == {1: loop[1]}


def abstract(**overrides):
  """The experiment, and its state and batch without numbers."""
  config = small_config(**overrides)
  experiment = experiment_lib.build(config, 48)
  rows = devices.batch_sharded(devices.make_mesh())
  state = jax.eval_shape(lambda: step_lib.init_state(experiment))
  return experiment, state, experiment_lib.abstract_batch(config, rows)


def test_the_state_is_updated_in_place():
  experiment, state, batch = abstract()
  step = step_lib.jit_train_step(
    experiment, devices.replicated(devices.make_mesh())
  )
  memory = step.lower(state, batch).compile().memory_analysis()
  size = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(state.replace(rng=None))
  )
  assert memory.alias_size_in_bytes >= size


def test_bfloat16_is_the_models_alone():
  """State, augmentation, objective and metrics stay float32."""
  experiment, state, batch = abstract(**{"model.dtype": "bfloat16"})
  step = functools.partial(step_lib.train_step, experiment)
  new_state, metrics = jax.eval_shape(step, state, batch)
  floats = {
    x.dtype
    for x in jax.tree.leaves((new_state, metrics))
    if jnp.issubdtype(x.dtype, jnp.floating)
  }
  assert floats == {jnp.dtype("float32")}

  lines = jax.jit(step).lower(state, batch).as_text().splitlines()
  convolutions = [line for line in lines if "stablehlo.convolution" in line]
  assert convolutions
  assert all("bf16" in line for line in convolutions)
  products = [line for line in lines if "stablehlo.dot_general" in line]
  objective = [line for line in products if "bf16" not in line]
  assert len(objective) == 3
  # Of M = 8 variables with 8 bins; the other products are the projector's.
  assert all("x8x8x" in line and "HIGHEST" in line for line in objective)
  assert len(products) > 3


def residuals(remat):
  """Bytes that the forward pass keeps for the backward pass."""
  model = models.Encoder(
    backbone=models.BACKBONES["resnet10"](width_multiplier=0.125, remat=remat),
    projector=models.Projector(widths=(8,)),
  )

  def backward_pass(key, images):
    variables = model.init(key, images, train=False)
    apply = lambda params: model.apply(
      {**variables, "params": params}, images, True, mutable=["batch_stats"]
    )[0][1]
    return jax.vjp(apply, variables["params"])[1]

  images = jax.ShapeDtypeStruct((32, 64, 64, 3), jnp.float32)
  kept = jax.eval_shape(backward_pass, jax.random.key(0), images)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_remat_keeps_less_for_the_backward_pass():
  """Of the program as written: XLA for CPUs undoes the recomputation."""
  assert residuals(remat=True) < 0.7 * residuals(remat=False)


def test_weights_are_cast_once_for_all_views():
  """So that one gradient, not one per view, is added up over the devices."""
  experiment, state, batch = abstract(**{"model.dtype": "bfloat16"})
  step = functools.partial(step_lib.train_step, experiment)
  text = jax.jit(step).lower(state, batch).as_text()
  kernel = state.params["projector"]["dense_1"]["kernel"]
  shape = "x".join(map(str, kernel.shape))
  down = f"(tensor<{shape}xf32>) -> tensor<{shape}xbf16>"
  up = f"(tensor<{shape}xbf16>) -> tensor<{shape}xf32>"
  assert text.count(down) == 1
  assert text.count(up) == 1


def test_metrics_of_other_steps_would_be_seen():
  with pytest.raises(AssertionError, match="waits"):
    jax.device_get(Unread(1))
