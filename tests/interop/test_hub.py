"""A folder for the Hugging Face Hub: its card, and timm without a network."""

import dataclasses
import json
import math

import numpy as np
import pytest
import yaml

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.safetensors_files import write_safetensors
from imsvd_jax.interop import hub, model_card, weight_export
from tests.formats.test_names import fake, variables_of

NETWORKS = {
  "resnet18": formats.Architecture("resnet18"),
  "resnet10": formats.Architecture("resnet10", channels=1),
  "vit": formats.Architecture(
    "vit_micro", patch_size=8, registers=2, pool="mean", positions=17
  ),
  "convnext": formats.Architecture("convnext_micro", 1 / 12, patch_size=4),
}
ROWS = [
  model_card.Measured("random init, knn/final", "digits", 0.3),
  model_card.Measured("raw pixels, knn/final", "digits", 0.4),
  model_card.Measured("trained, knn/final", "digits", 0.875, (0.8, 0.9)),
  model_card.Measured(
    "transfer/pets", "tfds:pets", 0.5, metric="mean_per_class"
  ),
]


def export(folder, **options):
  folder.mkdir(exist_ok=True)
  write_safetensors(folder / "weights", fake(NETWORKS["resnet18"]), {})
  return weight_export.export_encoder(
    str(folder / "weights"), "hub", str(folder / "my net"), **options
  )


def card_of(folder):
  """The YAML and the Markdown of a card."""
  text = (folder / "my net/README.md").read_text()
  head, body = text.removeprefix("---\n").split("\n---\n", 1)
  return yaml.safe_load(head), body


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_builds_the_network_from_the_folder(name, tmp_path, monkeypatch):
  nets = pytest.importorskip("tests.torch_resnet")
  timm = nets.import_or_skip("timm")
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  architecture = NETWORKS[name]
  whole = dataclasses.replace(architecture, projector=(8, 4))
  variables = variables_of(whole)
  inferred = formats.write_file(
    tmp_path / hub.WEIGHTS, variables, format_name="safetensors", metadata={}
  )
  channels = architecture.channels
  metadata = {
    "input_size": 32,
    "resize": 40,
    "num_features": inferred.network().num_features,
    "interpolation": "bilinear",
    "mean": [0.25] * channels,
    "std": [0.5] * channels,
  }
  assert hub.write_config(str(tmp_path), inferred, metadata, 0)
  model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
  settings = timm.data.resolve_model_data_config(model)
  assert settings["input_size"] == (channels, 32, 32)
  assert settings["interpolation"] == "bilinear"
  assert list(settings["mean"]) == metadata["mean"]
  assert settings["crop_pct"] == 0.8
  x = np.random.default_rng(0).normal(size=(2, 32, 32, channels))
  x = x.astype(np.float32)
  with nets.torch.no_grad():
    images = nets.torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    found = model(images).numpy()
  own = {k: v["backbone"] for k, v in variables.items() if "backbone" in v}
  expected = inferred.network().apply(own, x, False)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_head_of_a_card_is_what_the_hub_reads(tmp_path, monkeypatch):
  monkeypatch.setattr(model_card, "measured", lambda *_: ROWS)
  files, note = export(tmp_path, license_name="CC-BY-NC-4.0")
  assert [name.rsplit("/", 1)[1] for name in files] == [
    "model.safetensors",
    "config.json",
    "README.md",
  ]
  assert "hf upload 'USER/my net' " in note
  head, body = card_of(tmp_path)
  assert head["license"] == "cc-by-nc-4.0"
  assert head["library_name"] == "timm"
  assert head["pipeline_tag"] == "image-feature-extraction"
  assert {"imsvd_jax", "timm", "resnet18"} < set(head["tags"])
  (index,) = head["model-index"]
  assert index["name"] == "my net"
  found = [
    (r["task"]["name"], r["metrics"][0]["value"]) for r in index["results"]
  ]
  assert found == [("trained, knn/final", 0.875), ("transfer/pets", 0.5)]
  assert "| random init, knn/final | digits | 30.00% |" in body
  assert "transfer/pets (mean per-class accuracy)" in body
  # ModelCard is the Hub's own reader; it needs a network library.
  library = pytest.importorskip("huggingface_hub.repocard")
  text = (tmp_path / "my net/README.md").read_text()
  data = library.ModelCard(text).data
  assert [r.metric_value for r in data.eval_results] == [0.875, 0.5]


def test_words_of_a_stranger_stay_values(tmp_path):
  export(tmp_path, license_name='mine: "a"\n---\nlicense: mit')
  head, body = card_of(tmp_path)
  name = 'mine: "a" --- license: mit'
  assert (head["license"], head["license_name"]) == ("other", name)
  assert f"| License | {name} |" in body


def test_every_card_has_a_head(tmp_path):
  write_safetensors(tmp_path / "a", fake(NETWORKS["resnet18"]), {})
  output = str(tmp_path / "b.npz")
  weight_export.export_encoder(str(tmp_path / "a"), "numpy", output)
  text = (tmp_path / "b.npz.md").read_text()
  head = yaml.safe_load(text.split("---\n")[1])
  assert head["library_name"] == "imsvd_jax"
  assert "license" not in head
  assert "model-index" not in head
  assert text.split("---\n")[2].startswith("\n# b.npz\n")


def test_a_network_that_timm_lacks_has_its_code_in_the_card(
  tmp_path, monkeypatch
):
  small = formats.Architecture("resnet18", stem="small")
  assert hub.timm_config(small, {}, 0) is None
  export(tmp_path)
  config = tmp_path / "my net/config.json"
  assert config.exists()
  monkeypatch.setattr(hub, "timm_model", lambda _: None)
  files, note = export(tmp_path)
  assert not config.exists()
  assert len(files) == 2
  assert "timm cannot build resnet18" in note
  head, body = card_of(tmp_path)
  assert head["library_name"] == "imsvd_jax"
  assert 'load_file("model.safetensors")' in body


def test_a_classifier_is_in_the_config(tmp_path):
  head = {"kernel": np.ones((512, 7), "f4"), "bias": np.zeros(7, "f4")}
  export(tmp_path, classifier=head)
  config = json.loads((tmp_path / "my net/config.json").read_text())
  assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 7


def test_other_peoples_files_are_not_replaced(tmp_path):
  (tmp_path / "my net").mkdir()
  (tmp_path / "my net/README.md").write_text("mine")
  with pytest.raises(UserError, match=r"has other files, such as README\.md"):
    export(tmp_path)
  (tmp_path / "my net/README.md").unlink()
  (tmp_path / "my net/.gitattributes").write_text("")
  export(tmp_path)
  export(tmp_path)  # An earlier export is replaced.
  with pytest.raises(UserError, match="leave out --with_projector"):
    export(tmp_path, with_projector=True)


def test_timm_resizes_as_the_run_did():
  for resize in range(8, 400):
    for crop in range(4, resize + 1, 7):
      assert math.floor(crop / hub._crop_share(crop, resize)) == resize
