"""The contenders of the k-NN benchmark classify alike."""

import pytest

from imsvd_jax.benchmarks import knn_search


@pytest.fixture(scope="module")
def measurements():
  sizes = (600, 100, 64, 20)
  return [knn_search.measure(name, sizes) for name in knn_search.CONTENDERS]


def test_all_contenders_agree(measurements):
  top1 = {m.contender: m.top1 for m in measurements}
  assert 0.02 < top1["streamed"] < 0.9
  assert set(top1.values()) == {top1["streamed"]}


def test_table(measurements):
  lines = knn_search.table(measurements).splitlines()
  assert len(lines) == 2 + len(knn_search.CONTENDERS)
  assert lines[2].startswith("| streamed | 0.")


@pytest.mark.slow
def test_every_contender_runs_in_its_own_process():
  found = knn_search.benchmark(2000, 300, 32, 20).numbers
  assert [m["contender"] for m in found] == list(knn_search.CONTENDERS)
  assert all(m["seconds"] > 0 for m in found)
