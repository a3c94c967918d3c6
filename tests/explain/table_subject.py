"""An encoder whose codes are written into the pixels, so that a test chooses
them: q(m, d) is pixel (m, d) over the sum of its row, exactly the same for
any batch size and any number of devices."""

import jax.numpy as jnp
import numpy as np

from imsvd_jax.explain.subject import Encoding, Subject


def _encode(variables, images):
  pixels = images[..., 0].astype(jnp.float32)  # [B, M, b]
  q = pixels / pixels.sum(-1, keepdims=True)
  features = pixels.sum(-1) * 0.5 + 100  # Far from zero, as features may be.
  return Encoding(features, q)


def table_subject():
  return Subject(encode=_encode, objective="IMSVD")


def probabilities(pixels):
  """[N, M, b] float32, by the same division."""
  pixels = pixels[..., 0].astype(np.float32)
  return pixels / pixels.sum(-1, keepdims=True)


def table_batches(pixels, indices, batch_size, labels=None):
  """Batches in the order of `indices`, the last one short."""
  for start in range(0, len(indices), batch_size):
    part = indices[start : start + batch_size]
    batch = {"image": pixels[part], "index": part}
    if labels is not None:
      batch["label"] = labels[part]
    yield batch
