"""The loaded encoder gives the numbers of the model it was trained as."""

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import digits
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import encoder as encoder_lib
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A workdir with one checkpoint, and the state in it."""
  config = digits.get_config("debug")
  experiment = experiment_lib.build(config, 16)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  workdir = tmp_path_factory.mktemp("run")
  checkpointer = Checkpointer(workdir, keep_last=1, config=config.to_dict())
  checkpointer.save(3, state)
  checkpointer.close()
  return workdir, experiment, state


@pytest.fixture(scope="module")
def encoder(run):
  return encoder_lib.load_encoder(str(run[0]))


def images_of(count, size=32):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def test_features_are_the_models(run, encoder):
  _, experiment, state = run
  images = images_of(5)
  data = experiment.config.data
  x = (images / 255.0 - np.array(data.mean)) / np.array(data.std)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  h, z = experiment.model.apply(variables, x.astype(np.float32), train=False)
  assert encoder.step == 3
  np.testing.assert_allclose(encoder.features(images), h, rtol=1e-4, atol=1e-5)
  z_loaded = encoder.embeddings(images)
  np.testing.assert_allclose(z_loaded, z, rtol=1e-4, atol=1e-5)
  codes = encoder.codes(images)
  expected = np.asarray(z).reshape(5, -1, 8).argmax(-1)
  np.testing.assert_array_equal(codes, expected)


def test_blocks_do_not_change_the_result(encoder):
  images = images_of(300)  # More than one block, not a multiple of it.
  whole = encoder.features(images)
  np.testing.assert_allclose(
    whole[290:], encoder.features(images[290:]), rtol=1e-4, atol=1e-5
  )
  assert whole.shape[0] == 300


# Images of the crop's own size too: evaluation enlarges them first.
@pytest.mark.parametrize(("height", "width"), [(48, 60), (32, 32)])
def test_images_are_resized_and_cropped_like_pil(encoder, height, width):
  smooth = np.linspace(0, 255, height * width * 3)
  images = smooth.reshape(1, height, width, 3).astype(np.uint8)
  fitted = encoder.preprocess(images)
  data = encoder.config.data
  assert data.resize > data.crop == 32
  width = round(width * data.resize / height)
  resized = Image.fromarray(images[0]).resize((width, data.resize), 3)
  top, left = (data.resize - data.crop) // 2, (width - data.crop) // 2
  expected = np.asarray(resized)[top : top + 32, left : left + 32]
  difference = fitted[0].astype(int) - expected.astype(int)
  assert np.abs(difference).max() <= 2
  assert encoder(images).shape == (1, encoder.features(fitted).shape[1])


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((2, 32, 32, 1), np.uint8), "shape"),
    (np.zeros((32, 32, 3), np.uint8), "shape"),
    (np.zeros((0, 32, 32, 3), np.uint8), "shape"),
    (np.zeros((2, 32, 32, 3), np.float32), "float32"),
  ],
)
def test_images_of_another_kind_are_refused(encoder, images, message):
  with pytest.raises(UserError, match=message):
    encoder(images)


def test_a_run_without_a_code_or_a_target_says_so(run, encoder):
  with pytest.raises(UserError, match="no EMA target"):
    encoder_lib.load_encoder(str(run[0]), use_target=True)
  config = ml_collections.ConfigDict(encoder.config.to_dict())
  config.objective.name = "vicreg"
  vicreg = encoder_lib.LoadedEncoder(config, encoder.variables, 0)
  with pytest.raises(UserError, match="no discrete code"):
    vicreg.codes(images_of(2))


def test_a_directory_without_a_run_is_named(tmp_path):
  with pytest.raises(UserError, match="holds no checkpoints"):
    encoder_lib.load_encoder(str(tmp_path))


def test_the_package_offers_it_lazily():
  import imsvd_jax

  assert imsvd_jax.load_encoder is encoder_lib.load_encoder


def test_a_run_without_images_of_its_own_asks_for_some():
  config = digits.get_config("debug")
  assert encoder_lib.data_to_read(config).name == "synthetic"
  config.data.name = "folder"
  with pytest.raises(UserError, match=r"no images of its own.* give --data"):
    encoder_lib.data_to_read(config)
  assert encoder_lib.data_to_read(config, "digits").name == "digits"
