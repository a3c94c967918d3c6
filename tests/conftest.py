"""Eight fake CPU devices for every test, and compilation made cheap.

Everything is set before jax starts, and inherited by the processes that xdist
and the tests start.
"""

import atexit
import os
import pathlib
import shutil
import tempfile
from importlib import metadata

import pytest

from imsvd_jax.base import cpu_devices

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Tests compile far more than they compute.
_FLAGS = [
  "--xla_force_host_platform_device_count=8",
  "--xla_backend_optimization_level=0",
]
if metadata.version("jaxlib").startswith("0.10."):
  # XLA's older code generator compiles in half the time; jaxlib 0.11 has lost
  # it, so the tests on that line cover the newer one.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  # One cache for this test session: no program compiles twice in it.
  _CACHE = tempfile.mkdtemp(prefix="imsvd_jax_tests_")
  atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# The key that signs runs is not the developer's.
_STATE = tempfile.mkdtemp(prefix="imsvd_jax_state_")
atexit.register(shutil.rmtree, _STATE, ignore_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE

cpu_devices.spare_threads()


def pytest_configure(config: pytest.Config) -> None:
  """Keeps all tests but those of `-m gpu` on the CPU."""
  if config.option.markexpr != "gpu":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_ignore_collect(
  collection_path: pathlib.Path, config: pytest.Config
) -> bool | None:
  """Leaves files without a test for a GPU alone in `-m gpu`.

  Many import TensorFlow, which a machine with a GPU need not have.
  """
  if config.option.markexpr != "gpu":
    return None
  files = [collection_path]
  if collection_path.is_dir():
    files = list(collection_path.rglob("test_*.py"))
  return not any("mark.gpu" in file.read_text() for file in files) or None


def pytest_runtest_setup(item: pytest.Item) -> None:
  """Skips tests for a GPU elsewhere: another marker may have chosen them."""
  if item.get_closest_marker("gpu"):
    import jax

    if jax.default_backend() != "gpu":
      pytest.skip("needs a GPU")
