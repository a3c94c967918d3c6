"""Comparison of recipes: its runs, its intervals, its tables."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import recipe_comparison, results

ROOT = pathlib.Path(__file__).parents[2]

RECIPE = """
from configs import digits

def get_config(mode=""):
  c = digits.get_config("debug")
  c.data.name = "digits"
  c.data.num_examples = 0
  c.epochs = 0.02
  c.eval.every_epochs = 0.0
  c.eval.final = True
  c.eval.baselines = False
  c.objective.name = mode
  return c
"""


@pytest.fixture
def recipe(tmp_path):
  path = tmp_path / "tiny.py"
  path.write_text(RECIPE)
  return str(path)


def write_run(folder, knn, baseline=None, **last):
  folder.mkdir(parents=True)
  row = results.Result(
    protocol="knn/final",
    evaluator="knn",
    hyperparameters={},
    data={"name": "digits"},
    step=2,
    seed=0,
    final=knn,
    interval=(0.1, 0.9),
    num_images=200,
    weights="abc",
  )
  rows = [row, dataclasses.replace(row, protocol="linear/final")]
  rows.append(dataclasses.replace(row, protocol="knn/online", online=True))
  if baseline:
    pixels = {"encoder": "raw pixels", "step": None, "weights": None}
    rows += [dataclasses.replace(row, final=baseline, **pixels)]
  results.write_results(folder / "results.json", rows)
  lines = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": -1.0, **last}]
  lines.append({"step": 2, "knn": knn})
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)


@pytest.mark.proof
def test_a_recipe_trains_once_and_is_measured(recipe, tmp_path):
  command = [sys.executable, "-m", "imsvd_jax", "compare", f"{recipe}:simclr"]
  command += [f"--workdir={tmp_path}", "--seeds=3", "--timing_steps=1"]
  compiled = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")}
  first = subprocess.run(
    command, cwd=ROOT, env=compiled, capture_output=True, text=True, check=False
  )
  assert first.returncode == 0, first.stderr
  assert "=== simclr, seed 3: run 1 of 1" in first.stderr
  rows = [x for x in first.stdout.splitlines() if x.startswith("| simclr")]
  assert len(rows) == 2
  assert first.stdout == (tmp_path / "comparison.md").read_text() + "\n"
  assert "uniformity" in first.stdout
  # What has ended is not repeated: same tables from the files alone.
  path = tmp_path / "simclr-seed3" / "results.json"
  content = json.loads(path.read_text())
  (row,) = (e for e in content["results"] if e["protocol"] == "knn/final")
  assert row["encoder"] == "trained"
  row["final"] = 0.123
  path.write_text(json.dumps(content))
  code = recipe_comparison.compare(
    [f"{recipe}:simclr"], seeds=[3], workdir=str(tmp_path), timing_steps=0
  )
  assert code == 0
  assert "| 12.3 (" in (tmp_path / "comparison.md").read_text()


def test_tables_hold_means_over_seeds_and_baselines(recipe, tmp_path):
  write_run(tmp_path / "a", 0.5, baseline=0.25, information=0.2, dead_bins=0.0)
  write_run(tmp_path / "b", 0.7, information=0.4, dead_bins=0.5)
  loaded = recipe_comparison.load_recipe(f"{recipe}:barlow_twins")
  runs = [recipe_comparison.read_run(tmp_path / name) for name in "ab"]
  for run in runs:
    run.last.update(invariance=0.5, redundancy=2.0)
  timings = {"barlow_twins": [0.2, 0.1, 0.4]}
  text = recipe_comparison.report([loaded], {"barlow_twins": runs}, timings)
  assert "| 0.200 (0.100 to 0.400) | 1.00 |" in text
  assert "| run | data | seeds | knn/final | linear/final |" in text
  assert "| raw pixels | digits |  | 25.0 |  |" in text
  assert "| barlow_twins | digits | 2 | 60.0 (0.0 to 100.0) | 60.0 (" in text
  assert "on 200 held-out images" in text
  assert "invariance 0.500, redundancy 2.000" in text
  assert "| 30% |" in text  # information
  assert "| 25% |" in text  # dead bins


@pytest.mark.parametrize(
  ("recipes", "message"),
  [
    ([], "No recipe given"),
    (["missing.py"], "No recipe 'missing.py'"),
    (["configs/digits.py:nonsense"], "Unknown mode 'nonsense'"),
    (["configs/digits.py:debug"], "eval.final=False"),
    (["configs/digits.py", "configs/digits.py"], "Two recipes have one name"),
  ],
)
def test_mistakes_are_said(recipes, message, tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(UserError, match=message):
    recipe_comparison.compare(recipes, seeds=[0], workdir=str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


def test_results_of_a_recipe_that_has_changed_are_refused(
  recipe, tmp_path, monkeypatch
):
  monkeypatch.setattr(recipe_comparison, "report", lambda *_: "")
  folder = tmp_path / "simclr-seed4"
  write_run(folder, 0.5)
  config = recipe_comparison.load_recipe(f"{recipe}:simclr").config.to_dict()
  compare = lambda: recipe_comparison.compare(
    [f"{recipe}:simclr"], seeds=[4], workdir=str(tmp_path), timing_steps=0
  )
  stored = folder / "config.json"
  stored.write_text(json.dumps({**config, "seed": 4}))
  assert compare() == 0
  old = {**config, "seed": 4, "data": {**config["data"], "channels": 1}}
  del old["model"]["remat"]
  stored.write_text(json.dumps(old))
  with pytest.raises(UserError, match=r"data\.channels, model\.remat differ"):
    compare()


def test_a_run_without_an_accuracy_and_a_wrong_seed_are_said(tmp_path):
  with pytest.raises(UserError, match="has no knn/final or linear/final"):
    recipe_comparison.read_run(tmp_path)
  with pytest.raises(UserError, match="--seeds=0,x"):
    recipe_comparison.parse_seeds(["0", "x"])
