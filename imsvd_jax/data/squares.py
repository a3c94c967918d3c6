"""Images of any size, each resized to a square and stored by `imsvd pack`.

A square stands for the whole image: a box that is drawn in the image has its
place in the square, and what is cut there has the proportions of the box. So
all images have one size, and the devices can cut their views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# (numbers of images) -> their squares, uint8 [b, size, size, channels].
Read = Callable[[np.ndarray], np.ndarray]


class Squares:
  """Stands in for uint8 [n, size, size, channels]; reads what is asked for.

  Attributes:
    sides: int32 [n, 2], height and width that the images had.
    shape: As of an array.
    nbytes: As of an array, decoded.
  """

  def __init__(
    self,
    read: Read,
    sides: np.ndarray,
    size: int,
    channels: int,
    rows: np.ndarray | None = None,
  ) -> None:
    """Takes the images `rows` of those that `read` reads; by default all."""
    self._read = read
    self._rows = np.arange(len(sides)) if rows is None else rows
    self._all_sides = sides
    self.sides = sides[self._rows]
    self.shape = (len(self._rows), size, size, channels)
    self.nbytes = int(np.prod(self.shape, dtype=np.int64))

  def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
    """Returns the images of some numbers, uint8 [b, size, size, channels]."""
    return self._read(self._rows[index])

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
    """Returns all images."""
    return self._read(self._rows)

  def part(self, index: np.ndarray) -> Squares:
    """Returns some of the images, still unread."""
    _, size, _, channels = self.shape
    return Squares(
      self._read, self._all_sides, size, channels, self._rows[index]
    )

  def boxes(self, index: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Returns where boxes in images lie in their squares, with fractions.

    Args:
      index: Numbers of the images, [b].
      drawn: float32 [b, ..., 5], see `boxes.random_boxes`.
    """
    scale = np.float32(self.shape[1]) / self.sides[index].astype(np.float32)
    scale = np.concatenate([scale, scale, np.ones_like(scale[:, :1])], axis=1)
    return drawn * scale.reshape(len(index), *[1] * (drawn.ndim - 2), 5)

  def whole_boxes(self, index: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Returns the same in whole pixels, at least one."""
    found = self.boxes(index, drawn)
    start = np.minimum(np.round(found[..., :2]), self.shape[1] - 1)
    end = np.round(found[..., :2] + found[..., 2:4])
    length = np.maximum(end - start, 1)
    return np.concatenate([start, length, found[..., 4:]], axis=-1)
