"""What decoders print is hidden, and nothing else is lost or delayed."""

import os
import signal
import subprocess
import sys

import pytest

CHILD = """
import logging, os, signal, subprocess, sys, time
from imsvd_jax.commands import command_line

def main():
  os.write(2, b"Corrupt JPEG data: premature end\\nof C\\n")
  exec(os.environ["DOES"])

command_line.run(main, about="a test")
"""


def run(does, *words, **options):
  environment = {"DOES": does, **options.pop("env", {})}
  return subprocess.run(
    [sys.executable, "-c", CHILD, *words],
    env=os.environ | environment,
    text=True,
    check=False,
    **{"stderr": subprocess.PIPE, **options},
  )


@pytest.mark.parametrize(
  ("does", "code"),
  [
    ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ("os.abort()", -signal.SIGABRT),
  ],
)
def test_the_last_line_of_a_crash_is_there(does, code):
  result = run(f"os.write(2, b'the last line'); {does}")
  assert result.returncode == code
  assert result.stderr.count("of C\n") == 1
  assert "the last line" in result.stderr
  assert "Corrupt" not in result.stderr


@pytest.mark.parametrize(
  "line",
  [
    "Input file read error",
    "Premature end of input file",
    "Too many color components: 60, max 10",
    "WARNING: All log messages before absl::InitializeLog() is called are",
    "I0000 00:00:179.67 12 cudart_stub.cc:31] Could not find cuda drivers",
    "E0000 00:00:179.67 12 cuda_platform.cc:52] failed call to cuInit",
    "To enable the following instructions: AVX2 AVX512F, in other operations",
  ],
)
def test_what_libraries_print_is_hidden(line):
  result = run(f"os.write(2, {line!r}.encode() + b'\\nnext\\n')")
  assert result.stderr.splitlines() == ["of C", "next"]


def test_all_lines_reach_a_file(tmp_path):
  with open(tmp_path / "log", "wb") as log:
    run("print('ours', file=sys.stderr)", stderr=log)
  assert sorted((tmp_path / "log").read_text().split("\n")) == [
    *("", "of C", "ours")
  ]


def test_log_lines_keep_their_order():
  lines = "logging.warning('%d', i); print('line', i, file=sys.stderr)"
  result = run(f"for i in range(9): {lines}")
  ours = [x.split()[-1] for x in result.stderr.splitlines() if x != "of C"]
  assert ours == [str(i) for i in range(9) for _ in range(2)]


FILTER = "pid = int(subprocess.check_output(['pgrep', '-P', str(os.getpid()),"
FILTER += " 'grep'])); "


def test_a_signal_to_the_whole_job_does_not_end_the_filter():
  """As systemd and Slurm send it."""
  does = f"{FILTER}os.kill(pid, 15); os.kill(pid, 2); os.kill(pid, 1)"
  result = run(f"{does}; time.sleep(0.2); os.write(2, b'more of C\\n')")
  assert result.returncode == 0
  assert "more of C\n" in result.stderr


def test_a_filter_that_dies_takes_no_line_of_ours():
  does = f"{FILTER}os.kill(pid, 9); time.sleep(0.2); logging.warning('a')"
  result = run(f"{does}; print('b', file=sys.stderr)")
  assert result.returncode == 0, result.stderr
  assert result.stderr.splitlines()[-1] == "b"
  assert result.stderr.splitlines()[-2].endswith("a")


@pytest.mark.parametrize(
  ("words", "path"), [((), "/nowhere"), (("--verbosity=0",), None)]
)
def test_without_the_filter_all_is_shown(words, path):
  env = {"PATH": path} if path else {}
  result = run("print('ours', file=sys.stderr)", *words, env=env)
  assert result.returncode == 0
  lines = result.stderr.splitlines()
  assert lines == ["Corrupt JPEG data: premature end", "of C", "ours"]


def test_a_program_of_others_gets_its_lines_back():
  does = """
import logging, os, sys
from imsvd_jax.commands import decoder_lines
with decoder_lines.hidden():
  os.write(2, b"Corrupt JPEG data: premature end\\nof C\\n")
  print("of Python", file=sys.stderr)
  logging.getLogger("imsvd_jax.data").warning("left out")
os.write(2, b"Corrupt JPEG data: behind it\\n")
print("the end", file=sys.stderr)
"""
  result = subprocess.run(
    [sys.executable, "-c", does],
    check=True,
    text=True,
    stderr=subprocess.PIPE,
  )
  assert sorted(result.stderr.splitlines()) == [
    "Corrupt JPEG data: behind it",
    "left out",
    "of C",
    "of Python",
    "the end",
  ]
