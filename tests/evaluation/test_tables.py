"""Several runs as one table: seeds become a mean with its interval."""

import copy

import numpy as np
import pytest
from scipy import stats

from configs import digits
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import tables


def run(objective, seed, final, *, protocol="knn/imsvd", step=10, **config):
  settings = digits.get_config("debug")
  settings.update_from_flattened_dict(
    {"objective.name": objective, "seed": seed, **config}
  )
  entry = {
    "protocol": protocol,
    "hyperparameters": {"num_neighbors": [20]},
    "data": {"name": "digits"},
    "step": step,
    "final": final,
    "interval": [0.7, 0.96],
  }
  older = {**entry, "step": step - 5, "final": 0.1}
  nothing = {**entry, "protocol": "collapse", "final": None}
  return tables.Run(settings.to_dict(), [older, entry, nothing])


def test_the_interval_is_students():
  # By hand: mean 0.92, s = 0.01, t(0.975, 2) = 4.3027.
  mean, (low, high) = tables.seed_interval([0.91, 0.92, 0.93])
  assert mean == pytest.approx(0.92)
  half = 4.302653 * 0.01 / np.sqrt(3)
  assert (low, high) == pytest.approx((0.92 - half, 0.92 + half), abs=1e-6)
  values = [0.4, 0.9, 0.8, 0.85, 0.3]
  expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert tables.seed_interval(values)[1] == pytest.approx(tuple(expected))
  with pytest.raises(UserError, match="one run; expected two or more"):
    tables.seed_interval([0.5])


def test_seeds_are_one_row_and_objectives_another():
  runs = [run("imsvd", s, f) for s, f in enumerate((0.91, 0.92, 0.93))]
  runs.append(run("vicreg", 0, 0.875))
  runs[3].results[1]["protocol"] = "knn/imsvd"
  assert tables.markdown_table(runs).splitlines() == [
    "| run | data | seeds | knn/imsvd |",
    "|---|---|---:|---:|",
    "| imsvd | digits | 3 | 92.0 (89.5 to 94.5) |",
    "| vicreg | digits | 1 | 87.5 (70.0 to 96.0) |",
  ]


def test_rows_of_one_objective_say_what_differs():
  runs = [
    run("imsvd", 0, 0.9),
    run("imsvd", 0, 0.8, **{"batch_size": 8, "checkpoint.keep_last": 9}),
    # Hyper-parameters of an objective that is not used tell nothing apart.
    run("imsvd", 1, 0.9, **{"objective.simclr.temperature": 0.3}),
  ]
  lines = tables.markdown_table(runs)
  first, second = lines.splitlines()[2:]
  assert first.startswith("| imsvd (batch_size=16) | digits | 2 | 90.0 (90.0")
  assert second.startswith("| imsvd (batch_size=8) | digits | 1 | 80.0 (70.0")


def test_of_a_run_one_set_of_weights_counts():
  """Neither two numbers of one protocol nor two networks in one row."""
  one = run("imsvd", 0, 0.9)
  target = {**one.results[1], "weights": "target", "written": "2026-02"}
  trained = {**one.results[1], "weights": "trained", "written": "2026-01"}
  linear = {**trained, "protocol": "linear/lbfgs"}
  one = one._replace(results=[{**target, "final": 0.8}, trained, linear])
  (row,) = tables.markdown_table([one]).splitlines()[2:]
  assert row == "| imsvd | digits | 1 | 80.0 (70.0 to 96.0) |"


def test_a_seed_that_was_not_measured_is_said():
  runs = [run("imsvd", s, 0.9 + s / 100) for s in range(3)]
  runs[2] = runs[2]._replace(results=[])
  (row,) = tables.markdown_table(runs).splitlines()[2:]
  assert row.startswith("| imsvd | digits | 3 | 90.5 (84.1 to 96.9) (2 seeds)")


def test_what_cannot_be_compared_is_refused():
  with pytest.raises(UserError, match="No run has a number"):
    tables.markdown_table([tables.Run({}, [])])
  other = copy.deepcopy(run("imsvd", 1, 0.9))
  other.results[1]["hyperparameters"]["num_neighbors"] = [5]
  with pytest.raises(UserError, match="different hyper-parameters"):
    tables.markdown_table([run("imsvd", 0, 0.9), other])
  both = run("imsvd", 0, 0.9)
  both.results.append({**both.results[1], "final": 0.8})
  with pytest.raises(UserError, match="several results of knn/imsvd"):
    tables.markdown_table([both])


def test_baselines_are_rows_of_ranges_above_the_runs():
  runs = [run("imsvd", seed, 0.9) for seed in range(2)]
  for seed, one in enumerate(runs):
    random = {**one.results[1], "encoder": "random init", "step": 0}
    one.results.append({**random, "final": 0.5 + seed / 10})
    pixels = {**one.results[1], "encoder": "raw pixels", "step": None}
    one.results.append({**pixels, "final": 0.25})
  more = {"seconds": {"imsvd": "3"}}
  assert tables.markdown_table(runs, more=more).splitlines() == [
    "| run | data | seeds | knn/imsvd | seconds |",
    "|---|---|---:|---:|---:|",
    "| random init | digits |  | 50.0 to 60.0 |  |",
    "| raw pixels | digits |  | 25.0 |  |",
    "| imsvd | digits | 2 | 90.0 (90.0 to 90.0) | 3 |",
  ]


def test_rows_have_the_names_that_runs_are_given():
  runs = [run("imsvd", 0, 0.9)._replace(name=name) for name in ("a", "b", "a")]
  lines = tables.markdown_table(runs).splitlines()[2:]
  assert [line.split(" | ")[:3] for line in lines] == [
    ["| a", "digits", "2"],
    ["| b", "digits", "1"],
  ]
