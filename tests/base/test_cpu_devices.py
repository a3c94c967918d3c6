"""Several CPU devices in one process do not starve each other."""

import os
import subprocess
import sys

import pytest

from imsvd_jax.base import cpu_devices

# All-to-alls dispatched far ahead, on as many threads as there are devices or
# more; XLA's patience cut from 40 s to 8.
PROGRAM = """
import os, sys
os.environ["XLA_FLAGS"] = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=4"
  " --xla_cpu_collective_call_terminate_timeout_seconds=8"
)
os.environ["PJRT_NPROC"] = sys.argv[1]
from imsvd_jax.base import cpu_devices
if sys.argv[2] == "ours":
  cpu_devices.make(2)
import jax
jax.config.update("jax_num_cpu_devices", 2)
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
mesh = jax.make_mesh((2,), ("data",))
swap = jax.jit(jax.shard_map(
  lambda x: jax.lax.psum(
    jax.lax.all_to_all(x, "data", 1, 0, tiled=True).sum(), "data"
  ),
  mesh=mesh, in_specs=P("data"), out_specs=P(),
))
x = jax.device_put(jnp.ones((8, 12)), jax.NamedSharding(mesh, P("data")))
for _ in range(30):
  for _ in range(100):
    y = swap(x)
  y.block_until_ready()
print(float(y))
"""


def _run(whose):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, "2", whose],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    check=False,
  )


def test_programs_dispatched_ahead_do_not_deadlock():
  result = _run("ours")
  assert result.returncode == 0, result.stderr[-2000:]
  assert float(result.stdout) == 8 * 12


@pytest.mark.slow
def test_it_is_xla_that_deadlocks():
  """Once this fails, `cpu_devices` can go."""
  assert "Termination timeout" in _run("XLA's").stderr


@pytest.mark.parametrize(
  ("environment", "threads"),
  [
    ({}, None),
    ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
    ({"XLA_FLAGS": "--a --xla_force_host_platform_device_count=64"}, "128"),
    ({"JAX_NUM_CPU_DEVICES": "64"}, "128"),
    ({"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "3"}, "4"),
    ({"JAX_NUM_CPU_DEVICES": "2", "PJRT_NPROC": "99"}, "99"),
  ],
)
def test_the_environment_gets_two_threads_a_device(
  environment, threads, monkeypatch
):
  for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  cpu_devices.spare_threads()
  assert os.environ.get("PJRT_NPROC") == threads
