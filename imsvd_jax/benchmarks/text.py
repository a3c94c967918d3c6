"""Numbers as people read them."""

from imsvd_jax.benchmarks import timing


def spread(value: timing.Spread | None) -> str:
  """Returns "median [min, max]"."""
  if value is None:
    return "-"
  return f"{value.median:.4g} [{value.min:.4g}, {value.max:.4g}]"


def size(value: float | None) -> str:
  """Returns bytes for people: 450 MB."""
  if value is None:
    return "-"
  return f"{quantity(value)}B" if value else "0"


def quantity(value: float | None) -> str:
  """Returns three digits and a prefix: 6.43 T."""
  if value is None:
    return "-"
  for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
    if value >= unit:
      return f"{value / unit:.3g} {prefix}"
  return f"{value:.3g} "
