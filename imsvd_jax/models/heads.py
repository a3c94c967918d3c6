"""Projection heads: from features to embeddings."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.models.resnet import batch_norm

# torch's Linear: uniform within +-1 / sqrt(fan_in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
  bound = fan_in**-0.5

  def init(
    key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
  ) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Projector(nn.Module):
  """Dense, batch norm, ReLU for each hidden width, then Dense without bias.

  Attributes:
    widths: Output widths of the Dense layers, the last one the embedding's:
      (8192, 8160) after 2048 features is the "2048-8192-8160" of the papers.
    hidden_bias: Whether hidden Dense layers have a bias (VICReg's and IMSVD's
      do, Barlow Twins' do not; the batch norm that follows cancels it).
    dtype: Type that the layers compute in; the output is float32 or wider.
  """

  widths: Sequence[int]
  hidden_bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, train: bool) -> jax.Array:
    """Maps features [B, F] to embeddings [B, D]."""
    if not self.widths:
      raise UserError("A projector has no widths; expected at least one.")
    x = features
    for i, width in enumerate(self.widths[:-1]):
      x = nn.Dense(
        width,
        use_bias=self.hidden_bias,
        dtype=self.dtype,
        kernel_init=_kernel_init,
        bias_init=_bias_init(x.shape[-1]),
        name=f"dense_{i}",
      )(x)
      x = batch_norm(self.dtype, f"bn_{i}")(x, use_running_average=not train)
      x = nn.relu(x)
    x = nn.Dense(
      self.widths[-1],
      use_bias=False,
      dtype=self.dtype,
      kernel_init=_kernel_init,
      name=f"dense_{len(self.widths) - 1}",
    )(x)
    return x.astype(jnp.promote_types(self.dtype, jnp.float32))
