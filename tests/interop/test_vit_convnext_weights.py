"""ViTs and ConvNeXts: weights out, in, and as the start of a run; ONNX."""

import dataclasses
import pathlib
import re

import jax
import numpy as np
import pytest

from configs import digits
from imsvd_jax import data, formats, load_encoder
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import attribution
from imsvd_jax.explain.run_subject import subject_of
from imsvd_jax.formats.other_names import to_timm, to_torchvision_names
from imsvd_jax.formats.safetensors_files import write_safetensors
from imsvd_jax.interop import weight_export
from imsvd_jax.interop.weight_import import import_weights
from imsvd_jax.runs.weights import load_variables
from imsvd_jax.train import train_and_evaluate
from tests.formats.test_names import Architecture, assert_same, variables_of

VIT = Architecture("vit_micro", 1 / 3, patch_size=4, positions=65)
CONVNEXT = Architecture("convnext_micro", 1 / 12, patch_size=1)
OPTIONS = Architecture(
  "vit_micro",
  1 / 3,
  patch_size=4,
  channels=1,
  pool="mean",
  registers=2,
  layer_scale=1e-5,
)


def recipe(**changes):
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      "batch_size": 128,
      "epochs": 0.2,
      "optimizer.name": "adamw",
      "optimizer.base_learning_rate": 1e-3,
      "optimizer.warmup_epochs": 0.0,
      "model.backbone": "vit_micro",
      "model.width_multiplier": 1 / 3,
      "model.drop_path": 0.1,
      "model.projector": (32,),  # Without a hidden layer: no BatchNorm at all.
      "objective.imsvd.num_bins": 8,
      "eval.every_epochs": 0.0,
      "eval.final": False,
      **changes,
    }
  )
  return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("run"))
  train_and_evaluate(recipe(), folder)
  return folder


@pytest.fixture(scope="module")
def encoder(workdir):
  return load_encoder(workdir)


@pytest.fixture(scope="module")
def images(encoder):
  return data.make_source(encoder.config.data, "train").images


def backbone_state(architecture, seed=0):
  """A backbone's state dict with timm's names."""
  whole = dataclasses.replace(architecture, projector=(4,))
  variables = variables_of(whole, seed)
  backbone = {"params": {"backbone": variables["params"]["backbone"]}}
  state = formats.to_torchvision({**backbone, "batch_stats": {}})
  return state, {**backbone, "batch_stats": {}}


def test_a_run_without_batch_norm_is_exported_and_read(
  workdir, encoder, images, tmp_path
):
  path = str(tmp_path / "encoder.safetensors")
  files, note = weight_export.export_encoder(
    workdir, "safetensors", path, with_projector=True
  )
  assert files == [path, f"{path}.md"]
  assert note == ""
  again = load_encoder(path)
  np.testing.assert_array_equal(
    again.embeddings(images[:9]), encoder.embeddings(images[:9])
  )
  assert again.feature_maps(images[:2]).shape == (2, 4, 4, 32)
  copied = tmp_path / "copy"
  notes = import_weights(path, str(copied))
  assert "vit_micro (width 0.333333, patches of 4)" in notes[0]
  stored, original = load_variables(copied), load_variables(workdir)
  assert_same(stored.params, original.params)


def test_a_run_starts_from_a_file_with_a_new_head(workdir, tmp_path, capsys):
  path = str(tmp_path / "vit.safetensors")
  weight_export.export_encoder(workdir, "safetensors", path)
  changes = {
    "init_from": path,
    "epochs": 0.1,
    "optimizer.base_learning_rate": 0.0,
    "optimizer.weight_decay": 0.0,
    "model.projector": (24, 16),
    "data.resize": 24,
    "data.crop": 24,
    "views.view1.size": 24,
    "views.view2.size": 24,
  }
  state = train_and_evaluate(recipe(**changes), str(tmp_path / "run"))
  said = "".join(capsys.readouterr())
  assert "left as initialized: params/projector/dense_0/kernel" in said
  assert "params/backbone" not in said  # Positions are interpolated.
  old = load_variables(workdir).params["backbone"]
  table = state.params["backbone"].pop("pos_embed")
  assert table.shape == (1, 37, 32)
  np.testing.assert_array_equal(table[:, 0], old.pop("pos_embed")[:, 0])
  jax.tree.map(np.testing.assert_array_equal, state.params["backbone"], old)


def test_attribution_goes_through_the_class_token(encoder, images):
  subject = subject_of(encoder, "run")
  variables, bins = np.array([0, 1, 3]), np.array([2, 0, 7])
  chosen = images[:3]
  cam = attribution.make_grad_cam(subject)(
    subject.variables, chosen, np.arange(3), variables, bins
  )
  assert cam.shape == (3, 4, 4)
  assert np.isfinite(cam).all()
  maps = attribution.make_integrated_gradients(subject, steps=32)(
    subject.variables, chosen, np.arange(3), variables, bins
  )

  def score(x):
    log_q = np.log(encoder.probabilities(x))
    return attribution.log_odds(log_q, variables, bins)

  flat = chosen.mean((1, 2), keepdims=True).round().astype(np.uint8)
  difference = score(chosen) - score(np.broadcast_to(flat, chosen.shape))
  np.testing.assert_allclose(
    np.asarray(maps).sum((1, 2)), difference, rtol=0.1, atol=0.02
  )


def test_onnx_computes_the_same(workdir, encoder, images, tmp_path):
  pytest.importorskip("jax2onnx")
  runtime = pytest.importorskip("onnxruntime")
  path = str(tmp_path / "encoder.onnx")
  weight_export.export_encoder(workdir, "onnx", path, with_projector=True)
  session = runtime.InferenceSession(path)
  names = [output.name for output in session.get_outputs()]
  assert names == ["features", "embeddings", "codes"]
  for chosen in (images[:1000], images[:1]):
    features, _, codes = session.run(None, {"images": chosen})
    np.testing.assert_allclose(features, encoder.features(chosen), atol=1e-4)
    np.testing.assert_array_equal(codes, encoder.codes(chosen))
  card = pathlib.Path(f"{path}.md").read_text()
  assert 'session.run(None, {"images": images})' in card
  with pytest.raises(UserError, match="ONNX program"):
    load_encoder(path)


@pytest.mark.proof
@pytest.mark.parametrize("architecture", [VIT, CONVNEXT, OPTIONS])
@pytest.mark.parametrize(
  ("format_name", "projector"),
  [("timm", False), ("safetensors", True), ("torchvision", True)],
)
def test_the_cards_code_loads_the_file(
  architecture, format_name, projector, tmp_path, monkeypatch
):
  nets = pytest.importorskip("tests.torch_resnet")
  nets.import_or_skip("timm")
  monkeypatch.chdir(tmp_path)
  whole = variables_of(dataclasses.replace(architecture, projector=(8, 4)))
  inferred = formats.architecture_of(whole)
  name = f"encoder.{'safetensors' if format_name == 'safetensors' else 'pth'}"
  options = {"format_name": format_name, "projector": projector, "metadata": {}}
  if format_name == "torchvision" and architecture is OPTIONS:
    with pytest.raises(UserError, match="torchvision has no vit_micro"):
      formats.write_file(name, whole, **options)
    return
  formats.write_file(name, whole, **options)
  content = formats.Content(name, inferred, projector=projector)
  loaded = {}
  exec(formats.FORMATS[format_name].loading_code(content), loaded)
  channels = architecture.channels
  x = np.random.default_rng(0).normal(size=(2, 32, 32, channels))
  x = x.astype(np.float32)
  with nets.torch.no_grad():
    found = loaded["model"](nets.torch.from_numpy(np.moveaxis(x, -1, 1).copy()))
  variables = {"params": whole["params"]["backbone"]}
  expected = inferred.network().apply(variables, x, False)
  found = (found[0] if projector else found).numpy()
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# ---- names -----------------------------------------------------------------


@pytest.mark.parametrize("architecture", [VIT, CONVNEXT, OPTIONS])
def test_round_trips_are_bit_identical(architecture, tmp_path):
  _, variables = backbone_state(architecture)
  for name in ("safetensors", "numpy"):
    path = tmp_path / name
    formats.write_file(path, variables, format_name=name, metadata={})
    assert_same(formats.read_file(path).variables, variables)


def write(path, state):
  write_safetensors(str(path), state, {})
  return path


def wrapped(state, prefix):
  return {prefix + key: value for key, value in state.items()}


HEAD = {"weight": np.ones((3, 3), np.float32)}
TOKEN = {"mask_token": np.ones((1, 1, 32), np.float32)}


def mae(state):
  decoder = wrapped(HEAD, "decoder_embed.") | wrapped(HEAD, "decoder_blocks.0.")
  return {**state, **decoder, **TOKEN}


def dinov2_in_training(state):
  chunks = {
    re.sub(r"blocks\.(\d)", r"blocks.0.\1", key): value
    for key, value in {**state, **TOKEN}.items()
  }
  heads = wrapped(HEAD, "dino_head.mlp.0.") | wrapped(HEAD, "ibot_head.mlp.0.")
  return wrapped(chunks, "backbone.") | heads


def moco(state):
  whole = state | wrapped(HEAD, "head.0.")
  return (
    wrapped(whole, "module.base_encoder.")
    | wrapped(state, "module.momentum_encoder.")
    | wrapped(HEAD, "module.predictor.0.")
  )


LAYOUTS = {
  "DINO": (
    lambda s: wrapped(s, "module.backbone.") | wrapped(HEAD, "head.mlp.0."),
    "head.*",
  ),
  "MAE": (mae, "decoder_embed.* decoder_blocks.* mask_token"),
  "DINOv2": (lambda s: {**s, **TOKEN}, "mask_token"),
  "DINOv2 in training": (
    dinov2_in_training,
    "backbone.mask_token dino_head.* ibot_head.*",
  ),
  "MoCo v3": (moco, "base_encoder.head.* momentum_encoder.* predictor.*"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_other_projects(name, tmp_path):
  state, variables = backbone_state(VIT)
  make, left_out = LAYOUTS[name]
  imported = formats.read_file(write(tmp_path / "x", make(state)))
  assert imported.project == name.removesuffix(" in training")
  assert set(imported.ignored) == set(left_out.split())
  assert_same(imported.variables, variables)


def test_dinov2s_registers_are_read_as_timm_does(tmp_path):
  state, _ = backbone_state(VIT)
  registers = np.ones((1, 4, 32), np.float32)
  file = {**state, **TOKEN, "register_tokens": registers}
  imported = formats.read_file(write(tmp_path / "x", file))
  assert imported.architecture.registers == 4
  backbone = imported.variables["params"]["backbone"]
  np.testing.assert_array_equal(
    backbone["cls_token"], state["cls_token"] + state["pos_embed"][:, :1]
  )
  np.testing.assert_array_equal(
    backbone["pos_embed"], state["pos_embed"][:, 1:]
  )


@pytest.mark.parametrize("architecture", [VIT, CONVNEXT])
def test_torchvisions_names(architecture, tmp_path):
  state, variables = backbone_state(architecture)
  theirs = {to_torchvision_names(key): value for key, value in state.items()}
  assert len(theirs) == len(state)
  assert not theirs.keys() & state.keys()
  assert to_timm(theirs) == dict(zip(theirs, state, strict=True))
  classifier = {"heads.head": VIT, "classifier.2": CONVNEXT}
  (name,) = [key for key, value in classifier.items() if value is architecture]
  theirs[f"{name}.weight"] = np.ones((5, 32 if "heads" in name else 64), "f4")
  theirs[f"{name}.bias"] = np.ones(5, "f4")
  imported = formats.read_file(write(tmp_path / "x", theirs))
  assert imported.classifier["bias"].shape == (5,)
  assert_same(imported.variables, variables)


def test_names_of_the_first_convnext(tmp_path):
  state, variables = backbone_state(CONVNEXT)
  rules = {
    r"^stem\.": "downsample_layers.0.",
    r"^stages\.(\d)\.downsample": r"downsample_layers.\1",
    r"\.blocks\.": ".",
    r"conv_dw": "dwconv",
    r"mlp\.fc": "pwconv",
    r"^head\.": "",
  }
  theirs = {}
  for key, value in state.items():
    for pattern, new in rules.items():
      key = re.sub(pattern, new, key)
    theirs[key] = value
  imported = formats.read_file(write(tmp_path / "x", theirs))
  assert_same(imported.variables, variables)


def test_what_cannot_be_read(tmp_path):
  state, _ = backbone_state(VIT)
  rest = {k: v for k, v in state.items() if k != "blocks.2.mlp.fc1.bias"}
  for changed, message in (
    (rest, r"missing blocks\.2\.mlp\.fc1\.bias"),
    ({**state, "dist_token": np.ones((1, 1, 32), "f4")}, "unexpected dist_tok"),
    (
      {**state, "pos_embed": np.ones((1, 23, 32), "f4")},
      "pos_embed has 23 positions",
    ),
    ({**state, "blocks.4.norm1.bias": np.ones(32, "f4")}, "5 blocks, which"),
  ):
    with pytest.raises(UserError, match=message):
      formats.read_file(write(tmp_path / "x", changed))
  small = Architecture("vit_small", patch_size=16, positions=5)
  shapes = {
    "blocks.11.norm1.bias": (384,),
    "patch_embed.proj.weight": (384, 3, 16, 16),
    "pos_embed": (1, 5, 384),
  }
  file = moco({key: np.ones(shape, "f4") for key, shape in shapes.items()})
  assert small.network().heads == 6
  with pytest.raises(UserError, match="12 heads"):
    formats.read_file(write(tmp_path / "x", file))
