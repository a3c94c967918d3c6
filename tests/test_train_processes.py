"""Two processes of four devices train as one process of eight does.

Through launch/local.sh, so that the launcher, the flags of main, the joining,
the feeding, the evaluation and the checkpoints are all the real ones.
"""

import importlib
import os
import pathlib
import shutil
import subprocess

import jax
import numpy as np
import pytest

from imsvd_jax import data
from imsvd_jax.data import host_pipeline
from imsvd_jax.runs import checkpointer, metrics
from imsvd_jax.train import train_and_evaluate

ROOT = pathlib.Path(__file__).parents[1]
# 20 images do not divide by the batch of 16: batches cross the end of an epoch
# and the evaluation is padded.
OVERRIDES = {
  "epochs": 3.0,
  "data.num_examples": 20,
  "data.image_size": 16,
  "data.resize": 16,
  "data.crop": 16,
  "views.view1.size": 16,
  "views.view2.size": 16,
  "eval.every_epochs": 100.0,  # At the start and at the end.
  "checkpoint.every_steps": 2,
}


def train_two_processes(
  recipe: str, workdir: pathlib.Path, mode: str = "replicated"
) -> str:
  overrides = {**OVERRIDES, "sharding.state": mode}
  flags = [f"--config.{key}={value}" for key, value in overrides.items()]
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  result = subprocess.run(
    [
      str(ROOT / "launch" / "local.sh"),
      "2",
      f"configs/{recipe}.py:debug",
      f"--workdir={workdir}",
      *flags,
    ],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stderr


def train_one_process(recipe: str, workdir: pathlib.Path):
  config = importlib.import_module(f"configs.{recipe}").get_config("debug")
  config.update_from_flattened_dict(OVERRIDES)
  return train_and_evaluate(config, str(workdir))


@pytest.mark.parametrize(
  ("recipe", "mode"),
  [
    pytest.param("digits", "replicated", marks=pytest.mark.proof),
    pytest.param("digits", "all", marks=pytest.mark.proof),
    pytest.param("cifar10_r18", "replicated", marks=pytest.mark.slow),
  ],
)
def test_two_processes_train_as_one(recipe, mode, tmp_path, capsys):
  """However their state is split; the one process has it whole."""
  assert jax.device_count() == 8
  said = train_two_processes(recipe, tmp_path / "two", mode)
  state = train_one_process(recipe, tmp_path / "one")

  assert "[0] Devices: 8 x cpu (cpu), 2 process(es)" in said
  others = [line for line in said.splitlines() if line.startswith("[1] ")]
  assert not any("step" in line for line in others), "process 0 logs, alone"

  restored = checkpointer.Checkpointer(
    tmp_path / "two", keep_last=1, config={}
  ).restore(state)
  assert restored is not None
  other, step = restored
  assert step == int(state.step) == 4
  for a, b in zip(
    jax.tree.leaves((state.params, state.batch_stats)),
    jax.tree.leaves((other.params, other.batch_stats)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  one, two = (metrics.read_metrics(str(tmp_path / n)) for n in ("one", "two"))
  assert [line["step"] for line in one] == [line["step"] for line in two]
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      # Rounding may change the neighbours of one image.
      tolerance = 0.06 if name == "online/knn" else 1e-4
      assert a[name] == pytest.approx(b[name], rel=1e-3, abs=tolerance), name
  assert {line["step"] for line in two if "online/knn" in line} == {0, 4}

  # One process goes on with what two began.
  shutil.rmtree(tmp_path / "two" / "checkpoints" / "4")
  state = train_one_process(recipe, tmp_path / "two")
  assert "from the checkpoint of step 2." in capsys.readouterr().err
  for a, b in zip(
    jax.tree.leaves((state.params, state.batch_stats)),
    jax.tree.leaves((other.params, other.batch_stats)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["digits", "cifar10_r18"])
def test_the_processes_share_every_epoch_out(recipe):
  """What each process is fed: each image once per epoch, over all of them."""
  config = importlib.import_module(f"configs.{recipe}").get_config("debug")
  config.update_from_flattened_dict(OVERRIDES)
  source = data.make_source(config.data, "train")

  def batches(index, count):
    return host_pipeline.train_batches(
      source,
      views=config.views,
      batch_size=16,
      seed=config.seed,
      process_index=index,
      process_count=count,
    )

  whole, parts = batches(0, 1), [batches(0, 2), batches(1, 2)]
  seen = []
  for _ in range(5):
    batch, halves = next(whole), [next(part) for part in parts]
    for name in ("index", "epoch"):
      together = np.concatenate([half[name] for half in halves])
      np.testing.assert_array_equal(together, batch[name])
    seen += zip(batch["epoch"], batch["index"], strict=True)
  assert len(seen) == 80
  assert sorted(seen) == [(e, i) for e in range(4) for i in range(20)]
