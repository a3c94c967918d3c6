"""Runs on disk that the tests read, damage and continue."""

from imsvd_jax.runs import checkpointer
from tests.runs.checkpoint_child import CONFIG, make_state


def open_run(workdir, **kwargs):
  return checkpointer.Checkpointer(
    workdir, **{"keep_last": 5, "config": CONFIG, **kwargs}
  )


def save_run(workdir, steps, **kwargs):
  run = open_run(workdir, **kwargs)
  for step in steps:
    assert run.save(step, make_state(step))
  run.close()


def files_of(directory):
  return sorted(path for path in directory.rglob("*") if path.is_file())
