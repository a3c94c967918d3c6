"""No compiled step needs more work, memory or traffic than the recorded one."""

import json

import pytest

from tests import recorded_costs
from tests.run_command import run_python

TOLERANCE = 0.02  # Compilers of one version differ a little between machines.


def measured_alone(program):
  """The figures of a program, measured by a process of its own.

  That process has neither the tests' devices nor their cheap compilation.
  """
  result = run_python(
    "-m",
    "tests.recorded_costs",
    program,
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    XLA_FLAGS="",
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


def differences(measured, expected):
  """The figures that differ by more than the tolerance, as lines."""
  return [
    f"{name}: {measured.get(name, 0):,} instead of {expected.get(name, 0):,}"
    for name in sorted(measured.keys() | expected.keys())
    if measured.get(name, 0)
    != pytest.approx(expected.get(name, 0), rel=TOLERANCE)
  ]


@pytest.mark.proof
@pytest.mark.parametrize("program", recorded_costs.PROGRAMS)
def test_the_step_costs_what_it_did(program):
  compiler = recorded_costs.versions(recorded_costs.PROGRAMS[program][1])
  expected = recorded_costs.recorded().get(program, {}).get(compiler)
  if expected is None:
    pytest.skip(
      f"No figures of {compiler or 'libtpu, which is missing'} are recorded;"
      " python -m tests.recorded_costs write."
    )
  found = differences(measured_alone(program), expected)
  assert not found, (
    f"{program}: {'; '.join(found)}. If this is meant, python -m"
    " tests.recorded_costs write."
  )


def test_a_difference_is_seen():
  expected = {"flops": 100.0, "all-reduce, count": 3}
  assert not differences({"flops": 101.0, "all-reduce, count": 3}, expected)
  (more,) = differences({"flops": 103.0, "all-reduce, count": 3}, expected)
  assert more == "flops: 103.0 instead of 100.0"
  (lost,) = differences({"flops": 100.0}, expected)
  assert lost == "all-reduce, count: 0 instead of 3"
  (new,) = differences(expected | {"all-gather, count": 1}, expected)
  assert new == "all-gather, count: 1 instead of 0"
