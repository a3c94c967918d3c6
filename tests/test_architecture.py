"""The architecture, enforced: which room may import which, what stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "imsvd_jax"

# What a room may import of this package, beside itself; top to bottom. A
# module's row wins over its room's.
BASE = {"base"}
HOT = BASE | {"objectives", "models"}
TRAINING = HOT | {"training"}
RUNS = TRAINING | {"formats", "data", "runs"}
EVALUATION = RUNS | {"evaluation"}
MAY_IMPORT = {
  "base": set(),
  "objectives": BASE,
  "models": BASE,
  "formats": BASE | {"models"},
  "data": BASE,
  "training": HOT | {"data"},
  "runs": RUNS,
  "evaluation": EVALUATION,
  "explain": EVALUATION,
  "interop": EVALUATION,
  "search": EVALUATION | {"explain", "interop"},
  "benchmarks": EVALUATION | {"search"},
  "train": EVALUATION,
  "commands": EVALUATION
  | {"train", "explain", "interop", "search", "benchmarks"},
  "main": BASE | {"commands", "train"},
  "__main__": BASE | {"commands"},
}
# Evaluators and explain get functions of images; only these bind a run to them.
BINDERS = {
  "evaluation": {
    "augmented_views",
    "binder",
    "offline",
    "online",
    "recipe_comparison",
  },
  "explain": {"data_page", "run_subject"},
}
NOT_IN_EVALUATORS = {"training", "runs", "models"}
# Heavy or optional packages: what may import them, and whether only late.
ONLY_IN = {
  "absl": {"commands", "main"},
  "clu": {"runs"},
  "faiss": {"search"},
  "flax": {"models", "training", "formats"},  # formats: nested dictionaries.
  "jinja2": {"explain"},
  "matplotlib": {"explain"},
  "orbax": {"runs"},
  "tensorflow": {"data", "interop", "benchmarks"},
  "tensorflow_datasets": {"data"},
}
LATE_ONLY = {"torch", "PIL", "faiss"}


def _parts(path: pathlib.Path) -> tuple[str, ...]:
  return path.relative_to(ROOT / PACKAGE).with_suffix("").parts


def _imported(node: ast.AST) -> list[str]:
  """Dotted names that a node imports."""
  if isinstance(node, ast.Import):
    return [alias.name for alias in node.names]
  if isinstance(node, ast.ImportFrom):
    assert node.level == 0, "imports are absolute"
    return [f"{node.module}.{alias.name}" for alias in node.names]
  return []


def _files() -> list[pathlib.Path]:
  return sorted((ROOT / PACKAGE).rglob("*.py"))


def _forbidden(parts: tuple[str, ...], name: str) -> bool:
  """Whether the module of `parts` may not import the dotted `name`."""
  first, *rest = name.split(".")
  room = parts[0]
  if first != PACKAGE:
    return first in ONLY_IN and room not in ONLY_IN[first]
  target = rest[0] if rest else ""
  if target in ("", "__version__") or target == room:
    return False
  binders = BINDERS.get(room)
  if binders and target in NOT_IN_EVALUATORS and parts[1] not in binders:
    return True
  return target not in MAY_IMPORT[room]


@pytest.mark.parametrize(
  "path", _files(), ids=lambda p: str(p.relative_to(ROOT / PACKAGE))
)
def test_a_module_imports_only_what_its_room_allows(path):
  parts = _parts(path)
  if parts == ("__init__",):
    return
  assert parts[0] in MAY_IMPORT, f"{parts[0]} has no row: add one on purpose"
  tree = ast.parse(path.read_text())
  for node in ast.walk(tree):
    for name in _imported(node):
      assert not _forbidden(parts, name), f"line {node.lineno}: {name}"
  for node in tree.body:
    for name in _imported(node):
      late = name.partition(".")[0] in LATE_ONLY
      assert not late, f"line {node.lineno}: {name} at import time"


@pytest.mark.parametrize(
  ("parts", "name"),
  [
    (("objectives", "imsvd"), "imsvd_jax.data.host_pipeline"),
    (("base", "files"), "imsvd_jax.runs.metrics"),
    (("evaluation", "knn"), "imsvd_jax.models.resnet"),
    (("runs", "metrics"), "absl.flags"),
  ],
)
def test_a_forbidden_edge_is_seen(parts, name):
  assert _forbidden(parts, name)


def test_the_top_level_has_three_modules():
  names = {p.stem for p in (ROOT / PACKAGE).glob("*.py")}
  assert names == {"__init__", "__main__", "main", "train"}


def test_no_file_name_stands_for_two_things():
  names = [p.name for p in _files() if not p.name.startswith("__")]
  rooms = {p.name for p in (ROOT / PACKAGE).iterdir() if p.is_dir()}
  twice = sorted({n for n in names if names.count(n) > 1})
  assert not twice
  # The commands are named after the rooms that they open.
  opened = {"data", "explain", "runs", "search"}
  assert rooms & {n[:-3] for n in names} <= opened


# Recipes that are others, changed.
BASED_ON = {
  "comparison": {"digits", "fashion_mnist_r8", "shapes"},
  "fashion_mnist_convnext": {"fashion_mnist_r8"},
  "fashion_mnist_vit": {"fashion_mnist_r8"},
  "imagenet_r50_fast": {"imagenet_r50"},
}


def test_configs_import_only_ml_collections_and_common():
  for path in (ROOT / "configs").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        based_on = BASED_ON.get(path.stem, set())
        allowed = {f"configs.{name}" for name in {"common", *based_on}}
        allowed |= {"ml_collections.ConfigDict"}
        assert allowed.issuperset(names), path
      assert not isinstance(node, ast.Import), path


def test_the_hot_half_runs_without_tensorflow():
  program = """
import sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in {"tensorflow", "tensorflow_datasets", "clu"}:
      raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())
import imsvd_jax
from imsvd_jax import data, formats, models, objectives, train
from imsvd_jax.base import devices
from imsvd_jax.benchmarks import loss_kernel, loss_precision, step_parts
from imsvd_jax.benchmarks.costs import compiled_step, slices
from imsvd_jax.commands import benchmark, preflight
from imsvd_jax.evaluation import offline, online
from imsvd_jax.explain import run_subject
from imsvd_jax.interop import image_embeddings, weight_export, weight_import
from imsvd_jax.runs import metrics
from imsvd_jax.search import build, questions
from imsvd_jax.training import augment, experiment, optim, state, step
from configs import digits
built = experiment.build(digits.get_config("debug"), 16)
print(built.total_steps)
"""
  result = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.strip() == "1"
