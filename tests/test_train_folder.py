"""A user's own folder: unlabelled JPEGs, some of them broken, to an update."""

import io
import logging
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import folder_r18
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import metrics
from imsvd_jax.train import train_and_evaluate
from tests.train_child import small_config

NUM_IMAGES, BATCH, NUM_BAD = 200, 40, 10
STEPS = 2 * NUM_IMAGES // BATCH


def jpeg(number: int) -> bytes:
  """A piece of one of scikit-learn's two photographs."""
  photo = load_sample_images().images[number % 2]
  top, left = 17 * number % 300, 29 * number % 500
  file = io.BytesIO()
  piece = Image.fromarray(photo[top : top + 60, left : left + 80])
  piece.resize((32, 24)).save(file, "jpeg", quality=90)
  return file.getvalue()


def bad_files() -> list[bytes]:
  """Ten files of six kinds that no decoder reads."""
  good = jpeg(0)
  png = io.BytesIO()
  Image.fromarray(load_sample_images().images[0][:40, :40]).save(png, "png")
  kinds = [
    b"",
    b"<html>404</html>",
    good[: len(good) // 2],
    good[:20],
    np.random.default_rng(0).bytes(300),
    png.getvalue()[:300],
  ]
  return (kinds + kinds)[:NUM_BAD]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """190 real JPEGs and 10 bad files, without classes or validation part."""
  root = tmp_path_factory.mktemp("images")
  bad = dict(zip(range(7, NUM_IMAGES, 19), bad_files(), strict=False))
  for number in range(NUM_IMAGES):
    name = "bad" if number in bad else "good"
    contents = bad.get(number) if number in bad else jpeg(number)
    (root / f"{number:03}-{name}.jpg").write_bytes(contents)
  assert len(list(root.glob("*bad*"))) == NUM_BAD
  return root


def config_for(folder, **overrides):
  config = folder_r18.get_config("debug")
  config.update_from_flattened_dict(
    {
      "batch_size": BATCH,
      "epochs": 2.0,
      "data.name": "folder",
      "data.path": str(folder),
      "data.num_examples": 0,
      "views.view1.size": 16,
      "views.view2.size": 16,
      "checkpoint.every_steps": 3,
      "checkpoint.keep_last": 5,
      **overrides,
    }
  )
  return config


@pytest.mark.proof
def test_bad_images_are_named_counted_and_survived(
  folder, tmp_path, caplog, capsys
):
  workdir = tmp_path / "run"
  with caplog.at_level(logging.WARNING):
    state = train_and_evaluate(config_for(folder), str(workdir))
  assert int(state.step) == STEPS
  assert int(state.bad_images) == 2 * NUM_BAD  # In both epochs.

  named = [r.getMessage() for r in caplog.records if "read" in r.getMessage()]
  for path in folder.glob("*bad*"):
    assert sum(str(path) in message for message in named) == 1, path
  assert len(named) == NUM_BAD
  out, said = capsys.readouterr()
  assert "No k-NN or linear evaluation: the images have no labels" in said
  assert "--protocol=collapse\n" in out  # What works on such images.

  lines = [x for x in metrics.read_metrics(str(workdir)) if "loss" in x]
  counts = [line["bad_images"] for line in lines]
  assert len(counts) == STEPS
  assert counts == sorted(counts)
  assert counts[STEPS // 2 - 1] == NUM_BAD
  assert counts[-1] == 2 * NUM_BAD
  assert all(np.isfinite(line["loss"]) for line in lines)

  # A run that is killed after step 3 counts on from what it had.
  text = (workdir / metrics.METRICS_FILE).read_text()
  for step in (6, 9, 10):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  again = train_and_evaluate(config_for(folder), str(workdir))
  assert int(again.bad_images) == 2 * NUM_BAD
  assert (workdir / metrics.METRICS_FILE).read_text() == text


def test_a_bad_image_stops_the_run_if_that_is_wanted(folder, tmp_path):
  config = config_for(folder, **{"data.on_bad_image": "error"})
  with pytest.raises(UserError, match=r"Cannot read image .*bad\.jpg; repair"):
    train_and_evaluate(config, str(tmp_path))


def test_the_recipe_asks_for_a_path(tmp_path):
  config = folder_r18.get_config()
  with pytest.raises(UserError, match=r"data\.path is empty.*~/images"):
    train_and_evaluate(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "channels", [1, pytest.param(5, marks=pytest.mark.proof)]
)
def test_gray_and_many_channels_train(channels, tmp_path):
  config = small_config(
    **{
      "epochs": 1.0,
      "data.channels": channels,
      "data.mean": (0.5,) * channels,
      "data.std": (0.25,) * channels,
      "eval.every_epochs": 1.0,
      "views.view2.blur_prob": 1.0,
      "views.view2.gray_prob": 1.0,
    }
  )
  state = train_and_evaluate(config, str(tmp_path))
  kernel = state.params["backbone"]["conv1"]["kernel"]
  assert kernel.shape[2] == channels
  lines = metrics.read_metrics(str(tmp_path))
  assert all(np.isfinite(x["loss"]) for x in lines if "loss" in x)
  assert any("online/knn" in x for x in lines)


def test_a_mean_of_another_number_of_channels_is_refused(tmp_path):
  config = small_config(**{"data.channels": 1})
  with pytest.raises(UserError, match=r"data\.mean has 3 .*channels is 1"):
    train_and_evaluate(config, str(tmp_path / "run"))
