"""The trainer from end to end, on tiny data."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import digits
from imsvd_jax import data
from imsvd_jax.base.errors import Stopped, UserError
from imsvd_jax.evaluation import augmented_views, online
from imsvd_jax.runs import log_lines, metrics
from imsvd_jax.train import train_and_evaluate
from tests.train_child import small_config

ROOT = pathlib.Path(__file__).parents[1]


def debug_config(**overrides):
  config = digits.get_config("debug")
  config.update_from_flattened_dict(overrides)
  return config


def run_main(*arguments: str, cwd=ROOT):
  return subprocess.run(
    [sys.executable, "-m", "imsvd_jax.main", *arguments],
    capture_output=True,
    text=True,
    cwd=cwd,
    check=False,
  )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of three steps, never interrupted."""
  workdir = tmp_path_factory.mktemp("run")
  config = small_config(
    **{
      "epochs": 1.0,
      "eval.every_epochs": 1.0,
      "eval.linear_epochs": 2,
      "eval.collapse_images": 16,
    }
  )
  return config, workdir, train_and_evaluate(config, str(workdir))


def test_a_run_leaves_metrics_tensorboard_and_checkpoints(finished):
  _, workdir, state = finished
  assert int(state.step) == 3
  lines = metrics.read_metrics(str(workdir))
  steps = [line["step"] for line in lines if "loss" in line]
  assert steps == [1, 2, 3]
  for line in lines:
    assert all(np.isfinite(value) for value in line.values())
  assert {line["step"] for line in lines if "online/knn" in line} >= {0, 3}
  last = next(x for x in reversed(lines) if "loss" in x)
  assert last["loss"] == pytest.approx(
    last["diagonal"] + last["off_diagonal"] + last["invariance"], rel=1e-5
  )
  assert list((workdir / "tensorboard").glob("events*"))


def test_tensorboard_shows_the_views_once_and_the_entropies(finished):
  tf = pytest.importorskip("tensorflow")
  config, workdir, _ = finished
  (path,) = (workdir / "tensorboard").glob("events*")
  found = collections.defaultdict(list)
  for event in tf.compat.v1.train.summary_iterator(str(path)):
    for value in event.summary.value:
      found[value.tag].append((event.step, tf.make_ndarray(value.tensor)))
  ((step, content),) = found["views/views"]
  source = data.make_source(config.data, "train")
  picture = augmented_views.picture(source, config)
  size, count = config.views.view1.size, min(8, source.num_examples)
  assert step == 0
  assert picture.shape == (2 * size, count * size, 3)
  assert picture.std() > 10  # Of 255 levels.
  np.testing.assert_array_equal(tf.io.decode_png(content[2]), picture)
  assert [step for step, _ in found["code/entropies"]] == [0, 3]


def test_online_numbers_say_that_they_are(finished):
  """Probes with labels and the use of the space without, at start and end."""
  _, workdir, _ = finished
  lines = metrics.read_metrics(str(workdir))
  online = {
    line["step"]: {k for k in line if k.startswith("online/")}
    for line in lines
    if "online/knn" in line
  }
  assert set(online) == {0, 3}
  assert online[0] == online[3]
  assert "online/linear" in online[3]
  names = ("rank_me/features", "rank_me/embeddings", "lidar", "alignment")
  names += ("uniformity", "codes/entropy_mean", "codes/dead_bins")
  names += ("codes/mutual_information_mean", "codes/agreement")
  assert {f"online/collapse/{name}" for name in names} < online[3]
  assert not any("variable" in name for name in online[3])


def test_the_log_says_what_was_found_where_the_config_points(capsys):
  config = debug_config(**{"batch_size": 2048, "data.path": "/a/file.npz"})
  source = data.make_source(config.data, "train")
  log_lines.describe_data(config, source)
  said = capsys.readouterr().err
  assert said.startswith("Data: synthetic: 16 images, ")
  assert "data.path=/a/file.npz is not read: data.name is 'synthetic'" in said
  assert "batch_size=2048 is larger than the number of images" in said


def test_a_finished_run_changes_nothing(finished):
  config, workdir, state = finished
  before = (workdir / metrics.METRICS_FILE).read_text()
  again = train_and_evaluate(config, str(workdir))
  assert int(again.step) == 3
  np.testing.assert_array_equal(
    jax.tree.leaves(again.params)[0], jax.tree.leaves(state.params)[0]
  )
  assert (workdir / metrics.METRICS_FILE).read_text() == before


def test_a_signal_before_the_first_step_does_not_wait_for_it(
  finished, tmp_path, monkeypatch, capsys
):
  config, _, expected = finished
  evaluate = online.Evaluation.online

  def interrupted(self, step, state, writer, stopping):
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 10
    while not stopping() and time.monotonic() < deadline:
      time.sleep(0.01)
    evaluate(self, step, state, writer, stopping)

  with monkeypatch.context() as patched:
    patched.setattr(online.Evaluation, "online", interrupted)
    with pytest.raises(Stopped) as stopped:
      train_and_evaluate(config, str(tmp_path))
  assert stopped.value.code == 75
  said = capsys.readouterr().err
  assert "The evaluation of step 0 is left out." in said
  assert "Stopped by a signal before the first step" in said
  assert metrics.read_metrics(str(tmp_path)) == []
  state = train_and_evaluate(config, str(tmp_path))  # The same command.
  for a, b in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
    if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      np.testing.assert_array_equal(a, b)


def test_the_workdir_of_another_config_is_refused(finished):
  config, workdir, _ = finished
  other = small_config(**{"epochs": 1.0, "batch_size": 24})
  with pytest.raises(UserError, match="batch_size"):
    train_and_evaluate(other, str(workdir))
  del config


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"batch_size": 12}, r"batch_size=12 .*8 devices.* such as 8 or 16\.$"),
    ({"batch_size": 4}, r"batch_size=4 .* such as 8\.$"),
    ({"objective.name": "imsvdd"}, r"objective 'imsvdd'.*imsvd"),
    ({"model.backbone": "resnet"}, r"backbone 'resnet'.*resnet50"),
    ({"data.name": "shape"}, r"source 'shape'.*shapes"),
    ({"optimizer.name": "lamb"}, r"optimizer 'lamb'.*lars"),
    ({"model.projector": (32, 60)}, r"60.*num_bins.*8"),
    ({"data.num_examples": 0}, r"(?i)empty|no images|num_examples"),
    ({"views.view1.size": 16}, r"view1\.size=16"),
    ({"views.view1.crop_scale": (0.5,)}, r"crop_scale is \(0\.5,\); expected"),
    ({"views.view2.crop_ratio": (1.0, 1.2, 2.0)}, "crop_ratio is"),
    ({"views.view2.blur_sigma": (1.0,)}, r"views\.view2\.blur_sigma is"),
    ({"model.projector": ("abc",)}, r"model\.projector is \('abc',\)"),
    ({"model.projector": ()}, r"model\.projector is \(\); expected one or"),
    ({"epochs": 0.0}, r"epochs=0\.0; expected more than 0"),
    ({"epochs": -1.0}, r"epochs=-1\.0; expected more than 0"),
    ({"objective.imsvd.temperature": 0.0}, "temperature"),
    (
      {"objective.name": "mveb", "objective.mveb.group_size": 5},
      "group_size is 5 and the batch is 16",
    ),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input_is_one_clear_line(overrides, message, tmp_path):
  with pytest.raises(UserError, match=message) as error:
    train_and_evaluate(debug_config(**overrides), str(tmp_path / "run"))
  assert "\n" not in str(error.value)
  assert not (tmp_path / "run").exists()  # Nothing left behind.


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config.batchsize=1"], "batch_size"),
    (["--config.objective.name=nonsense"], "Known: .*imsvd"),
    (["--wrkdir=x"], "workdir"),
    (["extra"], "extra"),
  ],
)
def test_the_command_line_answers_a_mistake_in_one_line(arguments, message):
  result = run_main("--config=configs/digits.py:debug", *arguments)
  assert result.returncode == 2
  assert re.search(message, result.stderr)
  assert "Traceback" not in result.stderr
  assert result.stderr.count("\n") == 1, result.stderr


def test_a_missing_recipe_is_named():
  result = run_main("--config=configs/nonsense.py")
  assert result.returncode == 2
  assert "configs/nonsense.py" in result.stderr
  assert "Traceback" not in result.stderr


def test_metrics_lines_past_the_checkpoint_are_dropped(tmp_path):
  path = tmp_path / metrics.METRICS_FILE
  lines = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3)]
  path.write_text("\n".join(lines) + '\n{"step": 4, "lo')  # Cut by a kill.
  metrics.MetricWriter(str(tmp_path), start_step=2).close()
  assert path.read_text() == "\n".join(lines[:2]) + "\n"


@pytest.mark.proof
def test_a_collapsing_run_is_warned_about_within_a_hundred_steps(
  tmp_path, capsys
):
  """Invariance alone: the constant code is its minimum."""
  config = small_config(
    **{
      "epochs": 25.0,  # 75 steps.
      "eval.every_epochs": 0.0,
      "log.every_steps": 5,
      "checkpoint.every_steps": 1000,
      "objective.imsvd.diagonal_weight": 0.0,
      "objective.imsvd.off_diagonal_weight": 0.0,
      "optimizer.base_learning_rate": 20.0,
    }
  )
  train_and_evaluate(config, str(tmp_path))
  assert re.search(
    r"WARNING at step \d+: The run is collapsing", capsys.readouterr().err
  )
