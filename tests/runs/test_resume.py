"""The config of a run, and what may change on resume."""

import json
import logging
import shutil

import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import (
  resume,
  run_directory,
  weights,
)
from tests.runs.checkpoint_child import make_state
from tests.runs.made_runs import open_run, save_run


def test_config_is_stored_with_the_run_and_with_each_step(tmp_path):
  run = open_run(tmp_path, config={"seed": 1, "scale": (0.1, 1.0)})
  expected = {"seed": 1, "scale": [0.1, 1.0]}
  assert resume.load_config(tmp_path) == expected
  run.save(1, make_state(1))
  run.close()
  (tmp_path / "config.json").write_text("{damaged")
  assert resume.load_config(tmp_path) == expected
  assert resume.load_config(tmp_path / "checkpoints/1") == expected
  assert weights.load_variables(tmp_path).config == expected


def test_config_follows_the_newest_step(tmp_path):
  save_run(tmp_path, [1], config={"seed": 1})
  save_run(tmp_path, [2], config={"seed": 2})
  assert resume.load_config(tmp_path) == {"seed": 2}
  assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 1}
  (tmp_path / "checkpoints/2/meta/metadata").write_text("{}")
  assert resume.load_config(tmp_path) == {"seed": 1}


def test_config_of_something_else_is_refused(tmp_path):
  with pytest.raises(UserError, match="holds no run's configuration"):
    resume.load_config(tmp_path)


OLD = {"data": {"seed": 1, "crop": (0.2, 1.0)}, "log_every": 10, "gone": None}
NEW = {"data": {"seed": 2, "crop": [0.2, 1.0]}, "log_every": 50, "new": {}}


def test_changed_keys_are_named_and_refused(caplog):
  with pytest.raises(UserError) as caught:
    resume.check_config(OLD, NEW, harmless=["log_every"])
  message = str(caught.value)
  assert "data.seed: 1 -> 2" in message
  assert "gone: null -> (absent)" in message
  assert "new: (absent) -> {}" in message
  allow = "('data.seed', 'gone', 'new')"
  assert message.endswith(f'--config.allow_changes="{allow}".')
  assert "crop" not in message
  assert "log_every" not in message


@pytest.mark.parametrize("allow", [["data", "gone", "new"], ["*"]])
def test_allowed_and_harmless_changes_are_logged(caplog, allow):
  with caplog.at_level(logging.INFO):
    changed = resume.check_config(OLD, NEW, harmless=["log_every"], allow=allow)
  assert changed == ["data.seed", "gone", "log_every", "new"]
  assert "log_every: 10 -> 50 (harmless)" in caplog.text
  assert "data.seed: 1 -> 2 (allowed)" in caplog.text


def test_a_run_of_an_earlier_version_lacks_the_keys_added_since():
  old = {"model": {"stem": "cifar"}}
  same = {"model": {"stem": "cifar", "init": "fan_out_normal"}}
  assert resume.check_config(old, same) == []
  other = {"model": {"stem": "cifar", "init": "torch_default"}}
  with pytest.raises(UserError, match=r"init: .*fan_out_normal.*torch_default"):
    resume.check_config(old, other)


def test_a_prefix_ends_at_a_dot():
  with pytest.raises(UserError, match="data\\.seed"):
    resume.check_config(OLD, NEW, allow=["dat", "gone", "new", "log_every"])
  assert resume.check_config(OLD, OLD) == []


def test_the_config_of_a_run_in_progress_is_not_that_of_its_start(
  run_copy, monkeypatch
):
  """All steps that were listed are gone before they are read."""
  root = run_copy / "checkpoints"
  save_run(run_copy, [3], config={"data": {"seed": 2}})
  names = run_directory.steps_on_disk
  aside = run_copy / "3"
  (root / "3").rename(aside)

  def list_then_change(path):
    found = names(path)
    if aside.exists():
      for step in found:
        shutil.rmtree(root / str(step))
      aside.rename(root / "3")
    return found

  monkeypatch.setattr(run_directory, "steps_on_disk", list_then_change)
  assert resume.load_config(run_copy) == {"data": {"seed": 2}}
