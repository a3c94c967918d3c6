"""How the state is divided over the devices, by `sharding.state` of a recipe.

A leaf that is split has a part on every device. The step puts weights together
where the network reads them, in the type that it computes in, and sums
gradients part by part: XLA makes all-gathers and reduce-scatters of that.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from imsvd_jax.base.devices import AXIS

# By mode, the fields of the state whose leaves are split.
MODES: dict[str, tuple[str, ...]] = {
  "replicated": (),
  "optimizer": ("opt_state", "target"),  # ZeRO-1.
  "all": ("opt_state", "target", "params"),  # FSDP.
}
REPLICATED = "replicated"
_SMALL = 1024  # Elements. Less than that is not worth a collective.


def spec(leaf: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
  """Returns how a leaf is split: its largest dimension that divides evenly.

  Vectors, and what is small or does not divide, stay whole.
  """
  count = mesh.shape[AXIS]
  even = [size for size in leaf.shape if size % count == 0]
  if count == 1 or leaf.ndim < 2 or leaf.size < _SMALL or not even:
    return PartitionSpec()
  axis = leaf.shape.index(max(even))
  return PartitionSpec(*[None] * axis, AXIS)


def of_state(state: Any, mesh: Mesh, mode: str) -> Any:
  """Returns the sharding of each leaf of a train state, or of its shapes."""
  whole = NamedSharding(mesh, PartitionSpec())
  part = lambda leaf: NamedSharding(mesh, spec(leaf, mesh))
  shardings = jax.tree.map(lambda _: whole, state)
  return shardings.replace(
    **{name: jax.tree.map(part, getattr(state, name)) for name in MODES[mode]}
  )


def split(tree: Any, mode: str) -> Any:
  """Inside a step: lets each device compute with its parts of the leaves."""
  if not _divides(mode):
    return tree
  return jax.tree.map(_split, tree)


def whole(params: Any, mode: str) -> Any:
  """Inside a step: gives each device all weights; splits their gradients."""
  if not _divides(mode):
    return params
  return jax.tree.map(_whole, params)


def _divides(mode: str) -> bool:
  return mode != REPLICATED and not jax.sharding.get_abstract_mesh().empty


def _split(x: jax.Array) -> jax.Array:
  mesh = jax.sharding.get_abstract_mesh()
  return jax.lax.with_sharding_constraint(x, spec(x, mesh))


@jax.custom_vjp
def _whole(x: jax.Array) -> jax.Array:
  return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _whole_fwd(x: jax.Array) -> tuple[jax.Array, None]:
  return _whole(x), None


def _whole_bwd(_: None, gradient: jax.Array) -> tuple[jax.Array]:
  return (_split(gradient),)


_whole.defvjp(_whole_fwd, _whole_bwd)
