"""The contenders of the k-NN benchmark classify alike."""

import pytest

from imsvd_jax.evaluators import benchmark


@pytest.fixture(scope="module")
def measurements():
  problem = benchmark.make_problem(600, 100, 64, 20)
  return [benchmark.measure(name, problem) for name in benchmark.CONTENDERS]


def test_all_contenders_agree(measurements):
  top1 = {m.contender: m.top1 for m in measurements}
  assert 0.02 < top1["streamed"] < 0.9
  assert set(top1.values()) == {top1["streamed"]}


def test_table(measurements):
  lines = benchmark.table(measurements).splitlines()
  assert len(lines) == 2 + len(benchmark.CONTENDERS)
  assert lines[2].startswith("| streamed | 0.")


@pytest.mark.slow
def test_every_contender_runs_in_its_own_process():
  found = benchmark.compare((2000, 300, 32, 20))
  assert [m.contender for m in found] == list(benchmark.CONTENDERS)
  assert all(m.seconds > 0 for m in found)
