"""A run trained here, exported, and loaded by programs other than this."""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import re
import textwrap
import zipfile

import jax
import numpy as np
import pytest

from configs import digits
from imsvd_jax import data, formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.hashing import checksum
from imsvd_jax.evaluation.results import Result, write_results
from imsvd_jax.formats.safetensors_files import (
  read_safetensors,
  write_safetensors,
)
from imsvd_jax.interop import model_card, stablehlo, weight_export
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.runs.weights import load_variables
from imsvd_jax.train import train_and_evaluate
from tests.formats.test_names import fake
from tests.run_command import (
  ROOT,
  check_refused,
  one_line_error,
  run_imsvd,
  run_python,
)
from tests.train_child import small_config

# Formats that hold any network and the projector.
COMPLETE = ["torchvision", "safetensors", "numpy"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A short run of the digits recipe: its backbone, its data."""
  config = digits.get_config()
  config.batch_size = 128
  config.epochs = 2.0
  config.optimizer.warmup_epochs = 0.5
  config.model.projector = (64, 32)
  config.objective.imsvd.num_bins = 8
  config.checkpoint.every_steps = 10
  config.eval.every_epochs = 0.0
  config.eval.final = False
  folder = str(tmp_path_factory.mktemp("run"))
  train_and_evaluate(config, folder)
  return folder


@pytest.fixture(scope="module")
def encoder(workdir):
  return load_encoder(workdir)


@pytest.fixture(scope="module")
def splits(encoder):
  return [data.make_source(encoder.config.data, s) for s in ("train", "eval")]


@pytest.fixture(scope="module")
def images(splits):
  return splits[1].images[:5]


def export(workdir, folder, format_name, **options):
  if format_name in ("torchvision", "timm", "detectron2"):
    pytest.importorskip("torch")
  path = folder / f"encoder.{format_name}"
  weight_export.export_encoder(workdir, format_name, str(path), **options)
  return path


def code_of(card: pathlib.Path) -> str:
  """The first block of Python in a model card."""
  return re.search(r"```python\n(.*?)```", card.read_text(), re.S)[1]


# ---- plain PyTorch ---------------------------------------------------------


def nearest_neighbours(bank, labels, queries, k=20, temperature=0.07):
  """Predictions of weighted k-NN, in NumPy alone."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosine = unit(queries) @ unit(bank).T
  predictions = []
  for row in cosine:
    nearest = np.argsort(-row)[:k]
    votes = np.zeros(10)
    np.add.at(votes, labels[nearest], np.exp(row[nearest] / temperature))
    predictions.append(votes.argmax())
  return np.array(predictions)


@pytest.mark.parametrize("format_name", ["torchvision", "safetensors"])
def test_pytorch_gives_the_same_predictions(
  format_name, workdir, encoder, splits, tmp_path
):
  torch = pytest.importorskip("torch")
  from tests.torch_resnet import torch_projector, torch_resnet

  path = export(workdir, tmp_path, format_name, with_projector=True)
  if format_name == "torchvision":
    state = torch.load(path, weights_only=True)
  else:
    load_file = pytest.importorskip("safetensors.torch").load_file
    state = load_file(path)
  model = torch.nn.Module()
  model.backbone = torch_resnet("resnet8", 24, "small")
  model.projector = torch_projector([96, 64, 32])
  model.load_state_dict(state, strict=True)
  model.eval()
  ours, theirs = [], []
  for source in splits:
    ours.append(encoder.features(source.images))
    x = (source.images.astype(np.float32) / 255 - 0.5) / 0.5
    with torch.no_grad():
      features = model.backbone(torch.from_numpy(x).permute(0, 3, 1, 2))
      embeddings = model.projector(features)
    theirs.append(features.numpy())
  for a, b in zip(ours, theirs, strict=True):
    assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
  z = encoder.embeddings(splits[1].images)
  assert np.abs(z - embeddings.numpy()).max() < 1e-5 * np.abs(z).max()
  labels = splits[0].labels
  found = nearest_neighbours(theirs[0], labels, theirs[1])
  expected = nearest_neighbours(ours[0], labels, ours[1])
  assert len(expected) == 360
  np.testing.assert_array_equal(found, expected)
  assert np.mean(expected == splits[1].labels) > 0.85


def test_a_network_torchvision_lacks_is_one_line(workdir, tmp_path):
  pytest.importorskip("torch")
  path = str(tmp_path / "encoder.pth")
  files, note = weight_export.export_encoder(workdir, "torchvision", path)
  assert files == [path, f"{path}.md"]
  assert "no ready-made resnet8 (width 0.375, small stem)" in note
  assert "\n" not in note
  code = code_of(tmp_path / "encoder.pth.md")
  assert "model.layer4 = torch.nn.Identity()" in code
  assert "float32 [B, 3, 16, 16]" in code
  _, note = weight_export.export_encoder(workdir, "numpy", path)
  assert note == ""


# ---- files that come back --------------------------------------------------


@pytest.mark.parametrize("format_name", COMPLETE)
def test_a_file_loads_as_the_run_does(
  format_name, workdir, encoder, images, tmp_path
):
  path = export(workdir, tmp_path, format_name, with_projector=True)
  loaded = load_encoder(path)
  assert loaded.step == encoder.step == 22
  assert loaded.discrete
  assert loaded.config.to_dict() == encoder.config.to_dict()
  expected = load_variables(workdir)
  own = {"params": expected.params, "batch_stats": expected.batch_stats}
  found = jax.device_get(loaded.variables)
  jax.tree.map(np.testing.assert_array_equal, found, own)
  if format_name == "numpy":  # One is enough: the program is the same.
    features, codes = loaded.features_and_codes(images)
    np.testing.assert_array_equal(features, encoder.features(images))
    np.testing.assert_array_equal(codes, encoder.codes(images))


def test_a_backbone_alone_has_features_and_says_what_it_lacks(
  workdir, encoder, images, tmp_path
):
  loaded = load_encoder(export(workdir, tmp_path, "numpy"))
  np.testing.assert_array_equal(
    loaded.features(images), encoder.features(images)
  )
  for function in (loaded.embeddings, loaded.codes, loaded.features_and_codes):
    with pytest.raises(UserError, match="backbone alone"):
      function(images)


@pytest.mark.parametrize("format_name", ["timm", "detectron2", "torchvision"])
def test_files_convert_to_networks_that_libraries_have(format_name, tmp_path):
  architecture = formats.Architecture("resnet18")
  state = fake(architecture)
  write_safetensors(tmp_path / "a", state, {})
  path = export(tmp_path / "a", tmp_path, format_name, license_name="CC0-1.0")
  imported = formats.read_file(path)
  assert imported.architecture == architecture
  kernel = imported.variables["params"]["backbone"]["conv1"]["kernel"]
  expected = state["conv1.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(kernel, expected)
  assert imported.metadata["license"] == "CC0-1.0"
  assert imported.metadata["mean"] == [0.485, 0.456, 0.406]
  card = (tmp_path / f"encoder.{format_name}.md").read_text()
  assert "CC0-1.0" in card
  assert "0.229, 0.224, 0.225" in card
  assert "no evaluation of these weights" in card
  if format_name == "detectron2":
    config = (tmp_path / "encoder.detectron2.yaml").read_text()
    assert config.rstrip() in card
    assert 'WEIGHTS: "encoder.detectron2"' in config


# ---- which weights ---------------------------------------------------------


@pytest.fixture(scope="module")
def two_steps(workdir, tmp_path_factory):
  """A run with steps 3 and 5 and a target network, each with other weights."""
  stored = load_variables(workdir)
  tree = {"params": stored.params, "batch_stats": stored.batch_stats}
  add = lambda amount: jax.tree.map(lambda x: x + np.float32(amount), tree)
  folder = str(tmp_path_factory.mktemp("steps"))
  checkpointer = Checkpointer(folder, keep_last=2, config=stored.config)
  checkpointer.save(3, {**add(3), "target": add(30)})
  checkpointer.save(5, {**add(5), "target": add(50)})
  checkpointer.close()
  return folder, stored.params["backbone"]["bn1"]["bias"]


@pytest.mark.parametrize(
  ("options", "amount", "step"),
  [
    ({}, 5, 5),
    ({"step": 3}, 3, 3),
    ({"use_target": True}, 50, 5),
    ({"step": 3, "use_target": True}, 30, 3),
  ],
)
def test_step_and_target(
  options, amount, step, two_steps, tmp_path, monkeypatch
):
  folder, bias = two_steps
  asked = []

  def measured(workdir, variables):
    asked.append(np.asarray(variables["params"]["backbone"]["bn1"]["bias"]))
    return []

  monkeypatch.setattr(model_card, "measured", measured)
  path = export(folder, tmp_path, "safetensors", **options)
  imported = formats.read_file(path)
  found = imported.variables["params"]["backbone"]["bn1"]["bias"]
  np.testing.assert_array_equal(found, bias + np.float32(amount))
  assert imported.metadata["step"] == str(step)
  target = "use_target" in options
  assert imported.metadata["weights"].startswith("EMA") == target
  (bias_asked,) = asked
  np.testing.assert_array_equal(bias_asked, found)


def test_classifier(workdir, tmp_path):
  rng = np.random.default_rng(0)
  head = {
    "kernel": rng.normal(size=(96, 10)).astype(np.float32),
    "bias": rng.normal(size=10).astype(np.float32),
  }
  np.savez(tmp_path / "head.npz", **head)
  classifier = weight_export.read_classifier(str(tmp_path / "head.npz"))
  path = export(workdir, tmp_path, "safetensors", classifier=classifier)
  state, _, _ = read_safetensors(path)
  np.testing.assert_array_equal(state["fc.weight"], head["kernel"].T)
  np.testing.assert_array_equal(state["fc.bias"], head["bias"])
  code = code_of(tmp_path / "encoder.safetensors.md")
  assert "model.fc = torch.nn.Linear(96, 10)" in code
  assert "scores = model(images)" in code
  wrong = [
    {"kernel": head["kernel"].T, "bias": head["bias"]},
    {"kernel": head["kernel"]},
    {**head, "extra": head["bias"]},
  ]
  for classifier in wrong:
    with pytest.raises(UserError, match=r"kernel \[96, K\] and bias \[K\]"):
      export(workdir, tmp_path, "safetensors", classifier=classifier)
  nan = {**head, "bias": head["bias"] * np.nan}
  with pytest.raises(UserError, match="bias holds values that are not fin"):
    export(workdir, tmp_path, "safetensors", classifier=nan)
  with pytest.raises(UserError, match="leave out --classifier"):
    export(workdir, tmp_path, "stablehlo", classifier=head)
  for name, message in {
    "encoder.safetensors": r"not a complete \.npz file of kernel",
    "none.npz": r"Cannot read .*none\.npz: No such file",
  }.items():
    with pytest.raises(UserError, match=message):
      weight_export.read_classifier(str(tmp_path / name))


# ---- StableHLO -------------------------------------------------------------

# What `pip install jax flatbuffers` brings.
ONLY_JAX = (
  "jax",
  "jaxlib",
  "numpy",
  "scipy",
  "ml_dtypes",
  "opt_einsum",
  "flatbuffers",
)


def site_of_only_jax(folder: pathlib.Path) -> pathlib.Path:
  """A folder to import from in which nothing else is installed."""
  folder.mkdir()
  for name in ONLY_JAX:
    package = pathlib.Path(importlib.util.find_spec(name).origin).parent
    (folder / name).symlink_to(package)
    libraries = package.with_name(f"{name}.libs")
    if libraries.exists():
      (folder / libraries.name).symlink_to(libraries)
  return folder


def in_fresh_process(program: str, cwd, *options: str, **env: str) -> str:
  # One device: what the program was exported on has eight.
  env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **env}
  result = run_python(*options, "-c", program, cwd=cwd, **env)
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_stablehlo_runs_where_only_jax_is(workdir, encoder, images, tmp_path):
  path = export(workdir, tmp_path, "stablehlo", with_projector=True)
  np.save(tmp_path / "images.npy", images)
  code = code_of(tmp_path / "encoder.stablehlo.md")
  load = """
import importlib.util
import numpy as np
images = np.load("images.npy")
"""
  check = """
one = encode(images[:1])
np.savez("outputs.npz", **outputs)
np.save("one.npy", one["features"])
for name in ("imsvd_jax", "flax", "orbax", "torch", "tensorflow"):
  assert importlib.util.find_spec(name) is None, name
"""
  site = site_of_only_jax(tmp_path / "site")
  # -S: without the packages that are installed here.
  program = load + code + check
  in_fresh_process(program, tmp_path, "-S", PYTHONPATH=str(site))
  with np.load(tmp_path / "outputs.npz") as outputs:
    found = dict(outputs)
  for name in ("features", "embeddings"):
    expected = getattr(encoder, name)(images)
    np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found["codes"], encoder.codes(images))
  one = np.load(tmp_path / "one.npy")
  np.testing.assert_allclose(one, found["features"][:1], rtol=1e-4, atol=1e-5)
  with zipfile.ZipFile(path) as archive:
    assert json.loads(archive.read("metadata.json"))["step"] == 22
  with pytest.raises(UserError, match=r"StableHLO program.*another format"):
    load_encoder(path)


def test_a_program_holds_the_weights_bit_for_bit(encoder):
  exported = stablehlo.export_program(encoder)
  assert exported.platforms == ("cpu", "cuda", "tpu")
  assert exported.nr_devices == 1
  shapes = [x[0].shape for x in (exported.in_avals, exported.out_avals)]
  assert str(shapes) == "[(batch, 16, 16, 3), (batch, 96)]"
  assert exported.in_avals[0].dtype == np.uint8
  content = bytes(exported.serialize())
  backbone = encoder.variables["params"]["backbone"]
  kernels = [x for x in jax.tree.leaves(backbone) if x.ndim == 4]
  assert len(kernels) == 9
  for kernel in kernels:
    assert np.asarray(kernel).tobytes() in content
  projector = encoder.variables["params"]["projector"]["dense_0"]["kernel"]
  assert np.asarray(projector).tobytes() not in content


def test_a_program_of_16_bits_gives_the_features_of_embed(tmp_path):
  """Normalized as the run does it; the file and its card say what goes in."""
  image_embeddings = pytest.importorskip("imsvd_jax.interop.image_embeddings")
  numbers = np.random.default_rng(0).integers(0, 4096, (8, 16, 16, 3))
  numbers = numbers.astype(np.uint16)
  folder = tmp_path / "images"
  folder.mkdir()
  for i, image in enumerate(numbers):
    np.save(folder / f"{i}.npy", image)
  config = small_config(
    **{
      "batch_size": 8, "epochs": 1.0, "data.name": "folder",
      "data.path": str(folder), "data.num_examples": 0,
      "data.value_range": "0,4095",
    }
  )  # fmt: skip
  workdir = str(tmp_path / "run")
  train_and_evaluate(config, workdir)
  path = export(workdir, tmp_path, "stablehlo")
  program = jax.export.deserialize(path.read_bytes())
  assert program.in_avals[0].dtype == np.float32
  levels = numbers.astype(np.float32) * (255 / 4095)
  embedded = image_embeddings.embed(workdir, str(folder)).columns["features"]
  np.testing.assert_allclose(
    program.call(levels), embedded, rtol=1e-5, atol=1e-6
  )
  # Rounded pixels give other features.
  assert np.abs(program.call(np.round(levels)) - embedded).max() > 1e-4
  says = "float32 [B, 16, 16, 3], any B: 0 to 4095 as 0 to 255, not rounded"
  with zipfile.ZipFile(path) as archive:
    metadata = json.loads(archive.read("metadata.json"))
  assert metadata["value_range"] == [0, 4095]
  assert metadata["program_input"] == says
  card = pathlib.Path(f"{path}.md").read_text()
  assert card.count(says) == 2  # In the table and the code.


# ---- what files say about themselves ---------------------------------------


def test_metadata(workdir, encoder, tmp_path):
  path = export(workdir, tmp_path, "numpy")
  metadata = formats.read_file(path).metadata
  assert metadata["step"] == 22
  assert metadata["config"] == json.loads(json.dumps(encoder.config.to_dict()))
  assert metadata["objective"] == "imsvd"
  assert metadata["hyperparameters"]["num_bins"] == 8
  assert metadata["input_size"] == 16
  assert metadata["mean"] == metadata["std"] == [0.5, 0.5, 0.5]
  assert metadata["data"] == "digits, train split"
  assert metadata["architecture"]["backbone"] == "resnet8"
  assert metadata["imsvd_jax_version"]


def weights_of(number):
  return {"params": {"kernel": np.full(3, number, np.float32)}}


def write_rows(folder: pathlib.Path):
  final = Result(
    protocol="knn/final",
    evaluator="knn",
    hyperparameters={},
    data={"name": "digits"},
    step=20,
    seed=0,
    final=0.625,
    interval=(0.6, 0.65),
    weights=checksum(weights_of(20)),
  )
  row = functools.partial(dataclasses.replace, final)
  online = row(protocol="knn/online", online=True, final=0.6)
  earlier = {"step": 10, "weights": checksum(weights_of(10))}
  linear = row(protocol="linear/imsvd", final=0.875)
  target = {"final": 0.375, "weights": checksum(weights_of(-20))}
  rows = [
    final,
    row(step=0, encoder="random init", final=0.25, weights="random"),
    online,
    dataclasses.replace(online, final=0.5, **earlier),
    linear,
    dataclasses.replace(linear, **target),
    # Of weights that were here before, at the same step.
    dataclasses.replace(linear, final=0.75, weights="former"),
    dataclasses.replace(linear, final=0.125, **earlier),
    row(protocol="knn/dino", final=None, skipped="not prepared"),
  ]
  write_results(folder / "results.json", rows)


def test_accuracies_are_those_of_the_weights(tmp_path):
  write_rows(tmp_path)

  def measured(number):
    found = model_card.measured(tmp_path, weights_of(number))
    return [(line.what, line.value) for line in found]

  assert measured(20) == [
    ("random init, knn/final", 0.25),
    ("trained, knn/final", 0.625),
    ("linear/imsvd", 0.875),
  ]
  # Where the run did not end, what it measured on its way.
  assert measured(10) == [
    ("knn/online (during training)", 0.5),
    ("linear/imsvd", 0.125),
  ]
  assert measured(11) == []
  # Training measures the trained network alone.
  assert measured(-20) == [("linear/imsvd", 0.375)]
  (line,) = model_card.measured(tmp_path, weights_of(-20))
  assert line.data == "digits"
  assert line.interval == (0.6, 0.65)
  assert model_card.measured(tmp_path / "encoder.pth", weights_of(20)) == []
  (tmp_path / "results.json").write_text("{")
  with pytest.raises(UserError, match="is not a results file"):
    measured(20)


def test_the_card_shows_accuracies_and_a_copy_keeps_them(
  two_steps, tmp_path, monkeypatch
):
  line = model_card.Measured("linear/imsvd", "digits", 0.875, (0.85, 0.9))
  monkeypatch.setattr(model_card, "measured", lambda *_: [line])
  path = export(two_steps[0], tmp_path, "numpy", license_name="MIT")
  row = "| linear/imsvd | digits | 87.50% | 85.00% to 90.00% |"
  card = (tmp_path / "encoder.numpy.md").read_text()
  assert row in card
  assert "| License | MIT |" in card
  assert 'load_encoder("encoder.numpy")' in card
  monkeypatch.setattr(model_card, "measured", lambda *_: [])
  export(path, tmp_path, "safetensors")
  card = (tmp_path / "encoder.safetensors.md").read_text()
  assert row in card
  assert "| License | MIT |" in card


# ---- mistakes --------------------------------------------------------------


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"format_name": "torchvison"}, r"'torchvison'.*Did you mean"),
    ({"format_name": "timm"}, "timm has no resnet8"),
    ({"format_name": "detectron2"}, "detectron2 has no resnet8"),
    ({"output": "none/encoder"}, r"folder .*none does not exist"),
    ({"output": "."}, "is a folder"),
    ({"output": "/dev/null"}, "/dev/null is not a regular file"),
    ({"output": "x" * 300}, "Cannot write .*: File name too long"),
    ({"step": 77}, r"no step 77; it holds \[10, 20, 22\]"),
    ({"use_target": True}, "no EMA target"),
    ({"workdir": "nowhere"}, "nowhere does not exist"),
  ],
)
def test_mistakes_are_one_line(options, message, workdir, tmp_path):
  arguments = {"workdir": workdir, "format_name": "numpy", "output": "file"}
  arguments |= options
  arguments["output"] = str(tmp_path / arguments["output"])
  with one_line_error(message):
    weight_export.export_encoder(**arguments)
  assert list(tmp_path.iterdir()) == []


def test_a_card_that_cannot_be_written_is_one_line(two_steps, tmp_path):
  (tmp_path / "encoder.numpy.md").mkdir()
  with pytest.raises(UserError, match=r"Cannot write .*encoder\.numpy\.md: "):
    export(two_steps[0], tmp_path, "numpy")
  assert not list(tmp_path.glob("*.unfinished"))


def test_files_without_a_recipe(tmp_path):
  path = tmp_path / "cifar.safetensors"
  state = fake(formats.Architecture("resnet8", 1 / 16, "cifar"))
  write_safetensors(path, state, {})
  with pytest.raises(UserError, match=r"does not say how.*give config="):
    load_encoder(path)
  config = digits.get_config()
  assert load_encoder(path, config=config).config.data.crop == 16
  config.data.channels = 1
  with pytest.raises(UserError, match=r"3 channels, the config for 1"):
    load_encoder(path, config=config)
  with pytest.raises(UserError, match="is a file and holds one set"):
    load_encoder(path, step=3)
  path.write_text("<html>")
  with pytest.raises(UserError, match="is a web page"):
    load_encoder(path)


def test_the_command_needs_no_tensorflow(workdir, tmp_path):
  """The command itself, as typed, with TensorFlow and clu blocked."""
  output = tmp_path / "encoder.safetensors"
  program = f"""
    import runpy, sys
    for name in ("tensorflow", "tensorflow_datasets", "clu", "torch"):
      sys.modules[name] = None
    sys.path.insert(0, {str(ROOT)!r})
    sys.argv = ["imsvd", "export", "--workdir={workdir}",
                "--format=safetensors", "--output={output}",
                "--with_projector"]
    runpy.run_module("imsvd_jax", run_name="__main__")
  """
  stdout = in_fresh_process(textwrap.dedent(program), tmp_path)
  assert stdout == f"Wrote {output}, {output}.md\n"
  assert formats.read_file(output).architecture.projector == (64, 32)


def test_the_command_refuses_in_one_line(tmp_path):
  result = run_imsvd(
    "export", "--workdir=x", "--format=onxx", f"--output={tmp_path}/x"
  )
  check_refused(result, "error: Unknown format 'onxx'.")


def test_paths_of_this_machine_are_not_exported(encoder):
  private = copy.copy(encoder)
  private.config = encoder.config.copy_and_resolve_references()
  private.config.data.update(name="folder", path="/home/me/photos/")
  private.config.init_from = "/home/me/runs/first"
  found = weight_export.describe(private, [])
  assert "/home/me" not in json.dumps(found)
  assert found["data"] == "folder photos, train split"
  assert private.config.data.path == "/home/me/photos/"
  found = weight_export.describe(private, [], absolute_paths=True)
  assert found["data"] == "folder /home/me/photos/, train split"
  assert found["config"]["init_from"] == "/home/me/runs/first"


def test_a_pipe_is_no_classifier(tmp_path):
  os.mkfifo(tmp_path / "head.npz")
  with one_line_error("No such file, or not a regular one"):
    weight_export.read_classifier(str(tmp_path / "head.npz"))
