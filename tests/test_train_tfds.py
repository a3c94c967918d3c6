"""Real photographs as JPEGs through TFDS, from records to an update."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import cifar10_r18
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import results
from imsvd_jax.runs import metrics
from imsvd_jax.train import train_and_evaluate

tfds = pytest.importorskip("tensorflow_datasets")


class TinyPieces(tfds.core.GeneratorBasedBuilder):
  """Pieces of scikit-learn's two photographs; the label is which one."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "label": tfds.features.ClassLabel(names=["temple", "flower"]),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"train": self._pieces(12), "test": self._pieces(4)}

  def _pieces(self, count):
    rng = np.random.default_rng(count)
    for label, photo in enumerate(load_sample_images().images):
      for i in range(count):
        height, width = rng.integers(60, 120, 2)
        top, left = rng.integers(0, 300), rng.integers(0, 500)
        piece = Image.fromarray(photo[top : top + height, left : left + width])
        file = io.BytesIO()
        piece.save(file, "jpeg", quality=90)
        yield f"{label}-{i}", {"image": file.getvalue(), "label": label}

  def _generate_examples(self):
    raise AssertionError("splits generate their own")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  path = tmp_path_factory.mktemp("tfds")
  TinyPieces(data_dir=path).download_and_prepare()
  return path


def config_for(data_dir, **overrides):
  config = cifar10_r18.get_config("debug")
  config.update_from_flattened_dict(
    {
      "data.name": "tfds:tiny_pieces",
      "data.path": str(data_dir),
      "data.num_examples": 0,
      "epochs": 2.0,
      **overrides,
    }
  )
  return config


@pytest.mark.proof
def test_a_run_trains_and_evaluates_on_jpegs(data_dir, tmp_path):
  state = train_and_evaluate(config_for(data_dir), str(tmp_path))
  assert int(state.step) == 3  # Two epochs of 24 images, 16 a step.
  lines = metrics.read_metrics(str(tmp_path))
  assert all(np.isfinite(x["loss"]) for x in lines if "loss" in x)
  assert sum("online/knn" in x for x in lines) >= 2


def test_a_missing_data_set_is_said_at_once(tmp_path):
  config = config_for(tmp_path, **{"data.name": "tfds:cifar10"})
  with pytest.raises(UserError, match=r"not prepared.*download_and_prepare"):
    train_and_evaluate(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


class TinyStl(TinyPieces):
  """As STL-10: many images without a label, and few with one."""

  def _split_generators(self, dl_manager):
    return {
      "train": self._pieces(8),
      "test": self._pieces(4),
      "unlabelled": self._unlabelled(12),
    }

  def _unlabelled(self, count):
    for key, example in self._pieces(count):
      yield key, example | {"label": -1}


@pytest.mark.proof
def test_a_labelled_bank_apart_from_the_images_of_training(tmp_path):
  TinyStl(data_dir=tmp_path).download_and_prepare()
  config = config_for(
    tmp_path,
    **{
      "data.name": "tfds:tiny_stl",
      "data.train_split": "unlabelled",
      "eval.bank_split": "train",
      "epochs": 1.0,
    },
  )
  workdir = tmp_path / "run"
  state = train_and_evaluate(config, str(workdir))
  assert int(state.step) == 2  # 24 images without a label, 16 a step.
  lines = metrics.read_metrics(str(workdir))
  assert any("online/knn" in line for line in lines)
  found = results.read_results(workdir / results.FILE_NAME)
  assert {r["data"]["train"] for r in found} == {"train"}
