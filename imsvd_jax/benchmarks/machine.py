"""The machine of a measurement: hardware, versions, date, free memory."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from typing import Any

import jax

from imsvd_jax.base.errors import UserError

_PACKAGES = ("jax", "jaxlib", "libtpu", "numpy", "torch")


def devices(count: int) -> list[jax.Device]:
  """Returns the first `count` devices of the default backend.

  Raises:
    UserError: There are fewer.
  """
  found = jax.devices()
  if count > len(found):
    raise UserError(
      f"--devices={count} and this machine has {len(found)}"
      f" ({found[0].device_kind}); ask for at most that many."
    )
  return found[:count]


def describe(used: list[jax.Device]) -> dict[str, Any]:
  """Returns the facts that a reader needs to judge or repeat a measurement."""
  packages = {}
  for name in _PACKAGES:
    try:
      packages[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return {
    "date": datetime.date.today().isoformat(),
    "command": f"{sys.argv[0]} {shlex.join(sys.argv[1:])}",
    "devices": len(used),
    "device_kind": used[0].device_kind,
    "platform": used[0].platform,
    "cpu": _cpu_name(),
    "cores": _cores(),
    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "python": platform.python_version(),
    **packages,
  }


def as_text(machine: dict[str, Any]) -> str:
  """Returns `describe`'s answer as two lines."""
  load = machine["load"]
  busy = "" if load is None else f", load {load:.1f} before the measurement"
  device = f"{machine['devices']} x {machine['device_kind']} on "
  if machine["platform"] == "cpu":
    device = ""
    if machine["devices"] > 1:
      device = f"{machine['devices']} devices of "
  versions = [f"python {machine['python']}"]
  versions += [f"{n} {machine[n]}" for n in _PACKAGES if n in machine]
  return (
    f"{device}{machine['cores']} cores of {machine['cpu']}{busy}\n"
    f"{', '.join(versions)}; {machine['date']}"
  )


def available_bytes(device: jax.Device) -> float | None:
  """Returns the memory that a program may take; None if unknown."""
  if device.platform != "cpu":
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else limit - stats.get("bytes_in_use", 0)
  try:
    with open("/proc/meminfo") as lines:
      sizes = dict(line.split(":", 1) for line in lines)
    return 1024.0 * int(sizes["MemAvailable"].split()[0])
  except (OSError, KeyError):
    return None


def _cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu_name() -> str:
  try:
    with open("/proc/cpuinfo") as lines:
      for line in lines:
        if line.startswith("model name"):
          return line.split(":", 1)[1].strip()
  except OSError:
    pass
  return platform.processor() or platform.machine()
