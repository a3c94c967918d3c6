"""The command lines: what a stranger types, and types wrong."""

import json
import pathlib
import subprocess
import sys

import pytest

from imsvd_jax.commands import benchmark, command_line

ROOT = pathlib.Path(__file__).parents[2]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "imsvd_jax", "benchmark", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ([], "error: The command is missing. Give one of loss, precision, step"),
    (["los"], "error: Unknown command 'los'. Did you mean 'loss'?"),
    (["--num_bins=3"], "error: Unknown command '--num_bins=3'."),
  ],
)
def test_a_wrong_command_is_one_line(words, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["benchmark", *words])
  with pytest.raises(SystemExit) as exit_:
    command_line.command(benchmark._COMMANDS)
  assert exit_.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith(message)
  assert error.count("\n") == 1


def test_a_known_command_is_returned(monkeypatch):
  monkeypatch.setattr(sys, "argv", ["benchmark", "step", "--help"])
  assert command_line.command(benchmark._COMMANDS) == "step"


def test_help_lists_the_commands():
  result = run("--help")
  assert result.returncode == 0
  for command in benchmark._COMMANDS:
    assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("loss", "--num_images=1"), "--num_images=1; expected at least 2."),
    (("step", "--confg=x"), "Unknown flag --confg. Did you mean 'config'?"),
    (("step", "--config=configs/digits.py", "--devices=-3"), "--devices=-3"),
    (("loss", "--devices=0"), "--devices=0"),
    (("loss", "now"), "Unexpected argument 'now'"),
  ],
)
def test_a_wrong_flag_is_one_line(arguments, message):
  result = run(*arguments)
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.startswith("error: ")
  assert message in result.stderr
  assert result.stderr.count("\n") == 1


def test_json_is_all_that_is_printed():
  result = run(
    *("loss", "--num_images=8", "--num_variables=3", "--num_bins=4"),
    *("--rounds=1", "--noalternatives", "--devices=2", "--json"),
  )
  assert result.returncode == 0, result.stderr
  figures = json.loads(result.stdout)
  assert figures["machine"]["command"].endswith("--devices=2 --json")
  assert [r["name"] for r in figures["results"]] == ["streamed", "floor"]
