"""Devices to compile for: a slice of TPUs that need not exist, or this CPU."""

import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from imsvd_jax.base import cpu_devices
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.benchmarks.costs.chips import CHIPS, SLICES_2D, Chip

EXAMPLES = "v5e:4x4, v4:2x2x4 or cpu:8"


class Slice(NamedTuple):
  """What a program is compiled for."""

  name: str  # As in --topology.
  chip: Chip | None  # The kind of chip, None for the CPU.
  shape: tuple[int, ...]  # Chips along each dimension.
  # As many as there are chips; the TPUs are descriptions only.
  devices: list[Any]


def compile_only(name: str) -> None:
  """Keeps this process off the accelerators, which other programs may use.

  Also makes the CPU devices that the slice "cpu:N" asks for. Call it before
  anything touches a device.
  """
  jax.config.update("jax_platforms", "cpu")
  kind, _, count = name.partition(":")
  if kind == "cpu" and count.isdecimal() and int(count):
    cpu_devices.make(int(count))


def get_slice(name: str) -> Slice:
  """Returns the slice of a name such as "v5e:4x4" or "cpu:8".

  Raises:
    UserError: There is no such slice, or its compiler is not installed.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  if not match:
    raise UserError(f"Unknown topology {name!r}; expected such as {EXAMPLES}.")
  kind = match[1]
  shape = tuple(int(size) for size in match[2].split("x"))
  if kind == "cpu":
    if len(shape) > 1:
      raise UserError(
        f"Topology {name!r}: CPU devices have no shape; expected"
        f" cpu:{math.prod(shape)}."
      )
    return Slice(name, None, shape, _cpu_devices(name, math.prod(shape)))
  chip = lookup(CHIPS, kind, "chip")
  _check_shape(name, chip, shape)
  return Slice(name, chip, shape, _tpu_devices(name, chip, shape))


def _check_shape(name: str, chip: Chip, shape: tuple[int, ...]) -> None:
  if len(shape) != chip.dimensions:
    example = {2: "4x4", 3: "2x2x4"}[chip.dimensions]
    raise UserError(
      f"Topology {name!r} has {len(shape)} dimensions; {chip.name} slices have"
      f" {chip.dimensions}, such as {chip.name}:{example}."
    )
  if 0 in shape:
    raise UserError(f"Topology {name!r} is empty; expected such as {EXAMPLES}.")
  if chip.dimensions == 3 and (shape[0] % 2 or shape[1] % 2):
    raise UserError(
      f"Topology {name!r} does not divide into hosts of 2x2x1 chips; the first"
      " two sizes are even, such as 2x2x4."
    )
  if chip.dimensions == 2 and name.split(":")[1] not in SLICES_2D:
    raise UserError(
      f"No {chip.name} slice has the shape of {name!r}; there are"
      f" {', '.join(SLICES_2D)}."
    )


def _tpu_devices(name: str, chip: Chip, shape: tuple[int, ...]) -> list[Any]:
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(
      f"Topology {name!r} needs the TPU compiler (no TPU):"
      ' pip install "imsvd_jax[tpu]".'
    )
  # The library looks for the TPU of this machine unless told not to.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # It runs nothing, so another preflight or a run on this machine's TPU may go
  # on beside it.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  options: dict[str, Any] = {}
  if chip.name == "v4":  # As on Cloud TPU: a chip's two cores are one device.
    options["chip_config_name"] = "megacore_dense"
  if math.prod(shape) == 1:
    options["chips_per_host_bounds"] = [1, 1, 1]
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except (RuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise UserError(f"No topology {name!r}: {reason}") from error
  return list(description.devices)


def _cpu_devices(name: str, count: int) -> list[Any]:
  if not count:
    raise UserError(f"Topology {name!r} is empty; expected such as {EXAMPLES}.")
  found = jax.devices("cpu")
  if len(found) < count:
    raise UserError(
      f"Topology {name!r} asks for {count} CPU devices and there are"
      f" {len(found)}; set XLA_FLAGS=--xla_force_host_platform_device_count="
      f"{count}."
    )
  return found[:count]
