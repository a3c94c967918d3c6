"""`imsvd benchmark`: right and wrong words, and what it prints."""

import functools
import json

import pytest

from imsvd_jax.commands import benchmark
from tests.run_command import check_refused, run_imsvd

run = functools.partial(run_imsvd, "benchmark")


def test_alone_it_lists_the_benchmarks():
  result = run()
  assert result.returncode == 0
  for name in benchmark.BENCHMARKS:
    assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", benchmark.BENCHMARKS)
def test_the_help_of_a_benchmark_is_its_own(name):
  result = run(name, "--help")
  assert result.returncode == 0, result.stderr
  assert f"\n  imsvd benchmark {name}" in result.stdout
  assert "\n  --json " in result.stdout
  others = set(benchmark.BENCHMARKS) - {name}
  assert not any(f"benchmark {o}" in result.stdout for o in others)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("los",), "Unknown command 'los'. Did you mean 'loss'?"),
    (("--num_bins=3",), "Unknown command '--num_bins=3'."),
    (("loss", "--num_images=1"), "--num_images=1; expected at least 2."),
    (("step", "--confg=x"), "Unknown flag --confg. Did you mean 'config'?"),
    (("step",), "--config is missing. Give it, for example --config="),
    (
      ("step", "--config=configs/digits.py", "--devices=-3"),
      "--devices=-3: expected a non-negative integer.",
    ),
    (("loss", "--devices=0"), "--devices=0: expected a positive integer."),
    (("loss", "now"), "Unexpected argument 'now'"),
    (("knn", "--neighbors=9", "--bank=8"), "expected at most 8"),
  ],
)
def test_a_wrong_word_is_one_line(arguments, message):
  check_refused(run(*arguments), message)


def test_json_is_all_that_is_printed():
  result = run(
    *("loss", "--num-images=8", "--num_variables=3", "--num_bins=4"),
    *("--rounds=1", "--noalternatives", "--devices=2", "--json"),
  )
  assert result.returncode == 0, result.stderr
  numbers = json.loads(result.stdout)
  command = numbers["machine"]["command"]
  assert command.startswith("imsvd benchmark loss --num-images=8 ")
  assert [r["name"] for r in numbers["results"]] == ["streamed", "floor"]
