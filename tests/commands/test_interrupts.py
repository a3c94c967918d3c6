"""SIGINT and a reader that ends early: no traceback, whatever is going on."""

import os
import subprocess
import sys

import pytest

from imsvd_jax.commands.command_line import EXIT_NO_READER
from tests.run_command import ROOT, run_python

INTERRUPT = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\n"
TRAIN = ["--config=configs/digits.py:debug", "--workdir=/dev/null/none"]


@pytest.mark.parametrize("library", ["absl", "ml_collections", "jax"])
@pytest.mark.parametrize(
  "words",
  [
    ["imsvd_jax.main", *TRAIN],
    ["imsvd_jax", "train", *TRAIN],
    ["imsvd_jax", "evaluate", "--workdir=runs/none"],
    ["imsvd_jax", "export", "--workdir=a", "--format=numpy", "--output=b"],
  ],
  ids=["main", "train", "evaluate", "export"],
)
def test_an_interrupt_in_an_import_is_one_line(words, library, tmp_path):
  """As if the user typed Ctrl-C while this library is imported."""
  (tmp_path / library).mkdir()
  (tmp_path / library / "__init__.py").write_text(INTERRUPT)
  path = f"{tmp_path}{os.pathsep}{ROOT}"
  result = run_python("-m", *words, PYTHONPATH=path)
  assert result.returncode == 130, result.stderr
  assert result.stderr == "Interrupted.\n"
  assert result.stdout == ""


COMMAND = """
import os, signal, sys
from imsvd_jax.base import interrupts
interrupts.listen()
from imsvd_jax.commands import command_line
def main():
  try:
    BODY
  finally:
    print("cleaned up", file=sys.stderr)
command_line.run(main)
"""


def test_an_interrupt_in_a_command_lets_it_clean_up():
  body = "os.kill(os.getpid(), signal.SIGINT)"
  result = run_python("-c", COMMAND.replace("BODY", body))
  assert result.returncode == 130
  assert result.stderr == "cleaned up\nInterrupted.\n"


def test_a_run_that_stopped_skips_the_interpreters_exit():
  """A signal may have stopped JAX within anything, and it crashed there."""
  body = (
    "import atexit; from imsvd_jax.base.errors import Stopped;"
    " atexit.register(print, 'at exit'); print('kept'); raise Stopped(75)"
  )
  result = run_python("-c", COMMAND.replace("BODY", body))
  assert result.returncode == 75
  assert result.stdout == "kept\n"
  assert result.stderr == "cleaned up\n"


def test_an_interrupt_that_python_does_not_hear_ends_at_once():
  """As in a compilation by XLA, which takes minutes."""
  body = (
    "import hashlib, threading; threading.Timer(0.2, os.kill, (os.getpid(),"
    " signal.SIGINT)).start(); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31-1)"
  )
  result = run_python("-c", COMMAND.replace("BODY", body))
  assert result.returncode == 130
  assert result.stderr == "Interrupted.\n"


@pytest.mark.parametrize(
  "moment",
  [
    "import gc; gc.callbacks.append(lambda *_: stop()); gc.collect()",
    "type('Gone', (), {'__del__': lambda self: stop()})()",
  ],
  ids=["garbage collection", "destructor"],
)
def test_an_interrupt_where_python_cannot_raise_is_not_lost(moment):
  code = COMMAND.replace("BODY", f"{moment}; time.sleep(60)")
  stop = (
    "import os, signal, time\nleft = [1]\n"
    "def stop(): left and left.pop() and os.kill(os.getpid(), signal.SIGINT)\n"
  )
  result = run_python("-c", stop + code)
  assert result.returncode == 130
  assert result.stderr == "cleaned up\nInterrupted.\n"


def test_an_ignored_interrupt_stays_ignored():
  """As of a job that a shell has put into the background."""
  code = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    + COMMAND.replace("BODY", "os.kill(os.getpid(), signal.SIGINT)")
  )
  result = run_python("-c", code)
  assert result.returncode == 0
  assert result.stderr == "cleaned up\n"


def run_without_reader(*arguments):
  """Runs Python; nobody reads what it prints."""
  reader, writer = os.pipe()
  os.close(reader)
  with os.fdopen(writer, "w") as output:
    return subprocess.run(
      [sys.executable, *arguments],
      cwd=ROOT,
      stdout=output,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )


@pytest.mark.parametrize("body", ["print('x')", "print('x' * 100_000)"])
def test_output_without_a_reader_is_no_traceback(body):
  result = run_without_reader("-c", COMMAND.replace("BODY", body))
  assert result.returncode == EXIT_NO_READER
  assert result.stderr == "cleaned up\n"


def test_help_without_a_reader_is_no_traceback():
  result = run_without_reader("-m", "imsvd_jax", "--help")
  assert result.returncode == 0
  assert result.stderr == ""


def test_another_broken_pipe_is_an_error():
  body = "raise BrokenPipeError('of a worker')"
  result = run_python("-c", COMMAND.replace("BODY", body))
  assert result.returncode == 1
  assert "BrokenPipeError: of a worker" in result.stderr
