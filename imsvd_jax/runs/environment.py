"""Settings outside a recipe that change a run's numbers; versions."""

import enum
from typing import Any

import jax
import jaxlib

from imsvd_jax.base.errors import UserError

# Options of JAX. Each is also an environment variable, in capitals.
_OPTIONS = (
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_disable_jit",
  "jax_disable_most_optimizations",
  "jax_enable_x64",
  "jax_random_seed_offset",
  "jax_softmax_custom_jvp",
  "jax_threefry_partitionable",
)
# Options that the programs of a run need.
_NEEDED = {
  "jax_enable_x64": (False,),
  "jax_numpy_dtype_promotion": ("standard",),
  "jax_numpy_rank_promotion": ("allow", "warn"),
}


def check() -> None:
  """Raises UserError if an option of JAX does not suit a run."""
  for name, allowed in _NEEDED.items():
    value = _plain(getattr(jax.config, name))
    if value not in allowed:
      raise UserError(
        f"{name.upper()} is {value}; training needs {allowed[0]}. Unset this"
        " environment variable (and this option of jax.config)."
      )


def settings() -> dict[str, Any]:
  """Returns JAX's settings that change numbers, by environment variable.

  Their values in this process: a program may set them without the environment.
  An option that this version of JAX does not have is left out.
  """
  values = {name: getattr(jax.config, name, ...) for name in _OPTIONS}
  return {
    name.upper(): _plain(value)
    for name, value in values.items()
    if value is not ...
  }


def _plain(value: Any) -> Any:
  """Returns the value of an enumeration's member; others as they are."""
  return value.value if isinstance(value, enum.Enum) else value


def versions() -> dict[str, str]:
  """Returns the versions of the packages that compute the numbers."""
  return {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
