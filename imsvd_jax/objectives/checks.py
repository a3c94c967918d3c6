"""Checks of what a caller hands to an objective, all at trace time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError


def check_embeddings(embeddings: Sequence[jax.Array]) -> None:
  """Raises unless all views are floating-point arrays of one shape [N, D]."""
  for view, z in enumerate(embeddings):
    if z.ndim != 2 or 0 in z.shape:
      raise UserError(
        f"View {view + 1} has shape {z.shape}; expected embeddings [N, D]."
      )
    if not jnp.issubdtype(z.dtype, jnp.floating):
      raise UserError(
        f"View {view + 1} has dtype {z.dtype}; expected a floating-point type."
      )
    if z.shape != embeddings[0].shape:
      raise UserError(
        f"View {view + 1} has shape {z.shape} but view 1 has"
        f" {embeddings[0].shape}; all views need the same shape."
      )


def check_bins(num_entries: int, num_bins: int) -> None:
  """Raises unless D entries divide into variables of `num_bins` bins."""
  if num_bins < 2:
    raise UserError(f"num_bins is {num_bins}; expected at least 2.")
  if num_entries % num_bins:
    raise UserError(
      f"An embedding of {num_entries} entries does not divide into variables"
      f" of {num_bins} bins; choose a multiple of num_bins."
    )


def check_positive(name: str, value: float) -> None:
  """Raises if a hyper-parameter that divides is zero or negative."""
  if isinstance(value, (int, float)) and value <= 0:
    raise UserError(f"{name} is {value}; expected more than 0.")
