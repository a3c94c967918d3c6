"""The precision of loss arithmetic, unit vectors, and lean softmaxes."""

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


@jax.custom_jvp
def log_sum_exp(x: jax.Array) -> jax.Array:
  """Returns log sum exp(x) over the last axis, kept with size one.

  Keeps nothing but its result for the backward pass, where the library's keeps
  an array as large as x. A softmax over a wide embedding is made of it.
  """
  return jax.nn.logsumexp(x, axis=-1, keepdims=True)


@log_sum_exp.defjvp
def _log_sum_exp_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  (x,), (x_dot,) = primals, tangents
  result = log_sum_exp(x)
  return result, jnp.sum(jnp.exp(x - result) * x_dot, axis=-1, keepdims=True)


def log_softmax(x: jax.Array) -> jax.Array:
  """Returns x - log sum exp(x) over the last axis, for finite x."""
  # The greatest first: the difference of two large numbers has few digits.
  greatest = jnp.max(x, axis=-1, keepdims=True)
  shifted = x - jax.lax.stop_gradient(greatest)
  return shifted - log_sum_exp(shifted)


def unit_rows(x: jax.Array) -> jax.Array:
  """Returns the rows of `x` [N, D] divided by their norms, in float32.

  A row of zeros stays zero and has a finite gradient.
  """
  x = as_float32(x)
  squares = jnp.sum(x * x, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(squares, 1e-12))
