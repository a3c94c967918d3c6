"""Random numbers and shuffles that are functions of their keys alone.

A generator per example would cost a call per example. These functions hash the
keys of a whole batch at once, with SplitMix64's finalizer, a bijection of
64-bit words: a handful of vectorized operations make the random numbers of a
batch. They are NumPy's; `graph_stateless` has those that a graph needs.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

# Fewer rounds leave visible runs in some epochs.
_SHUFFLE_ROUNDS = 24
_GOLDEN = 0x9E3779B97F4A7C15


def _mix(words: np.ndarray) -> np.ndarray:
  """Applies SplitMix64's finalizer to each element, uint64."""
  words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return words ^ (words >> np.uint64(31))


def _words(values: Any) -> np.ndarray:
  """Returns integers, which may be negative, modulo 2^64."""
  if isinstance(values, int):
    values %= 2**64
  return np.asarray(values).astype(np.uint64)


def fold_in(keys: Any, values: Any) -> np.ndarray:
  """Returns new keys, one for each pair (key, value), broadcast.

  Args:
    keys: uint64, any shape.
    values: Integers, broadcastable with `keys`.
  """
  # Arrays of at least one dimension: NumPy warns where scalars overflow.
  keys, values = np.broadcast_arrays(_words(keys), _words(values))
  step = (np.atleast_1d(values) + np.uint64(1)) * np.uint64(_GOLDEN)
  return _mix(np.atleast_1d(keys) ^ step).reshape(keys.shape)


def key(*values: Any) -> np.ndarray:
  """Returns one uint64 key from integers, each folded into the last."""
  return functools.reduce(fold_in, values, np.zeros((), np.uint64))


def uniform(keys: np.ndarray, count: int) -> np.ndarray:
  """Returns float32 [..., count] in [0, 1), `count` numbers for each key."""
  words = fold_in(keys[..., np.newaxis], np.arange(count))
  # A float32 holds 24 bits exactly; more would round up to 1.
  return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def seed(keys: np.ndarray) -> np.ndarray:
  """Returns 31 bits of each key as int64, for operations that take a seed."""
  return (keys >> np.uint64(33)).astype(np.int64)


# --- Shuffles -----------------------------------------------------------------


def permute(offsets: np.ndarray, size: int, key: Any) -> np.ndarray:
  """Returns the image of each offset under the key's permutation.

  A block cipher permutes the smallest block of 4^k numbers, 65,536 at least,
  that holds `range(size)`; a number outside of the range is encrypted again.
  This is the permutation of `tf.random.experimental.index_shuffle`, which has
  a smaller block, and is none, where size is a power of 4 plus 1.

  Args:
    offsets: int64 [N], each in [0, size).
    size: The permutation is one of `range(size)`.
    key: uint64 scalar.

  Returns:
    int64 [N].
  """
  bits = max(8, (max(size - 1, 1).bit_length() + 1) // 2)  # Half of a block.
  if bits == 8:
    return _small_permutation(size, int(key))[offsets]
  cipher = _Cipher(key, bits)
  result = np.array(offsets, np.int64)
  rest = np.arange(len(result))
  while rest.size:
    result[rest] = cipher(result[rest])
    rest = rest[result[rest] >= size]
  return result


# As many as an evaluation takes, whose shuffles are always the same, and as the
# epochs between two of them.
@functools.lru_cache(maxsize=64)
def _small_permutation(size: int, key: int) -> np.ndarray:
  """Returns a whole permutation: cheaper than a small one's many repetitions.

  Each round doubles the encryptions of the numbers that are not in the range
  yet.
  """
  table = _Cipher(key, 8)(np.arange(2**16))
  while (table[:size] >= size).any():
    table = np.where(table < size, table, table[table])
  return table[:size].copy()  # Not the whole table.


class _Cipher:
  """The block cipher Simon, for any even size of a block.

  Beaulieu et al., The Simon and Speck families of lightweight block ciphers,
  https://eprint.iacr.org/2013/404.
  """

  def __init__(self, key: Any, bits: int) -> None:
    """Derives the keys of the rounds; a block has 2 * `bits` bits."""
    self._bits = bits
    self._mask = 2**bits - 1
    self._dtype = np.min_scalar_type(self._mask)
    # Hashed, because small seeds shuffle badly: (1, 1, 1) leaves 0..9 in place.
    words = [int(word) for word in seed(fold_in(key, np.arange(3)))]
    keys = [word & self._mask for word in words]
    constants = 0x7369F885192C0EF5 & self._mask
    for _ in range(3, _SHUFFLE_ROUNDS):
      last = keys[-1]
      turned = self._left(last, bits - 3) ^ self._left(last, bits - 4)
      keys.append(
        (0xFFFFFFFC & self._mask) ^ (constants & 1) ^ keys[-3] ^ turned
      )
      constants >>= 1
    self._keys = [self._dtype.type(key) for key in keys]

  def __call__(self, values: np.ndarray) -> np.ndarray:
    """Encrypts int64 values below 2^(2 bits)."""
    left = (values >> self._bits).astype(self._dtype)
    right = (values & self._mask).astype(self._dtype)
    for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
      left = left ^ self._round(right) ^ even
      right = right ^ self._round(left) ^ odd
    return (left.astype(np.int64) << self._bits) | right.astype(np.int64)

  def _round(self, x: np.ndarray) -> np.ndarray:
    return (self._left(x, 1) & self._left(x, 8)) ^ self._left(x, 2)

  def _left(self, x: Any, count: int) -> Any:
    """Rotates words of `bits` bits."""
    count %= self._bits
    if not count:
      return x
    return ((x << count) & self._mask) | (x >> (self._bits - count))
