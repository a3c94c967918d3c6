"""Views that grow during a run: compiled ahead, in step with the data."""

import io
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from imsvd_jax import data, train
from imsvd_jax.base import devices
from imsvd_jax.data import host_pipeline
from imsvd_jax.runs import log_lines, metrics, verification
from imsvd_jax.training import experiment as experiment_lib
from tests.train_child import small_config

# Of the nine steps, three per epoch, the first has the first size.
SCHEDULE = ((0, 8), (0.4, 12), (2, 16))
SIZES = [8] + 5 * [12] + 3 * [16]
COMPILED = "/jax/core/compile/backend_compile_duration"


def config_of(**overrides):
  return small_config(
    **{
      "views.resolution_schedule": SCHEDULE,
      "eval.every_epochs": 0.0,
      "log.every_steps": 1,
      "checkpoint.keep_last": 5,
      **overrides,
    }
  )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The workdir of a run, and the steps compiled before each was logged."""
  workdir, compiled = tmp_path_factory.mktemp("run"), []
  during = {}
  add = log_lines.StepLog.add

  def listen(event, seconds, **about):
    name = about.get("fun_name", "")
    compiled.extend([name] if event == COMPILED and "step" in name else [])

  def counted(self, step, *args, **kwargs):
    during[step] = len(compiled)
    add(self, step, *args, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(log_lines.StepLog, "add", counted)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
      train.train_and_evaluate(config_of(), str(workdir))
    finally:
      jax.monitoring.unregister_event_duration_listener(listen)
  return workdir, during


def test_each_size_is_compiled_once_before_the_first_step(run):
  assert set(run[1].values()) == {3}


def test_the_size_of_each_step_is_logged(run):
  lines = [x for x in metrics.read_metrics(str(run[0])) if "loss" in x]
  assert [line["view_size"] for line in lines] == SIZES


def test_a_stopped_run_goes_on_bit_for_bit(run, tmp_path, capsys):
  again = shutil.copytree(run[0], tmp_path / "run")
  for step in (6, 8, 9):  # Goes on from 4.
    shutil.rmtree(again / "checkpoints" / str(step))
  train.train_and_evaluate(config_of(), str(again))
  assert "8 from step 1, 12 from step 2, 16 from step 7" in (
    capsys.readouterr().err
  )
  leaves = lambda workdir: verification.read_meta(
    workdir / "checkpoints" / "9"
  )["leaves"]
  assert leaves(again) == leaves(run[0])
  read = lambda workdir: (workdir / metrics.METRICS_FILE).read_text()
  assert read(again) == read(run[0])


def test_files_are_cut_to_the_size_of_their_step(tmp_path):
  rng = np.random.default_rng(0)
  for number in range(48):
    file = io.BytesIO()
    pixels = rng.integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, "png")
    (tmp_path / f"{number}.png").write_bytes(file.getvalue())
  config = config_of(
    **{
      "data.name": "folder",
      "data.path": str(tmp_path),
      "data.num_examples": 0,
      "data.eval_split": "",
    }
  )
  source = data.make_source(config.data, "train")
  experiment = experiment_lib.build(config, source.num_examples)
  mesh = devices.make_mesh(jax.devices()[:1])
  batches = list(train._batches(experiment, source, mesh, range(2, 10)))
  assert [b["views"][0].shape[2] for b in batches] == SIZES[1:]
  # Those of a run that has had this size from the start.
  views = experiment_lib.at_size(config, 16).views
  alone = host_pipeline.train_batches(
    source, views=views, batch_size=16, seed=config.seed, start_step=7
  )
  expected = next(alone)
  np.testing.assert_array_equal(batches[6]["views"][0], expected["views"][0])
  np.testing.assert_array_equal(batches[6]["index"], expected["index"])


def test_phases_follow_the_position_in_the_run():
  """Of a run continued with half the batch size, which has done 3 steps."""
  config = config_of(batch_size=8)
  progress = experiment_lib.Progress(images=48)
  experiment = experiment_lib.build(config, 48, step=3, progress=progress)
  steps = range(4, experiment.last_step + 1)
  assert steps.stop == 16  # Twelve batches of 8 are left of 18.
  phases = [(range(4, 10), 12), (range(10, 16), 16)]
  assert experiment.phases(steps) == phases
  assert [experiment.view_size(step) for step in steps] == 6 * [12] + 6 * [16]
