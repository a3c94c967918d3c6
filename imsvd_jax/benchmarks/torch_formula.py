"""IMSVD's loss in PyTorch, line by line as in the paper's equations.

A contender for the benchmark, as a PyTorch user would write it: eager, with
autograd, and with the whole D x D matrix.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

# D x D float32 arrays alive at once: Pc, its clamp, logarithm, product and the
# gradients on the way back.
MATRICES = 6


def is_installed() -> bool:
  """Whether this machine has PyTorch."""
  return importlib.util.find_spec("torch") is not None


def loss_and_gradients(
  z1: np.ndarray, z2: np.ndarray, num_bins: int, *, on_gpu: bool
) -> Callable[[], tuple[float, list[Any]]]:
  """Returns `() -> (loss, gradients)` for embeddings [N, M*b] on the device.

  The gradients stay on the device, as PyTorch's tensors.
  """
  import torch

  on_gpu = on_gpu and torch.cuda.is_available()
  device = "cuda" if on_gpu else "cpu"
  views = [torch.tensor(z, device=device, requires_grad=True) for z in (z1, z2)]

  def run() -> tuple[float, list[Any]]:
    value = loss(views[0], views[1], num_bins)
    gradients = torch.autograd.grad(value, views)
    if on_gpu:
      torch.cuda.synchronize()
    return value.item(), list(gradients)

  return run


def loss(z1: Any, z2: Any, num_bins: int) -> Any:
  """Returns the loss of two views' embeddings [N, M*b], a scalar in nats."""
  n, b = z1.shape[0], num_bins
  q1, q2 = (z.reshape(n, -1, b).softmax(-1) for z in (z1, z2))  # [N, M, b]
  m = q1.shape[1]
  joint = q1.reshape(n, -1).T @ q2.reshape(n, -1) / n  # [D, D]
  cells = (joint * joint.clamp(min=1e-38).log()).reshape(m, b, m, b)
  blocks = cells.sum(dim=(1, 3))  # [M, M]
  off_diagonal = (blocks.sum() - blocks.trace()) / max(m * (m - 1), 1)
  same_bin = (q1 * q2).mean(0)  # [M, b]
  diagonal = (same_bin * same_bin.log()).sum() / m
  invariance = -(q1 * q2).sum(-1).log().mean()
  return diagonal + off_diagonal + invariance
