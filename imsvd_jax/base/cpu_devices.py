"""Several CPU devices in one process, and the threads that they need.

XLA gives its CPU client one thread per device, or per core if there are more
cores. A device that waits for its peers in a collective keeps its thread. If
programs are dispatched ahead, the next program can take the thread that the
last peer needs; then all wait forever, and XLA aborts the process after 40 s.
With two devices on two cores this happens within seconds, every time. Twice as
many threads as devices prevent it (measured with 2 and 8 devices); one more
thread does not.
"""

import os
import re

_COUNT_FLAG = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
_THREADS = "PJRT_NPROC"  # XLA's name for the number of threads.


def make(count: int) -> None:
  """Makes `count` CPU devices. Call it before anything touches a device.

  Args:
    count: How many, at least one.
  """
  import jax

  jax.config.update("jax_num_cpu_devices", count)
  _spare_threads(count)


def spare_threads() -> None:
  """Provides threads for the devices that the environment asks for."""
  counts = [
    int(n) for n in _COUNT_FLAG.findall(os.environ.get("XLA_FLAGS", ""))
  ]
  named = os.environ.get("JAX_NUM_CPU_DEVICES", "")
  counts += [int(named)] if named.isdecimal() else []
  if counts:
    _spare_threads(counts[-1])


def _spare_threads(count: int) -> None:
  if count < 2:
    return
  asked = os.environ.get(_THREADS, "")
  least = int(asked) if asked.isdecimal() else os.cpu_count() or 1
  os.environ[_THREADS] = str(max(least, 2 * count))
