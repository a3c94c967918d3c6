"""IMSVD's loss in PyTorch, line by line as in the paper's equations.

A contender for the benchmark, as a PyTorch user would write it: eager, with
autograd, and with the whole D x D matrix.
"""

import importlib.util
from typing import Any

import numpy as np

# D x D float32 arrays alive at once: Pc, its clamp, logarithm, product and the
# gradients on the way back.
MATRICES = 6


def is_installed() -> bool:
  """Whether this machine has PyTorch."""
  return importlib.util.find_spec("torch") is not None


class TorchFormula:
  """Loss and gradient for given embeddings."""

  def __init__(
    self, z1: np.ndarray, z2: np.ndarray, num_bins: int, *, on_gpu: bool
  ) -> None:
    """Puts the embeddings [N, M*b] on the device."""
    import torch

    self._torch = torch
    self._num_bins = num_bins
    self._on_gpu = on_gpu and torch.cuda.is_available()
    device = "cuda" if self._on_gpu else "cpu"
    self._views = [
      torch.tensor(z, device=device, requires_grad=True) for z in (z1, z2)
    ]

  def __call__(self) -> tuple[float, list[Any]]:
    """Returns the loss and its gradients with respect to both embeddings."""
    loss = self._loss(*self._views)
    gradients = self._torch.autograd.grad(loss, self._views)
    if self._on_gpu:
      self._torch.cuda.synchronize()
    return loss.item(), [gradient.cpu() for gradient in gradients]

  def _loss(self, z1: Any, z2: Any) -> Any:
    n, b = z1.shape[0], self._num_bins
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
