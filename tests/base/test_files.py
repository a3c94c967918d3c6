"""A run's files in a bucket, and what is said where they cannot be."""

import errno
import json
import os

import pytest
import tensorflow as tf

from imsvd_jax.base import files
from imsvd_jax.base.errors import Damage, UserError
from imsvd_jax.evaluation.online import record_results
from imsvd_jax.evaluation.results import Result
from imsvd_jax.runs import checkpointer, metrics, verification, weights
from tests.runs import fake_bucket
from tests.runs.checkpoint_child import CONFIG, make_state, same

RUN = "gs://bucket/a/run"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """The folder of gs://bucket/a/run, which is not there yet."""
  fake_bucket.install(monkeypatch, tmp_path / "buckets")
  return tmp_path / "buckets" / "bucket" / "a" / "run"


def test_metrics_are_in_the_bucket_after_each_sync(bucket):
  workdir = files.make(RUN)
  assert workdir == RUN
  path = bucket / metrics.METRICS_FILE
  writer = metrics.MetricWriter(workdir, start_step=0)
  for step in (1, 2, 3):
    writer.write(step, {"loss": 1.0})
    if step == 2:
      writer.sync()
      assert path.read_text().count("\n") == 2
  writer.close()
  line = '{"step": 3, "loss": 1.0}\n'
  assert path.read_text().endswith(line)
  assert [x["step"] for x in metrics.read_metrics(workdir)] == [1, 2, 3]
  assert list((bucket / "tensorboard").glob("events*"))
  # The run goes on from a checkpoint before the last lines.
  writer = metrics.MetricWriter(workdir, start_step=2)
  assert [x["step"] for x in metrics.read_metrics(workdir)] == [1, 2]
  writer.write(3, {"loss": 1.0})
  writer.close()
  assert path.read_text().endswith(line)
  assert [x["step"] for x in metrics.read_metrics(workdir)] == [1, 2, 3]


def test_metrics_removed_from_the_bucket_are_not_made_again(bucket):
  writer = metrics.MetricWriter(files.make(RUN), start_step=0)
  (bucket / metrics.METRICS_FILE).unlink()
  writer.write(1, {"loss": 1.0})
  with pytest.raises(UserError, match="is gone"):
    writer.sync()
  assert not (bucket / metrics.METRICS_FILE).exists()
  writer.close()


RESULT = Result("knn/final", "knn", {}, {"name": "digits"}, 3, 0, final=0.5)


def test_results_are_in_the_bucket(bucket):
  record_results(str(files.make(RUN)), [RESULT])
  content = json.loads((bucket / "results.json").read_text())
  assert [entry["final"] for entry in content["results"]] == [0.5]


def test_results_that_cannot_be_written_are_one_line(tmp_path):
  unfinished = f"results.json.{os.getpid()}.unfinished"
  (tmp_path / unfinished).symlink_to("/dev/full")
  with pytest.raises(UserError, match="No space left on device") as error:
    record_results(str(tmp_path), [RESULT])
  assert "\n" not in str(error.value)


def test_checkpoints_are_in_the_bucket(bucket):
  run = checkpointer.Checkpointer(RUN, keep_last=2, config=CONFIG)
  for step in (1, 2, 3):
    assert run.save(step, make_state(step))
  run.close()
  folder = bucket / "checkpoints"
  assert {path.name for path in folder.iterdir()} == {"2", "3"}
  assert json.loads((bucket / "config.json").read_text()) == CONFIG
  (folder / "3" / "meta" / "metadata").unlink()
  run = checkpointer.Checkpointer(RUN, keep_last=2, config=CONFIG)
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))
  assert {path.name for path in folder.iterdir()} == {"2", "damaged-3"}
  assert weights.load_variables(RUN).step == 2


def test_a_bucket_that_refuses_is_one_line(bucket, monkeypatch):
  """But what may be the network's is left to a supervisor's next try."""
  refusal = tf.errors.PermissionDeniedError(None, None, "no access\nto it")

  def refuse(*args):
    raise refusal

  run = checkpointer.Checkpointer(RUN, keep_last=2, config=CONFIG)
  writer = metrics.MetricWriter(RUN, start_step=0)
  writer.write(1, {"loss": 1.0})
  attempts = (
    lambda: files.make(RUN),
    lambda: checkpointer.Checkpointer(RUN, keep_last=2, config=CONFIG),
    writer.sync,
    lambda: record_results(RUN, [RESULT]),
  )
  with monkeypatch.context() as patch:
    patch.setattr(fake_bucket._Files, "GFile", refuse)
    patch.setattr(fake_bucket._Files, "makedirs", refuse, raising=False)
    for attempt in attempts:
      with pytest.raises(UserError, match="no access") as error:
        attempt()
      assert "\n" not in str(error.value)
    refusal = tf.errors.UnavailableError(None, None, "try again")
    for attempt in attempts:
      with pytest.raises(tf.errors.UnavailableError):
        attempt()
  run.close()
  writer.close()


def test_what_a_bucket_needs_is_said(monkeypatch):
  monkeypatch.setattr(files, "_has_cloud_storage", lambda: False)
  with pytest.raises(UserError, match=r"\[gcs\]"):
    files.make(RUN)
  with pytest.raises(UserError, match="gz://b/run is neither a directory"):
    files.make("gz://b/run")


@pytest.mark.parametrize(
  ("path", "error", "passing"),
  [
    (RUN, ValueError("UNAVAILABLE: socket closed"), True),
    (RUN, TimeoutError(), True),
    (RUN, ValueError("crc32c does not match"), False),
    ("/disk/run", TimeoutError(), True),
    ("/disk/run", OSError(errno.EMFILE, "Too many open files"), True),
    ("/disk/run", ValueError("reading /d: Input/output error"), True),
    ("/disk/run", MemoryError(), True),
    ("/disk/run", FileNotFoundError(errno.ENOENT, "no such file"), False),
    ("/disk/TimeoutError", ValueError("/disk/TimeoutError: bad crc"), False),
  ],
)
def test_a_network_or_a_machine_is_not_taken_for_damage(path, error, passing):
  expected = type(error) if passing else Damage
  with pytest.raises(expected), verification.reading(path):
    raise error
  outer = RuntimeError("restoring failed")
  outer.__cause__ = error
  assert files.is_passing(outer, path) == passing


def test_a_pipe_is_not_read(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  with pytest.raises(UserError, match="pipe is not a regular file"):
    files.read_if_there(tmp_path / "pipe")
  assert files.read_if_there(tmp_path / "absent") is None
