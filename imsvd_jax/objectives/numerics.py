"""The precision of loss arithmetic, and unit vectors."""

import jax
import jax.numpy as jnp

# For matrix products in losses. TPU's and GPU's defaults round the inputs to
# two or three digits (bfloat16, TF32), too few for probabilities near 1e-4
# inside a logarithm or for cosines divided by a temperature of 0.1.
PRECISION = jax.lax.Precision.HIGHEST


def as_float32(x: jax.Array) -> jax.Array:
  """Returns `x` in float32, or untouched if it is float64.

  Probabilities near 1e-4 underflow in half precision exactly where training
  is meant to end, so a loss never computes in less than float32.
  """
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def unit_rows(x: jax.Array) -> jax.Array:
  """Returns the rows of `x` [N, D] divided by their norms, in float32.

  A row of zeros stays zero and has a finite gradient.
  """
  x = as_float32(x)
  squares = jnp.sum(x * x, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
