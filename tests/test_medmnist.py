"""A file of MedMNIST, from training through every command that reads it."""

import pathlib

import jax
import numpy as np
import pytest

from configs import medmnist
from imsvd_jax.evaluation import offline
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.explain import run_subject
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.interop import image_embeddings, weight_export
from imsvd_jax.train import train_and_evaluate


@pytest.mark.proof
def test_a_file_of_medmnist_goes_through_every_command(tmp_path):
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (("train", 700), ("val", 100), ("test", 200)):
    labels = rng.integers(0, 4, (count, 1), np.uint8)
    images = rng.integers(0, 64, (count, 28, 28, 3), np.uint8)
    images += 60 * labels[:, :, None, None]
    arrays |= {f"{split}_images": images, f"{split}_labels": labels}
  path = tmp_path / "bloodmnist.npz"
  np.savez(path, **arrays)
  config = medmnist.get_config("debug")
  config.update_from_flattened_dict(
    {
      "batch_size": 64, "data.name": "arrays", "data.path": str(path),
      "data.num_examples": 0, "data.resize": 28, "data.crop": 28,
      "views.view1.size": 28, "views.view2.size": 28, "eval.every_epochs": 0.0,
    }
  )  # fmt: skip
  workdir = str(tmp_path / "run")
  assert int(train_and_evaluate(config, workdir).step) == 11

  (result,) = offline.evaluate_runs(
    Options(workdir=(workdir,), protocol=("knn/imsvd",))
  )
  assert result.num_images == 200
  assert result.final > 0.9  # Classes differ in brightness.

  options = RunOptions(
    figure_format="png", num_top=1, integrated_per_bin=0, max_flip_images=0,
    grad_cam_per_bin=0, untrained=False,
  )  # fmt: skip
  run_subject.explain_run(workdir, options)
  (page,) = pathlib.Path(workdir).glob("explain-*/explorer/index.html")
  assert page.stat().st_size

  embedded = image_embeddings.embed(workdir, split="eval", codes=True)
  np.testing.assert_array_equal(
    embedded.columns["labels"], arrays["test_labels"][:, 0]
  )
  output = tmp_path / "encoder.stablehlo"
  weight_export.export_encoder(
    workdir, "stablehlo", str(output), with_projector=True
  )
  program = jax.export.deserialize(output.read_bytes())
  outputs = program.call(arrays["test_images"])
  for name in ("features", "codes"):
    np.testing.assert_allclose(
      outputs[name], embedded.columns[name], rtol=1e-4, atol=1e-5
    )
