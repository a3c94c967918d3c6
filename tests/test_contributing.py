"""CONTRIBUTING.md's recipes, added to the package as written, and used."""

import importlib
import pathlib
import re
import sys
import textwrap
import types
from typing import NamedTuple

import jax
import numpy as np
import pytest

from configs import digits
from imsvd_jax import formats
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import make_source
from imsvd_jax.evaluation import offline, protocols, registry, results
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.inputs import Inputs
from imsvd_jax.models import BACKBONES
from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.runs import metrics
from imsvd_jax.train import train_and_evaluate
from tests.formats.test_names import TINY, variables_of
from tests.objectives import idioms

ROOT = pathlib.Path(__file__).parents[1]
REGISTRIES = (
  "OBJECTIVES",
  "SOURCES",
  "BACKBONES",
  "PROTOCOLS",
  "EVALUATORS",
  "FORMATS",
)


class Block(NamedTuple):
  """A code block, and the step of a recipe that it belongs to."""

  step: str
  path: str  # The first file that the step names.
  code: str

  @property
  def module(self) -> str:
    parts = pathlib.Path(self.path).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def blocks() -> list[Block]:
  """The Python blocks of the recipes, in order."""
  text = (ROOT / "CONTRIBUTING.md").read_text()
  found = re.findall(
    r"^\d\. ([^\n]+)\n\n   ```python\n(.*?)   ```$",
    text,
    re.DOTALL | re.MULTILINE,
  )
  path = lambda step: re.search(r"`(\w+/[\w/]+\.py)`", step)[1]
  return [Block(s, path(s), textwrap.dedent(code)) for s, code in found]


def add(block: Block, patch: pytest.MonkeyPatch) -> None:
  """Does to the package what a contributor does to its files."""
  if block.step.startswith("New file"):
    assert not (ROOT / block.path).exists()
    module = types.ModuleType(block.module)
    exec(compile(block.code, block.path, "exec"), vars(module))
    patch.setitem(sys.modules, block.module, module)
    parent, _, name = block.module.rpartition(".")
    package = importlib.import_module(parent)
    patch.setattr(package, name, module, raising=False)
    return
  owner = importlib.import_module(block.module)
  # "import the file": new modules and their functions are names of the owner.
  names = dict(vars(owner))
  for new in [b for b in blocks() if b.step.startswith("New file")]:
    if new.module in sys.modules:
      module = sys.modules[new.module]
      names[new.module.rpartition(".")[2]] = module
      names |= {k: v for k, v in vars(module).items() if not k.startswith("_")}
  if block.code.startswith('"'):
    (name,) = [r for r in REGISTRIES if f"`{r}`" in block.step]
    for key, value in eval(f"{{{block.code}}}", names).items():
      assert key not in getattr(owner, name)
      patch.setitem(getattr(owner, name), key, value)
    return
  exec(compile(block.code, block.path, "exec"), names)
  for name in re.findall(r"^(?:class|def) (\w+)", block.code, re.MULTILINE):
    patch.setattr(owner, name, names[name], raising=False)


@pytest.fixture(scope="module", autouse=True)
def extended():
  """The package with every recipe's additions; returns those of configs."""
  with pytest.MonkeyPatch.context() as patch:
    keys = []
    for block in blocks():
      if block.path == "configs/common.py":
        keys.append(block.code)
      else:
        add(block, patch)
    yield keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Files of the new source."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split in ("train", "test"):
    images = rng.integers(0, 256, (16, 16, 16, 3), np.uint8)
    np.savez(folder / f"{split}.npz", images=images, labels=np.arange(16) % 2)
  return folder


@pytest.fixture(scope="module")
def run(extended, folder, tmp_path_factory):
  """One debug step of the new objective, backbone and source together."""
  config = digits.get_config("debug")
  with config.unlocked():
    for code in extended:
      exec(code, {"c": config, "ConfigDict": type(config)})
  config.update_from_flattened_dict(
    {
      "objective.name": "sphere",
      "model.backbone": "plain4",
      "data.name": "npz",
      "data.path": str(folder),
      "data.num_examples": 0,
      "data.resize": 16,
      "data.crop": 16,
      "eval.every_epochs": 0.0,
      "views.view1.size": 16,
      "views.view2.size": 16,
    }
  )
  workdir = tmp_path_factory.mktemp("run")
  return workdir, train_and_evaluate(config, str(workdir))


def test_every_recipe_is_read():
  assert len(blocks()) == 13
  assert {r for r in REGISTRIES for b in blocks() if f"`{r}`" in b.step} == set(
    REGISTRIES
  )


def test_lines_fit_the_house():
  for block in blocks():
    assert max(map(len, block.code.splitlines())) <= 80, block.path


def test_the_objective_is_the_same_on_one_device_and_on_eight():
  rng = np.random.default_rng(0)
  zs = [np.float32(rng.normal(size=(16, 4))) for _ in range(2)]
  loss = OBJECTIVES["sphere"].loss
  u = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in zs]
  pairs = ~np.eye(16, dtype=bool)
  apart = [np.square(v[:, None] - v).sum(-1)[pairs] for v in u]
  expected = np.square(u[0] - u[1]).sum(1).mean() + np.mean(
    [np.log(np.exp(-2 * distance).mean()) for distance in apart]
  )
  np.testing.assert_allclose(loss(zs)[0], expected, rtol=1e-5)
  P = jax.sharding.PartitionSpec
  sharded = jax.shard_map(
    lambda *z: loss(z, axis_name="data")[0],
    mesh=idioms.mesh(),
    in_specs=P("data"),
    out_specs=P(),
  )
  np.testing.assert_allclose(jax.jit(sharded)(*zs), expected, rtol=1e-5)


def test_the_source_has_its_images_and_names_a_missing_file(folder):
  config = digits.get_config("debug")
  config.update_from_flattened_dict(
    {"data.name": "npz", "data.path": str(folder), "data.num_examples": 0}
  )
  source = make_source(config.data, "train")
  assert (source.num_examples, source.num_classes) == (16, 2)
  config.data.train_split = "missing"
  with pytest.raises(UserError, match=r"missing\.npz does not exist"):
    make_source(config.data, "train")


def test_the_backbone_computes_in_its_type_and_keeps_float32_weights():
  network = BACKBONES["plain4"](width_multiplier=1 / 16, dtype=np.dtype("f4"))
  images = np.zeros((2, 16, 16, 3), np.float32)
  shapes = jax.eval_shape(
    lambda: network.init_with_output(jax.random.key(0), images, False)
  )
  assert shapes[0].shape == (2, network.num_features) == (2, 32)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes[1])} == {
    np.dtype("float32")
  }


def test_objective_backbone_and_source_train_a_step(run):
  workdir, state = run
  assert int(state.step) == 1
  assert "convs_0" in state.params["backbone"]
  lines = metrics.read_metrics(str(workdir))
  assert any({"alignment", "uniformity", "loss"} <= set(line) for line in lines)


def test_the_evaluator_knows_the_answer():
  features = np.float32([[1, 0], [2, 0.1], [0, 1], [0.1, 3]])
  split = Features(features, np.int32([0, 0, 1, 1]))
  protocol = protocols.PROTOCOLS["centroid"]
  numbers = dict(registry.evaluate(protocol, Inputs(train=split, test=split)))
  assert numbers["final"] == numbers["top1"] == 1.0
  with pytest.raises(UserError, match=r"shrinkage=.*expected from 0"):
    protocols.Centroid(shrinkage=2.0)


def test_the_evaluator_measures_a_run_by_name(run):
  workdir, _ = run
  options = Options(
    workdir=(str(workdir),), protocol=("centroid",), set=("shrinkage=0.1",)
  )
  (result,) = offline.evaluate_runs(options)
  assert result.num_images == 16
  (entry,) = results.read_results(workdir / results.FILE_NAME)
  assert entry["hyperparameters"] == {"shrinkage": 0.1}


def test_the_format_writes_every_weight_and_says_how_to_load_it(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  variables = variables_of(TINY)
  architecture = formats.write_file(
    "encoder.json", variables, format_name="json", metadata={"step": 3}
  )
  content = formats.Content("encoder.json", architecture)
  loaded = {}
  exec(formats.FORMATS["json"].loading_code(content), loaded)
  kernel = variables["params"]["backbone"]["conv1"]["kernel"]
  np.testing.assert_array_equal(
    np.float32(loaded["tensors"]["conv1.weight"]), kernel.transpose(3, 2, 0, 1)
  )
