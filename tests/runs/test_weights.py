"""Weights of a run, for evaluation and for other runs."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import (
  weights,
)
from tests.runs.checkpoint_child import CONFIG, make_state, place, same
from tests.runs.made_runs import files_of, open_run


@pytest.mark.parametrize("target", [False, True])
def test_variables_load_without_the_optimizer(tmp_path, target):
  state = make_state(4, target=target)
  run = open_run(tmp_path)
  run.save(4, place(state, jax.devices()))
  run.close()
  loaded = weights.load_variables(tmp_path)
  assert loaded.step == 4
  assert loaded.config == CONFIG
  assert same(loaded.params, state.params)
  assert same(loaded.batch_stats, state.batch_stats)
  assert same(loaded.target, state.target)
  assert isinstance(loaded.params["backbone"]["kernel"], np.ndarray)


def test_variables_are_verified_and_the_run_is_left_alone(run_copy):
  root = run_copy / "checkpoints"
  shutil.rmtree(root / "2" / "state")
  shutil.copytree(root / "1" / "state", root / "2" / "state")
  before = files_of(run_copy)
  loaded = weights.load_variables(run_copy)
  assert loaded.step == 1
  assert same(loaded.params, make_state(1).params)
  assert files_of(run_copy) == before
  with pytest.raises(UserError, match="No usable checkpoint"):
    weights.load_variables(root / "2")


def test_variables_of_nothing_are_refused(tmp_path):
  with pytest.raises(UserError, match="absent does not exist"):
    weights.load_variables(tmp_path / "absent")


def test_a_source_of_weights_is_found_before_work_begins(run_copy, tmp_path):
  weights.check_source(run_copy)
  weights.check_source(run_copy / "checkpoints" / "1")
  (tmp_path / "file.pth").write_bytes(b"")
  weights.check_source(tmp_path / "file.pth")
  with pytest.raises(UserError, match="found nothing; expected the workdir"):
    weights.check_source(tmp_path / "none.pth")
  with pytest.raises(UserError, match="found no checkpoint; expected"):
    weights.check_source(tmp_path)


def test_init_from_takes_the_weights_and_reports(run_copy):
  state = place(make_state(9), jax.devices())
  new = place(
    make_state(9).replace(
      params={
        "backbone": state.params["backbone"],
        "projector": {"bias": np.ones(3, np.float32), "extra": np.ones(2)},
      }
    ),
    jax.devices(),
  )
  new = new.replace(target={"params": new.params, "batch_stats": None})
  loaded, report = weights.init_from(run_copy, new)
  stored = make_state(2)
  kernel = loaded.params["backbone"]["kernel"]
  assert np.array_equal(kernel, stored.params["backbone"]["kernel"])
  assert kernel.sharding == new.params["backbone"]["kernel"].sharding
  assert same(loaded.batch_stats, stored.batch_stats)
  assert same(loaded.params["projector"], new.params["projector"])
  assert same(loaded.target["params"], loaded.params)
  assert same(loaded.opt_state, new.opt_state)
  assert int(loaded.step) == 9
  assert report.step == 2
  assert report.loaded == [
    "batch_stats/backbone/mean",
    "params/backbone/kernel",
  ]
  assert report.not_loaded == [
    "params/projector/bias [3], there [16]",
    "params/projector/extra [2], there absent",
  ]
  assert str(report).splitlines() == [
    "step 2: 2 leaves loaded; 2 left as initialized; 0 of the other run unused",
    "  left as initialized: params/projector/bias [3], there [16]",
    "  left as initialized: params/projector/extra [2], there absent",
  ]


def test_init_from_reports_what_the_other_run_had_more(run_copy):
  state = make_state(9)
  state = state.replace(params={"backbone": state.params["backbone"]})
  _, report = weights.init_from(run_copy / "checkpoints" / "1", state)
  assert report.step == 1
  assert report.unused == ["params/projector/bias"]
  assert str(report).endswith("\n  unused: params/projector/bias")
  other = state.replace(params={"head": jnp.ones(2)}, batch_stats={})
  with pytest.raises(UserError, match="Nothing in"):
    weights.init_from(run_copy, other)
