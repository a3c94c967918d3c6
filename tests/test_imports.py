"""The architecture, enforced: who may import whom, and what stays light."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "imsvd_jax"

# Beside these, every module may import the standard library, `errors` and
# `nested`. A name of this package stands for the module and all below it.
HOT = {"augment", "objectives", "models", "train_state", "optim", "train_step"}
BELOW_TRAIN_STEP = HOT | {"sharding"}
COSTS = {"jax", "numpy", "costs", *BELOW_TRAIN_STEP}
ALLOWED = {
  "errors": set(),
  "nested": set(),
  "interruption": {"jax"},
  "cpu_devices": {"jax"},
  "cli": {"absl", "cpu_devices", "distributed", "recipe_files"},
  "recipe_files": set(),
  "costs": {"jax", "numpy", "costs"},
  "distributed": {"jax"},
  "objectives": {"jax", "numpy", "objectives"},
  "models": {"jax", "flax", "models"},
  "optim": {"jax", "optax"},
  "sharding": {"jax", "optax"},
  "augment": {"jax"},
  "data": {
    "tensorflow",
    "tensorflow_datasets",
    "numpy",
    "sklearn",
    "PIL",  # benchmark.py's reference, inside a function.
    "data",
  },
  "train_state": {"jax", "flax", "optax", "orbax", "sharding"},
  "workdirs": {"etils"},
  "checkpoint": {"jax", "orbax", "etils", "numpy", "workdirs"},
  "train_step": {"jax", "flax", "optax", *HOT},
  "metrics": {"jax", "numpy", "clu", "etils", "workdirs"},
  "evaluators": {
    "numpy",
    "jax",
    "sklearn",
    "threadpoolctl",
    "scipy",  # It comes with scikit-learn and jax.
    "data",
    "evaluators",
  },
  "interop": {
    "numpy",
    "models",
    "interop",
    "output_files",
    "torch",
    "safetensors",
  },
  "explain": {
    "numpy",
    "jax",
    "matplotlib",
    "jinja2",
    "objectives",
    "data",
    "explain",
  },
  "augmented_views": {
    "jax",
    "numpy",
    "data",
    "evaluators",
    *BELOW_TRAIN_STEP,
  },
  "evaluation": {
    "jax",
    "numpy",
    "etils",
    "augmented_views",
    "data",
    "evaluators",
    "metrics",
    *BELOW_TRAIN_STEP,
  },
  "finetuning": {
    "jax",
    "numpy",
    "optax",
    "data",
    "encoder",
    "evaluators",
    *BELOW_TRAIN_STEP,
  },
  "evaluating": {
    "jax",
    "numpy",
    "etils",
    "augmented_views",
    "data",
    "encoder",
    "evaluators",
    "finetuning",
    "metrics",
    "output_files",
    "sharding",
  },
  "encoder": {
    "jax",
    "numpy",
    "ml_collections",
    "checkpoint",
    "interop",
    *BELOW_TRAIN_STEP,
  },
  "output_files": set(),
  # Outside interop, because it needs jax; without TensorFlow, like encoder.
  "stablehlo": {"jax", "encoder", "output_files"},
  # evaluators (inside a function) for its reader of results.json.
  "model_card": {"etils", "evaluators"},
  "exporting": {
    "jax",
    "numpy",
    "encoder",
    "interop",
    "model_card",
    "output_files",
    "stablehlo",
    "train_step",
  },
  "embedding": {
    "tensorflow",
    "numpy",
    "data",
    "encoder",
    "evaluators",  # Its progress lines.
  },
  "importing": {
    "ml_collections",
    "checkpoint",
    "encoder",
    "interop",
    "objectives",
    "train_step",
  },
  "train": {
    "jax",
    "numpy",
    "ml_collections",
    "checkpoint",
    "data",
    "evaluation",
    "evaluators",
    "interruption",
    "metrics",
    "workdirs",
    *BELOW_TRAIN_STEP,
  },
}
MAIN_COMMON = {
  "absl",
  "ml_collections",
  "cli",
  "distributed",
  "numpy",
  "jax",
}
ALLOWED["main"] = MAIN_COMMON | {"train", "distributed"}
ALLOWED["costs"] = COSTS
ALLOWED["data_benchmark"] = {"jax", "numpy", "data", "train_step"}
ALLOWED["benchmarks"] = COSTS | {"optax", "torch", "benchmarks"}
ALLOWED["benchmark"] = MAIN_COMMON | {
  "benchmarks",
  "costs",
  "cpu_devices",
  "data_benchmark",  # These two inside a function, when asked.
  "evaluators",
}
ALLOWED["preflight"] = MAIN_COMMON | {"costs", "cpu_devices"}
ALLOWED["export"] = MAIN_COMMON | {"exporting"}
ALLOWED["evaluate"] = MAIN_COMMON | {"evaluating", "evaluators"}
ALLOWED["embed"] = MAIN_COMMON | {"embedding", "output_files"}
ALLOWED["import_weights"] = MAIN_COMMON | {"importing"}
ALLOWED["explain.__main__"] = MAIN_COMMON | {"explaining"}
ALLOWED["compare"] = MAIN_COMMON | {"comparing"}
ALLOWED["comparing"] = {
  "jax",
  "numpy",
  "checkpoint",
  "data",
  "evaluators",
  "metrics",
  "recipe_files",
  *BELOW_TRAIN_STEP,
}
ALLOWED["explaining"] = {
  "jax",
  "numpy",
  "etils",
  "augment",
  "augmented_views",
  "data",
  "encoder",
  "explain",
  "metrics",
  "objectives",
  "sharding",
  "train_step",
}
# Importing these inside a function only: heavy, or optional.
LATE_ONLY = {"torch", "PIL"}


def _module_name(path: pathlib.Path) -> str:
  """The key of ALLOWED for a file: its first part below the package."""
  parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
  return ".".join(parts) if parts[-1] == "__main__" else parts[0]


def _imported(node: ast.AST) -> list[str]:
  """First parts of what a node imports, without the package's own name."""
  if isinstance(node, ast.Import):
    names = [alias.name for alias in node.names]
  elif isinstance(node, ast.ImportFrom):
    assert node.level == 0, "imports are absolute"
    names = [f"{node.module}.{alias.name}" for alias in node.names]
  else:
    return []
  result = []
  for name in names:
    parts = name.split(".")
    own = parts[0] == PACKAGE
    result.append(parts[1] if own and len(parts) > 1 else parts[0])
  return result


def _files() -> list[pathlib.Path]:
  return sorted((ROOT / PACKAGE).rglob("*.py"))


@pytest.mark.parametrize(
  "path", _files(), ids=lambda p: str(p.relative_to(ROOT / PACKAGE))
)
def test_a_module_imports_only_what_the_architecture_allows(path):
  if path == ROOT / PACKAGE / "__init__.py":
    return
  name = _module_name(path)
  assert name in ALLOWED, f"{name} has no row in ALLOWED: add one on purpose"
  tree = ast.parse(path.read_text())
  allowed = ALLOWED[name] | {"errors", "nested", PACKAGE, "__version__"}
  allowed |= set(sys.stdlib_module_names)
  for node in ast.walk(tree):
    for imported in _imported(node):
      assert imported in allowed, f"line {node.lineno}: {name} -> {imported}"
  for node in tree.body:
    for imported in _imported(node):
      assert imported not in LATE_ONLY, f"line {node.lineno}: at import time"


def test_the_walk_sees_a_forbidden_edge():
  node = ast.parse("from imsvd_jax.data import pipeline").body[0]
  assert _imported(node) == ["data"]
  assert "data" not in ALLOWED["objectives"]


def test_configs_import_only_ml_collections_and_common():
  for path in (ROOT / "configs").glob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        allowed = {"configs.common", "ml_collections.ConfigDict"}
        if path.stem == "comparison":  # Recipes, changed and side by side.
          allowed |= {"configs.digits", "configs.shapes"}
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
from imsvd_jax import augment, models, objectives, optim, sharding
from imsvd_jax import benchmark, preflight, train_state, train_step
from imsvd_jax.benchmarks import loss, precision, step
from imsvd_jax.costs import slices
from configs import digits
experiment = train_step.build(digits.get_config("debug"), 16)
print(experiment.total_steps)
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
