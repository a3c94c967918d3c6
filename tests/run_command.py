"""Runs `imsvd` as a user types it, and checks how it refuses a mistake."""

import contextlib
import os
import pathlib
import subprocess
import sys

import pytest

from imsvd_jax.base.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def run_python(*arguments, cwd=ROOT, **environment):
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=cwd,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    check=False,
  )


def run_imsvd(*words, **environment):
  return run_python("-m", "imsvd_jax", *words, **environment)


def check_refused(result, message):
  """A wrong command line prints one line on standard error and nothing else."""
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.startswith("error: ")
  assert message in result.stderr
  assert result.stderr.count("\n") == 1


@contextlib.contextmanager
def one_line_error(message):
  """The block raises a UserError of one line."""
  with pytest.raises(UserError, match=message) as error:
    yield error
  assert "\n" not in str(error.value)
