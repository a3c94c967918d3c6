"""Numbers on Weights & Biases, by a fake of its package."""

import sys
import types

import numpy as np
import pytest

from configs import common
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import metrics


class FakeRun:
  def __init__(self):
    self.logged, self.is_finished = [], False

  def define_metric(self, name, step_metric):
    assert (name, step_metric) == ("*", "step")

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
  fake = types.SimpleNamespace(run=FakeRun(), calls=[])
  fake.Image, fake.Histogram = (
    lambda x: ("image", x.shape),
    lambda x: ("bins", x.shape),
  )
  fake.init = lambda **kwargs: fake.calls.append(kwargs) or fake.run
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


def config_of(project="mine"):
  config = common.base()
  config.log.wandb_project = project
  return config


def test_numbers_go_there_in_groups_and_a_resumed_run_continues(
  tmp_path, wandb
):
  (tmp_path / "run.json").write_text('{"id": "abc"}')
  others = metrics.other_writers(config_of(), str(tmp_path))
  writer = metrics.MetricWriter(str(tmp_path), start_step=0, others=others)
  writer.write(5, {"loss": 1.0, "diagonal": 2.0, "online/knn": 0.5})
  writer.write(5, {"images_per_second": 9.0}, timing=True)
  looked_at = {"views/views": np.zeros((4, 8, 3)), "code/entropies": np.ones(5)}
  writer.write(6, looked_at, timing=True)
  writer.sync()
  writer.close()
  (call,) = wandb.calls
  assert (call["project"], call["id"], call["resume"]) == (
    "mine",
    "abc",
    "allow",
  )
  assert call["config"]["optimizer.name"] == "lars"
  assert wandb.run.logged == [
    {"step": 5, "loss/loss": 1.0, "terms/diagonal": 2.0, "online/knn": 0.5},
    {"step": 5, "speed/images_per_second": 9.0},
    {
      "step": 6,
      "views/views": ("image", (4, 8, 3)),
      "code/entropies": ("bins", (5,)),
    },
  ]
  assert wandb.run.is_finished


def test_without_a_project_wandb_is_not_imported(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  assert metrics.other_writers(config_of(""), str(tmp_path)) == []
  config = config_of()
  del config.log["wandb_project"]  # A recipe of an earlier version.
  assert metrics.other_writers(config, str(tmp_path)) == []


def test_a_missing_package_is_one_clear_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="pip install wandb"):
    metrics.other_writers(config_of(), str(tmp_path))


def test_a_refused_start_is_one_clear_line(tmp_path, wandb):
  def refuse(**kwargs):
    raise ConnectionError("no network")

  wandb.init = refuse
  with pytest.raises(UserError, match=r"no network.*WANDB_MODE=offline"):
    metrics.other_writers(config_of(), str(tmp_path))
