"""Functions of `stateless` inside of TensorFlow's graphs.

Each is one call of Python: for what a pipeline does once per batch or file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.data import stateless


def in_graph(
  function: Callable[..., np.ndarray],
  shape: tf.TensorShape | list[int | None],
  dtype: tf.DType,
  *tensors: Any,
) -> tf.Tensor:
  """Returns `function(*tensors)`, of NumPy arrays, with its shape known."""
  result = tf.numpy_function(function, tensors, dtype, stateful=False)
  return tf.ensure_shape(result, shape)


def fold_in(keys: Any, value: tf.Tensor) -> tf.Tensor:
  """Returns `stateless.fold_in` of one key and one value, a scalar."""
  return in_graph(stateless.fold_in, [], tf.uint64, keys, value)


def seed(keys: tf.Tensor) -> tf.Tensor:
  """Returns `stateless.seed`."""
  return in_graph(stateless.seed, keys.shape, tf.int64, keys)


def permute(offsets: tf.Tensor, size: int, key: tf.Tensor) -> tf.Tensor:
  """Returns `stateless.permute`."""
  return in_graph(
    lambda *x: stateless.permute(x[0], size, x[1]),
    offsets.shape,
    tf.int64,
    *(offsets, key),
  )
