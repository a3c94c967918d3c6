"""Nested configurations as one level."""

from typing import Any

# Keys that change neither the state nor the data: a continued run may set them,
# and runs that differ in them alone are the same experiment.
HARMLESS_KEYS = (
  "allow_changes",
  "checkpoint",
  "eval",
  "log",
  "init_from",
  "not_finite",
)


def flatten(config: Any) -> dict[str, Any]:
  """Returns {"data.name": "digits", ...}.

  Args:
    config: A dict or ConfigDict of them. An empty one below the first level is
      a value, so that its going away is a change.
  """
  flat = {}
  for key, value in config.items():
    if hasattr(value, "items") and value:
      flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat
