"""Fixtures of the tests about runs on disk."""

import gc
import pathlib
import shutil
import time

import pytest

from tests.runs.made_runs import save_run


@pytest.fixture(scope="module", autouse=True)
def no_abandoned_reads_left():
  """Lets the last of them complain here, where the filter holds."""
  yield
  time.sleep(0.2)
  gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run with steps 1 and 2; copy it before touching it."""
  workdir = tmp_path_factory.mktemp("saved") / "run"
  save_run(workdir, [1, 2])
  return workdir


@pytest.fixture
def run_copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))
