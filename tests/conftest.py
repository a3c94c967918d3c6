"""Eight fake CPU devices for every test, set before jax is imported."""

import os

from imsvd_jax.base import cpu_devices

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  # Tests compile far more than they compute.
  + " --xla_backend_optimization_level=0"
)
cpu_devices.spare_threads()
