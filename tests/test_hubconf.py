"""hubconf.py: exported files in PyTorch, through torch.hub."""

import dataclasses

import numpy as np
import pytest

from imsvd_jax import formats
from tests.formats.test_names import variables_of
from tests.run_command import ROOT

nets = pytest.importorskip("tests.torch_resnet")
torch = nets.torch
NETWORKS = {
  "torchvision": formats.Architecture("resnet8", 0.25, "small", channels=1),
  "timm": formats.Architecture("resnet10", stem="cifar", pool_grid=3),
  "safetensors": formats.Architecture("resnet50", 0.125, pool_grid=2),
}


def load(file):
  nets.import_or_skip("torchvision")
  return torch.hub.load(str(ROOT), "encoder", str(file), source="local")


@pytest.mark.parametrize("format_name", NETWORKS)
def test_the_network_computes_the_same(format_name, tmp_path):
  architecture = NETWORKS[format_name]
  whole = dataclasses.replace(architecture, projector=(8, 4))
  variables = variables_of(whole)
  file = tmp_path / f"encoder.{format_name}"
  inferred = formats.write_file(
    file,
    variables,
    format_name=format_name,
    metadata={"network": "mine"},
    projector=format_name == "safetensors",
  )
  encoder = load(file)
  assert not encoder.training
  assert encoder.metadata["network"] == "mine"
  x = np.random.default_rng(0).normal(size=(2, 32, 32, architecture.channels))
  x = x.astype(np.float32)
  with torch.no_grad():
    found = encoder(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
  own = {key: value["backbone"] for key, value in variables.items()}
  expected = inferred.network().apply(own, x, False)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


class Evil:
  def __reduce__(self):
    return print, ("executed",)


def test_no_code_in_a_file_is_executed(tmp_path, capsys):
  torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
  with pytest.raises(ValueError, match="UnpicklingError"):
    load(tmp_path / "evil.pth")
  assert "executed" not in capsys.readouterr().out


def test_other_networks_are_named(tmp_path):
  torch.save({"patch_embed.proj.weight": torch.ones(1)}, tmp_path / "vit.pth")
  with pytest.raises(ValueError, match="has no ResNet with torchvision's"):
    load(tmp_path / "vit.pth")


def test_a_file_of_something_else_is_one_line(tmp_path):
  for name in ("notes.md", "notes.safetensors"):
    (tmp_path / name).write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as a file of weights"):
      load(tmp_path / name)
