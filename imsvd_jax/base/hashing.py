"""Hashes: of integers into an order, of arrays into a digest."""

import hashlib
from typing import Any

import jax
import numpy as np


def hash_order(size: int, *, seed: int) -> np.ndarray:
  """Returns int64 [size]: 0, 1, ... in the order of their hashes."""
  with np.errstate(over="ignore"):  # Wrapping round is the arithmetic meant.
    words = np.arange(1, size + 1, dtype=np.uint64)
    words = mix(words + mix(np.array([seed], np.uint64)))
  return np.argsort(words, kind="stable")


def mix(words: np.ndarray) -> np.ndarray:
  """Scrambles 64-bit words one to one (SplitMix64's output function)."""
  words = words + np.uint64(0x9E3779B97F4A7C15)
  words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return words ^ (words >> np.uint64(31))


def checksum(tree: Any) -> str:
  """Returns a digest of every array of a pytree, with its place and type.

  It also tells whether a frozen backbone stayed frozen.
  """
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} ".encode())
    digest.update(f"{leaf.shape} ".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
