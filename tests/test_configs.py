"""Every recipe builds and lowers; debug forms of every kind train a step."""

import importlib
import operator
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base import devices
from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.runs import metrics as metrics_lib
from imsvd_jax.train import train_and_evaluate
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(
  path.stem
  for path in (ROOT / "configs").glob("*.py")
  if path.stem not in {"__init__", "common"}
)

# Every recipe compiles a network; the others are proofs that CI runs.
FEW = ("digits",)
MOST_AS_PROOFS = [
  pytest.param(name, marks=() if name in FEW else pytest.mark.proof)
  for name in RECIPES
]


# What a step is made of. Debug forms that are alike in it are one program.
CHOICES = (
  "objective.name",
  "model.backbone",
  "model.stem",
  "model.pool",
  "model.pool_grid",
  "model.zero_init_residual",
  "optimizer.name",
  "views.num_local",
  "data.channels",
)


def get_config(recipe: str, mode: str = ""):
  return importlib.import_module(f"configs.{recipe}").get_config(mode)


def with_new_choices():
  """Returns recipes in which every value of every choice occurs."""
  seen, found = set(), []
  for recipe in [*FEW, *RECIPES]:
    config = get_config(recipe, "debug")
    values = {(name, operator.attrgetter(name)(config)) for name in CHOICES}
    if values - seen:
      seen |= values
      marks = () if recipe in FEW else pytest.mark.proof
      found.append(pytest.param(recipe, marks=marks))
  return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_are_locked_and_a_mode_must_be_known(recipe):
  config = get_config(recipe)
  with pytest.raises(AttributeError, match="does not exist"):
    config.nonsense = 1
  with pytest.raises(ValueError, match="Unknown mode"):
    get_config(recipe, "nonsense")


def test_only_imsvd_has_variants():
  assert get_config("comparison", "digits-imsvd-bins4").batch_size == 512
  with pytest.raises(ValueError, match="Unknown mode 'digits-simclr-bins4'"):
    get_config("comparison", "digits-simclr-bins4")


@pytest.mark.parametrize("recipe", MOST_AS_PROOFS)
def test_the_full_train_step_lowers(recipe):
  config = get_config(recipe)
  experiment = experiment_lib.build(config, num_examples=50_000)
  state = jax.eval_shape(lambda: step_lib.init_state(experiment))
  mesh = devices.make_mesh()
  replicated = devices.replicated(mesh)
  train_step = step_lib.jit_train_step(experiment, replicated)
  lowered = train_step.lower(state, experiment_lib.abstract_batch(config))
  new_state, metrics = lowered.out_info
  assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(
    lambda x: (x.shape, x.dtype), state
  )
  assert all(m.shape == () for m in jax.tree.leaves(metrics))
  assert {"loss", "learning_rate", "gradient_norm"} <= set(metrics)


@pytest.mark.parametrize("recipe", with_new_choices())
def test_the_debug_form_trains_and_saves(recipe, tmp_path):
  config = get_config(recipe, "debug")
  state = train_and_evaluate(config, str(tmp_path))
  assert int(state.step) == 1
  lines = metrics_lib.read_metrics(str(tmp_path))
  assert any("loss" in line for line in lines)
  assert any("online/knn" in line for line in lines)
  assert (tmp_path / "checkpoints" / "1").is_dir()


def test_mveb_heads_have_the_size_of_the_authors():
  config = get_config("imagenet_r50_mveb")
  model = experiment_lib.make_model(config.model, OBJECTIVES["mveb"])
  images = jnp.zeros((2, 32, 32, 3))
  shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, False))
  head = shapes["params"]["projector"]
  # Three matrices, the last with a bias, and two batch norms.
  count = sum(leaf.size for leaf in jax.tree.leaves(head))
  assert count == 3 * 2048**2 + 2048 + 2 * 2 * 2048 == 12_593_152
  biases = [name for name in head if "bias" in head[name] and "dense" in name]
  assert biases == ["dense_2"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_recipes_of_small_images_start_as_torch_does(recipe):
  """As CIFAR-10's reference recipe does; the others build on it."""
  small = re.match("cifar10|fashion_mnist|medmnist", recipe)
  init = "torch_default" if small else "fan_out_normal"
  assert get_config(recipe).model.init == init


def test_superinfo_recipes_follow_infocl():
  cifar = get_config("cifar10_r18_superinfo")
  imagenet = get_config("imagenet_r50_superinfo")
  rates = []
  for config, images in ((cifar, 50_000), (imagenet, 1_281_167)):
    assert config.epochs == 200
    assert config.objective.superinfo.temperature == 0.5
    assert config.optimizer.weight_decay == 1e-6
    experiment = experiment_lib.build(config, num_examples=images)
    ends = (0, experiment.total_steps)
    rates.append([float(experiment.schedule(step)) for step in ends])
  np.testing.assert_allclose(rates, [(3e-4, 3e-4), (1.2, 0)], atol=1e-9)
  assert (cifar.optimizer.name, cifar.batch_size) == ("adam", 256)
  assert (imagenet.optimizer.name, imagenet.batch_size) == ("lars", 1024)


def test_the_published_recipes_say_what_the_papers_say():
  imagenet = get_config("imagenet_r50")
  experiment = experiment_lib.build(imagenet, num_examples=1_281_167)
  steps_per_epoch = 1_281_167 / 2048
  assert experiment.total_steps == round(100 * steps_per_epoch)
  warm = round(10 * steps_per_epoch)
  assert float(experiment.schedule(warm)) == pytest.approx(4.8, rel=1e-3)
  end = float(experiment.schedule(experiment.total_steps))
  assert end == pytest.approx(4.8e-3, rel=1e-3)
  cifar = get_config("cifar10_r18")
  experiment = experiment_lib.build(cifar, num_examples=50_000)
  assert float(experiment.schedule(round(10 * 50_000 / 512))) == pytest.approx(
    0.2, rel=1e-3
  )
