"""Numbers as people read them, and what a benchmark returns."""

from typing import Any, NamedTuple

from imsvd_jax.benchmarks.timing import Spread


class Findings(NamedTuple):
  """The results of a benchmark."""

  text: str  # For people.
  numbers: Any  # The same and more, for --json; seconds, bytes, FLOP.


def spread(value: Spread | None) -> str:
  """Returns "median [min, max]"."""
  if value is None:
    return "-"
  return f"{value.median:.4g} [{value.min:.4g}, {value.max:.4g}]"


def quantity(value: float | None, unit: str = "") -> str:
  """Returns three digits and a prefix: "6.43 TFLOP"."""
  if value is None:
    return "-"
  for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= factor:
      return f"{value / factor:.3g} {prefix}{unit}"
  return f"{value:.3g} {unit}".rstrip()


def size(value: float | None) -> str:
  """Returns decimal bytes: "450 MB"."""
  return quantity(value, "B") if value != 0 else "0"


def binary_size(value: float) -> str:
  """Returns the bytes of a memory: "15.75 GiB"."""
  if abs(value) < 0.005 * 2**30:
    return f"{value / 2**20:.2f} MiB"
  return f"{value / 2**30:.2f} GiB"
