"""Projection heads: from features to embeddings."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from imsvd_jax.base.errors import UserError
from imsvd_jax.models.resnet import INITS, batch_norm

_kernel_init = INITS["torch_default"]


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """Returns torch's initializer of a bias: within +-1 / sqrt(fan_in)."""
  bound = fan_in**-0.5

  def init(
    key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32
  ) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Projector(nn.Module):
  """Dense, batch norm, ReLU for each hidden width, then Dense.

  Kernels and biases start as torch's.

  Attributes:
    widths: Output widths of the Dense layers, the last one the embedding's:
      (8192, 8160) after 2048 features is the "2048-8192-8160" of the papers.
    hidden_bias: Whether hidden Dense layers have a bias (VICReg's and IMSVD's
      do, Barlow Twins' do not; the batch norm that follows cancels it).
    last_bias: Whether the last Dense layer has a bias (MVEB's does).
    dtype: Type that the layers compute in; the output is float32 or wider.
  """

  widths: Sequence[int]
  hidden_bias: bool = True
  last_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array, train: bool) -> jax.Array:
    """Maps features [B, F] to embeddings [B, D]."""
    if not self.widths:
      raise UserError("A projector has no widths; expected at least one.")
    x = features
    for i, width in enumerate(self.widths[:-1]):
      x = self._dense(i, width, x, self.hidden_bias)
      x = batch_norm(self.dtype, f"bn_{i}")(x, use_running_average=not train)
      x = nn.relu(x)
    last = len(self.widths) - 1
    x = self._dense(last, self.widths[last], x, self.last_bias)
    return x.astype(jnp.promote_types(self.dtype, jnp.float32))

  def _dense(
    self, i: int, width: int, x: jax.Array, use_bias: bool
  ) -> jax.Array:
    return nn.Dense(
      width,
      use_bias=use_bias,
      dtype=self.dtype,
      kernel_init=_kernel_init,
      bias_init=torch_uniform(x.shape[-1]),
      name=f"dense_{i}",
    )(x)
