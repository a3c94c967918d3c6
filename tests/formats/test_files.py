"""Files: bit-exact round trips, official layouts, and files that are wrong."""

import dataclasses
import json
import os
import pickle
import resource
import sys
import textwrap
import zipfile

import numpy as np
import pytest

from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.architecture import entries
from imsvd_jax.formats.safetensors_files import write_safetensors
from tests.formats.test_names import (
  TINY,
  assert_same,
  backbone_of,
  fake,
  variables_of,
)
from tests.run_command import one_line_error, run_python

Architecture = formats.Architecture
METADATA = {
  "step": 120,
  "config": {"objective": {"name": "imsvd", "num_bins": 16}},
  "mean": [0.485, 0.456, 0.406],
  "license": "CC-BY-4.0",
}


@pytest.fixture
def torch():
  """PyTorch; the tests that use it are skipped where there is none."""
  return pytest.importorskip("torch")


@pytest.fixture
def torch_nets(torch):
  """The independent networks in PyTorch."""
  from tests import torch_resnet

  return torch_resnet


@pytest.fixture
def format_name(request):
  """A format; skipped where what it needs is not installed."""
  if request.param not in ("safetensors", "numpy"):
    pytest.importorskip("torch")
  return request.param


def tensors(content):
  """Copies nested arrays as tensors of torch."""
  torch = pytest.importorskip("torch")
  if isinstance(content, dict):
    return {key: tensors(value) for key, value in content.items()}
  if isinstance(content, list):
    return [tensors(value) for value in content]
  if isinstance(content, np.ndarray):
    return torch.from_numpy(np.array(content))
  return content


@pytest.fixture(scope="module")
def variables():
  return variables_of(TINY)


@pytest.fixture(scope="module")
def standard():
  """A network that every format can hold, with odd values of float32."""
  architecture = Architecture("resnet18", projector=(8,))
  tree = variables_of(architecture)
  kernel = tree["params"]["backbone"]["conv1"]["kernel"]
  kernel[0, 0, 0, :4] = [0.0, -0.0, 1e-42, np.finfo(np.float32).max]
  return tree


def write(path, variables, format_name="numpy", metadata=METADATA, **options):
  return formats.write_file(
    path, variables, format_name=format_name, metadata=metadata, **options
  )


# ---- round trips -----------------------------------------------------------


@pytest.mark.parametrize("format_name", formats.FORMATS, indirect=True)
def test_round_trip_is_bit_exact(format_name, standard, tmp_path):
  path = tmp_path / "encoder.bin"
  rng = np.random.default_rng(0)
  classifier = None
  if format_name != "detectron2":
    classifier = {
      "kernel": rng.normal(size=(512, 3)).astype(np.float32),
      "bias": rng.normal(size=3).astype(np.float32),
    }
  written = write(path, standard, format_name, classifier=classifier)
  assert [p.name for p in tmp_path.iterdir()] == ["encoder.bin"]
  imported = formats.read_file(path)
  assert_same(imported.variables, backbone_of(standard))
  assert written.backbone == imported.architecture.backbone == "resnet18"
  assert imported.metadata["config"] == METADATA["config"]
  assert imported.metadata["mean"] == METADATA["mean"]
  assert imported.metadata["license"] == "CC-BY-4.0"
  assert int(imported.metadata["step"]) == 120
  assert imported.metadata["format_name"] == format_name
  assert imported.metadata["architecture"]["backbone"] == "resnet18"
  assert imported.metadata["architecture"]["projector"] == []
  # Zeros of both signs are distinct in the file's bits.
  kernel = imported.variables["params"]["backbone"]["conv1"]["kernel"]
  assert np.signbit(kernel[0, 0, 0, :2]).tolist() == [False, True]
  if classifier:
    assert_same(imported.classifier, classifier)


@pytest.mark.parametrize("format_name", formats.FORMATS, indirect=True)
def test_projector_round_trips_or_is_refused(format_name, variables, tmp_path):
  path = tmp_path / "encoder.bin"
  if format_name in ("timm", "detectron2"):
    with pytest.raises(UserError, match="a backbone alone"):
      write(path, variables, format_name, projector=True)
    assert list(tmp_path.iterdir()) == []
    return
  write(path, variables, format_name, projector=True)
  imported = formats.read_file(path)
  assert_same(imported.variables, variables)
  assert imported.architecture == TINY


@pytest.mark.parametrize("shown_by", ["projector", "classifier", "metadata"])
@pytest.mark.parametrize(
  "format_name", ["torchvision", "safetensors", "numpy"], indirect=True
)
def test_a_pooling_of_parts_is_found_again(format_name, shown_by, tmp_path):
  """A backbone's own weights are those of any pooling."""
  architecture = Architecture("resnet8", 1 / 16, "small", pool_grid=2)
  whole = dataclasses.replace(architecture, projector=(8, 4))
  path, tree = tmp_path / "encoder.bin", variables_of(whole)
  if shown_by == "classifier":
    kernel, bias = (np.ones(s, np.float32) for s in [(4 * 16, 3), 3])
    options = {"classifier": {"kernel": kernel, "bias": bias}}
  else:
    options = {"projector": shown_by == "projector"}
  write(path, tree, format_name, **options)
  found = formats.read_file(path)
  expected = whole if shown_by == "projector" else architecture
  assert found.architecture == expected
  # A file that is read and written again, now without a projector.
  number = found.architecture.network().num_features
  again = {"num_features": number, **METADATA}
  write(path, backbone_of(found.variables), format_name, again)
  assert formats.read_file(path).architecture == architecture


def test_no_pooling_that_a_stranger_made_up(tmp_path):
  architecture = Architecture("resnet8", 1 / 16, "small")
  whole = dataclasses.replace(architecture, projector=(8,))
  tree, path = backbone_of(variables_of(whole)), tmp_path / "encoder.npz"
  for number in (17, 0, -64, "64", None, True, 16 * 81, 1e9, [64]):
    write(path, tree, metadata={"num_features": number})
    assert formats.read_file(path).architecture == architecture
  with np.load(path) as content:
    arrays = dict(content)
  for parts in (0, -2, 9, "2", 2.5, None, [2], 10**6):
    described = {"architecture": {"pool_grid": parts}}
    arrays["metadata"] = np.array(json.dumps(described))
    np.savez(path, **arrays)
    assert formats.read_file(path).architecture == architecture


@pytest.mark.parametrize(
  "format_name", ["torchvision", "safetensors", "numpy"], indirect=True
)
def test_three_stages_round_trip(format_name, tmp_path):
  """The backbone of the digits recipe, which torchvision does not have."""
  architecture = Architecture("resnet8", 0.375, "small", projector=(8, 4))
  tree = variables_of(architecture)
  path = tmp_path / "encoder.bin"
  write(path, tree, format_name, projector=True)
  imported = formats.read_file(path)
  assert imported.architecture == architecture
  assert imported.metadata["architecture"]["width_multiplier"] == 0.375
  assert_same(imported.variables, tree)


def test_torch_loads_strictly(torch, torch_nets, tmp_path):
  """Torch -> ours -> file -> torch gives the same outputs."""

  def network():
    module = torch.nn.Module()
    module.backbone = torch_nets.torch_resnet("resnet10", 8, "small")
    module.projector = torch_nets.torch_projector([64, 24, 12])
    return module

  reference = torch_nets.randomize(network())
  imported = formats.from_torchvision(torch_nets.state_of(reference))
  path = tmp_path / "encoder.pth"
  write(path, imported.variables, "torchvision", {"step": 7}, projector=True)
  loaded = torch.load(path, weights_only=True)
  assert loaded.metadata["step"] == 7
  assert set(loaded) == set(reference.state_dict())
  again = network()
  again.load_state_dict(loaded, strict=True)
  for key, value in reference.state_dict().items():
    assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize(
  "name", ["resnet8", "resnet18", "resnet34", "resnet50"]
)
def test_names_and_shapes_are_torchs(name, torch_nets):
  module = torch_nets.torch_resnet(name, 8)
  expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
  table = entries(Architecture(name, 8 / 64))
  found = {e.key.removeprefix("backbone."): e.shape for e in table}
  assert found == expected


def test_safetensors_writes_views_as_they_read(tmp_path):
  value = np.arange(6, dtype=np.float32).reshape(2, 3).T
  path = tmp_path / "x.safetensors"
  write_safetensors(path, {"x": value}, {})
  from safetensors.numpy import load_file

  np.testing.assert_array_equal(load_file(path)["x"], value)


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_precisions_become_float32(
  kind, dtype, torch, variables, tmp_path
):
  state = tensors(formats.to_torchvision(variables))
  state = {
    key: v.to(getattr(torch, dtype)) if v.is_floating_point() else v
    for key, v in state.items()
  }
  path = tmp_path / "encoder"
  if kind == "torch":
    torch.save(state, path)
  else:
    pytest.importorskip("safetensors.torch").save_file(state, path)
  kernel = formats.read_file(path).variables["params"]["backbone"]["conv1"]
  expected = state["conv1.weight"].float().numpy().transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(kernel["kernel"], expected)
  assert kernel["kernel"].dtype == np.float32


def test_formats_without_torch(tmp_path):
  code = f"""
    import sys
    sys.modules["torch"] = None
    from imsvd_jax import formats
    from imsvd_jax.base.errors import UserError
    from tests.formats.test_names import fake
    architecture = formats.Architecture("resnet10", 1 / 16)
    variables = formats.from_torchvision(fake(architecture)).variables
    for name in ("safetensors", "numpy"):
      path = {str(tmp_path)!r} + "/" + name
      formats.write_file(path, variables, format_name=name, metadata={{}})
      assert formats.read_file(path).architecture == architecture
    try:
      formats.write_file(path, variables, format_name="torchvision",
                         metadata={{}})
    except UserError as error:
      assert "need PyTorch" in str(error)
    else:
      raise SystemExit("no error")
    assert "tensorflow" not in sys.modules
  """
  result = run_python("-c", textwrap.dedent(code))
  assert result.returncode == 0, result.stderr


# ---- files that the official code writes -----------------------------------


def save(content, path):
  pytest.importorskip("torch").save(tensors(content), path)


def exclude_bias_and_norm(p):
  raise AssertionError("code of a checkpoint was executed")


@pytest.fixture
def lars_state(torch, monkeypatch):
  """What the official optimizer's state_dict() holds: functions too."""
  function = exclude_bias_and_norm
  monkeypatch.setattr(function, "__module__", "__main__")
  main = sys.modules["__main__"]
  monkeypatch.setattr(main, function.__name__, function, raising=False)
  group = {
    "lr": 0.1,
    "weight_decay_filter": function,
    "lars_adaptation_filter": function,
    "params": [0],
  }
  return {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [group]}


def test_official_imsvd_checkpoint(lars_state, tmp_path):
  architecture = Architecture("resnet50", projector=(64, 48))
  state = fake(architecture, "module.")
  assert "module.backbone.layer4.2.bn3.running_var" in state
  assert "module.projector.3.weight" in state
  path = tmp_path / "model.pth"
  save({"epoch": 100, "model": state, "optimizer": lars_state}, path)
  imported = formats.read_file(path)
  assert imported.architecture == architecture
  assert imported.ignored == ("epoch", "optimizer")
  block = imported.variables["batch_stats"]["backbone"]["layer1_0"]
  np.testing.assert_array_equal(
    block["downsample_bn"]["var"],
    state["module.backbone.layer1.0.downsample.1.running_var"],
  )


def test_official_imsvd_cifar_checkpoint(tmp_path):
  """Their CIFAR network says `shortcut` where torchvision says `downsample`."""
  architecture = Architecture("resnet18", stem="cifar", projector=(16, 16, 16))
  rename = lambda key: key.replace("downsample", "shortcut")
  state = fake(architecture, "module.", rename)
  assert "module.backbone.layer2.0.shortcut.0.weight" in state
  path = tmp_path / "model.pth"
  save({"epoch": 800, "model": state, "optimizer": {}}, path)
  assert formats.read_file(path).architecture == architecture
  key = "module.backbone.layer2.0.shortcut.1.bias"
  del state[key]
  save({"epoch": 800, "model": state}, path)
  with pytest.raises(UserError, match=rf"missing {key}\."):
    formats.read_file(path)


def test_files_of_old_torch(torch, variables, tmp_path):
  path = tmp_path / "old.pth"
  state = {
    key: value
    for key, value in formats.to_torchvision(variables).items()
    if not key.endswith("num_batches_tracked")
  }
  torch.save(tensors(state), path, _use_new_zipfile_serialization=False)
  imported = formats.read_file(path)
  assert_same(imported.variables, backbone_of(variables))
  assert imported.ignored == ()


# ---- wrong files -----------------------------------------------------------


class Attack:
  """Pickles to a call of os.system that would leave a trace."""

  def __init__(self, trace):
    self.trace = trace

  def __reduce__(self):
    return os.system, (f"touch {self.trace}",)


def refuse(path, message):
  with one_line_error(message) as error:
    formats.read_file(path)
  assert os.fspath(path) in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(zipped, protocol, torch, tmp_path):
  trace, path = tmp_path / "trace", tmp_path / "model.pth"
  if zipped:
    torch.save({"a": Attack(trace)}, path, pickle_protocol=protocol)
  else:
    path.write_bytes(pickle.dumps(Attack(trace), protocol=protocol))
  refuse(path, r"system|not a torch file")
  assert not trace.exists()


def test_whole_modules_are_refused(torch, tmp_path):
  path = tmp_path / "model.pth"
  torch.save(torch.nn.Linear(2, 2), path)
  refuse(path, r"refers to torch\.nn.*Save model\.state_dict\(\)")


@pytest.mark.usefixtures("torch")
def test_torchscript_is_refused(tmp_path):
  path = tmp_path / "model.pt"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("m/constants.pkl", b"\x80\x02).")
    archive.writestr("m/data.pkl", b"\x80\x02}q\x00.")
    archive.writestr("m/version", b"3\n")
  refuse(path, "torch file|holds nothing")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"epoch,loss\n1,2\n", "starts with b'epoch"),
    (b"\x93NUMPY" + bytes(100), "starts with"),
    (b"PK\x03\x04" + bytes(100), "not a complete torch file"),
    (b"\x10\0\0\0\0\0\0\0{" + bytes(4), "not a complete safetensors"),
    (b"\x80\x02" + bytes(40), "torch file"),
  ],
)
def test_other_files_are_refused(content, message, tmp_path):
  if "torch file" in message:  # Torch has to be asked.
    pytest.importorskip("torch")
  path = tmp_path / "weights"
  path.write_bytes(content)
  refuse(path, message)


@pytest.mark.parametrize("format_name", formats.FORMATS, indirect=True)
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_truncated_files_are_refused(format_name, part, standard, tmp_path):
  path = tmp_path / f"encoder.{format_name}.npz"
  write(path, standard, format_name)
  content = path.read_bytes()
  path.write_bytes(content[: int(part * len(content))])
  refuse(path, "not a complete")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ([np.ones(2)], "holds a list"),
    (np.ones(2), "holds a Tensor"),
    ({}, "holds nothing"),
    ({"epoch": 3, "lr": 0.1}, "holds entries 'epoch', 'lr'"),
    ({1: np.ones(2)}, "holds entries 1"),
    ({"blocks.0.attn.qkv.weight": np.ones(2)}, "not a ResNet's"),
    ({"model": {"fc.weight": np.ones((2, 2))}}, "fc.bias"),
  ],
)
def test_torch_files_of_other_things(content, message, tmp_path):
  path = tmp_path / "model.pth"
  save(content, path)
  refuse(path, message)


def test_numpy_files_of_other_things(variables, tmp_path):
  path = tmp_path / "encoder.npz"
  np.savez(path, a=np.array([object()], dtype=object))
  refuse(path, "plain arrays")
  write(path, variables)
  with np.load(path) as file:
    arrays = dict(file)
  arrays["batch_stats/backbone/bn1/var"] = np.ones(9, np.float32)
  del arrays["params/backbone/bn1/bias"]
  np.savez(path, **arrays)
  refuse(path, r"missing params/backbone/bn1/bias; mis.*bn1/var is \[9\]")


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"a": np.ones(3)}, "not a ResNet's"),
    ({"params/backbone/conv1/kernel": np.ones((5, 5, 3, 4))}, "not a ResNet"),
    ({"params/cls": np.ones(3)}, "not a ResNet's"),  # big_vision's ViTs.
    ({"params": np.ones(3)}, r"params is an array; expected .* params/\.\.\."),
    ({"a": np.ones(3), "a/b": np.ones(3)}, "a is an array; expected"),
    ({"a/b": np.ones(3), "a": np.ones(3)}, "a is an array; expected"),
    ({"metadata": np.array("[1]")}, "metadata is a list in JSON"),
  ],
)
def test_numpy_files_with_other_names(arrays, message, tmp_path):
  np.savez(tmp_path / "x.npz", **arrays)
  refuse(tmp_path / "x.npz", message)


def test_what_others_call_metadata_is_left_out(variables, tmp_path):
  state = formats.to_torchvision(variables)
  save({"model": state, "metadata": "hello"}, tmp_path / "x.pth")
  imported = formats.read_file(tmp_path / "x.pth")
  assert imported.metadata == {}
  assert imported.ignored == ("metadata",)


def test_no_file(tmp_path):
  refuse(tmp_path / "none.pth", "does not exist")
  refuse(tmp_path, "is a folder")


def test_nowhere_to_write(variables, tmp_path):
  with pytest.raises(UserError, match=r"folder .* does not exist"):
    write(tmp_path / "a" / "b.npz", variables)
  with pytest.raises(UserError, match="is a folder"):
    write(tmp_path, variables)
  with pytest.raises(UserError, match=r"'nunpy'.*Did you mean 'numpy'"):
    write(tmp_path / "x", variables, "nunpy")
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="pipe is not a regular file"):
    write(tmp_path / "pipe", variables)


@pytest.mark.parametrize("format_name", formats.FORMATS, indirect=True)
def test_a_disk_that_fills_up_is_one_line(format_name, standard, tmp_path):
  path = tmp_path / "encoder"
  path.write_text("before")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
  try:
    with one_line_error(r"Cannot write .*: .*large"):
      write(path, standard, format_name)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [p.name for p in tmp_path.iterdir()] == ["encoder"]
  assert path.read_text() == "before"


# ---- code that loads a file elsewhere --------------------------------------

CASES = [
  (Architecture("resnet18"), 0),
  (Architecture("resnet50"), 5),
  (Architecture("resnet10"), 0),
  (Architecture("resnet8"), 0),
  (Architecture("resnet8"), 5),
  (Architecture("resnet8", 0.375, "small", projector=(24, 12)), 0),
  (Architecture("resnet18", stem="cifar", channels=1), 0),
  (Architecture("resnet10", 0.375, "small", projector=(24, 12)), 0),
  (Architecture("resnet50", 0.25, projector=(8,), last_bias=True), 0),
  (Architecture("resnet18", pool_grid=2), 0),
  (Architecture("resnet8", stem="small", pool_grid=3), 5),
  (Architecture("resnet10", 0.375, "small", pool_grid=2, projector=(9, 6)), 0),
]


def export_and_execute(nets, format_name, architecture, num_classes, folder):
  """Returns the torch reference and what the loading code makes of the file."""
  filters = round(64 * architecture.width_multiplier)
  reference = nets.nn.Module()
  reference.backbone = nets.torch_resnet(
    architecture.backbone,
    filters,
    architecture.stem,
    architecture.channels,
    architecture.pool_grid,
  )
  features = architecture.network().num_features
  if architecture.projector:
    reference.projector = nets.torch_projector(
      [features, *architecture.projector], last_bias=architecture.last_bias
    )
  nets.randomize(reference).eval()
  imported = formats.from_torchvision(nets.state_of(reference))
  path = folder / "encoder.bin"
  classifier = {
    "kernel": np.eye(features, num_classes, dtype=np.float32),
    "bias": np.zeros(num_classes, np.float32),
  }
  write(
    path,
    imported.variables,
    format_name,
    projector=bool(architecture.projector),
    classifier=classifier if num_classes else None,
  )
  code = formats.FORMATS[format_name].loading_code(
    formats.Content(
      os.fspath(path),
      architecture,
      projector=bool(architecture.projector),
      num_classes=num_classes,
    )
  )
  names = {}
  exec(compile(code, "model card", "exec"), names)
  return reference, names["model"]


@pytest.mark.parametrize(("architecture", "num_classes"), CASES)
@pytest.mark.parametrize(
  "format_name", ["torchvision", "safetensors", "timm"], indirect=True
)
def test_loading_code(
  format_name, architecture, num_classes, torch, torch_nets, tmp_path
):
  narrow = architecture.width_multiplier != 1 or architecture.projector
  if format_name == "timm" and narrow:
    pytest.skip("timm has no such network")
  torch_nets.import_or_skip("timm" if format_name == "timm" else "torchvision")
  reference, model = export_and_execute(
    torch_nets, format_name, architecture, num_classes, tmp_path
  )
  images = torch.randn(2, architecture.channels, 49, 49)
  with torch.no_grad():
    expected, found = reference.backbone(images), model(images)
    if num_classes:
      expected = expected[:, :num_classes]
    if architecture.projector:
      features, embeddings = found
      torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
      expected, found = reference.projector(expected), embeddings
  torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "num_classes"), CASES)
@pytest.mark.parametrize(
  "name", [n for n, f in formats.FORMATS.items() if f.language == "python"]
)
def test_loading_code_is_python(name, architecture, num_classes):
  code = formats.FORMATS[name].loading_code(
    formats.Content("encoder.pth", architecture, num_classes=num_classes)
  )
  compile(code, "model card", "exec")
  assert "encoder.pth" in code
