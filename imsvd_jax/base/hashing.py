"""Hashes of integers (an order) and of arrays (a digest)."""

import hashlib
from typing import Any

import jax
import numpy as np


def hash_order(size: int, *, seed: int) -> np.ndarray:
  """Returns int64 [size]: 0, 1, ... in the order of their hashes."""
  with np.errstate(over="ignore"):  # The arithmetic wraps around on purpose.
    words: np.ndarray = np.arange(1, size + 1, dtype=np.uint64)
    words = mix(words + mix(np.array([seed], np.uint64)))
  return np.argsort(words, kind="stable")


def mix(words: np.ndarray) -> np.ndarray:
  """Scrambles 64-bit words one to one (SplitMix64's output function)."""
  words = words + np.uint64(0x9E3779B97F4A7C15)
  words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return words ^ (words >> np.uint64(31))


def checksum(tree: Any) -> str:
  """Returns a digest of the arrays of a pytree, with their places and types."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    leaf = np.asarray(leaf)
    digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} ".encode())
    digest.update(f"{leaf.shape} ".encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()
