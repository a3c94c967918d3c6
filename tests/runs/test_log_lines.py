"""What a run says about itself before its first step."""

import jax
import numpy as np
import pytest

from configs import folder_r18
from imsvd_jax.base import devices
from imsvd_jax.runs import log_lines
from imsvd_jax.training import experiment


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_on_a_cpu_is_said_to_be_slow(dtype, tmp_path, capsys):
  config = folder_r18.get_config("debug")
  config.model.dtype = dtype
  log_lines.describe_run(
    experiment.build(config, 64),
    {"kernel": np.zeros((2, 3), np.float32)},
    devices.make_mesh(jax.devices()[:1]),
    str(tmp_path),
    0,
  )
  said = capsys.readouterr()
  hint = "--config.model.dtype=float32 makes a new"
  assert (hint in said.out + said.err) == (dtype == "bfloat16")
  assert f", {dtype}, 6 parameters" in said.out + said.err


@pytest.mark.parametrize(
  ("backbone", "has_labels", "protocols", "library"),
  [
    ("resnet8", True, "knn/imsvd,collapse", "torchvision"),
    ("vit_micro", False, "collapse", "timm"),
  ],
)
def test_the_next_steps_fit_the_run(
  backbone, has_labels, protocols, library, capsys
):
  log_lines.describe_next("runs/a b", backbone, has_labels)
  said = capsys.readouterr().out
  assert f" --workdir='runs/a b' --protocol={protocols}\n" in said
  assert f"--format={library} " in said
