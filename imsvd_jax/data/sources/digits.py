"""Scans of handwritten digits that are part of scikit-learn: no download.

1797 scans of 8 x 8 pixels, enlarged to `data.image_size` with bicubic
interpolation. The splits are scikit-learn's
`train_test_split(test_size=0.2, random_state=0, stratify=labels)`: 1437 images
for "train" and 360 for "test", with the same proportion of every digit.
"""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import source as source_lib

SPLITS = ("train", "test")


def make(settings: ConfigDict, split: str) -> source_lib.Source:
  """Returns the "train" (1437) or "test" (360) scans."""
  from sklearn import datasets, model_selection  # It takes a second.

  source_lib.reject_num_examples(settings)
  digits = datasets.load_digits()
  parts = model_selection.train_test_split(
    np.arange(len(digits.target)),
    test_size=0.2,
    random_state=0,
    stratify=digits.target,
  )
  rows_of = dict(zip(SPLITS, parts, strict=True))
  if split not in rows_of:
    raise UserError(
      f"Source 'digits' has no split {split!r}; expected 'train' or 'test'."
    )
  rows = rows_of[split]
  return source_lib.Source(
    name="digits",
    num_examples=len(rows),
    num_classes=10,
    label_names=tuple(map(str, range(10))),
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    images=_enlarge(digits.images[rows], settings),
    labels=digits.target[rows].astype(np.int32),
  )


def _enlarge(scans: np.ndarray, settings: ConfigDict) -> np.ndarray:
  """Resizes gray levels 0..16 [n, 8, 8] to uint8 [n, size, size, channels]."""
  images = scans.astype(np.float32) * np.float32(255 / 16)
  for axis in (1, 2):
    images = _resize_axis(images, settings.image_size, axis)
  images = np.clip(np.round(images), 0, 255).astype(np.uint8)
  return np.repeat(images[..., None], settings.channels, axis=-1)


def _resize_axis(images: np.ndarray, size: int, axis: int) -> np.ndarray:
  """Interpolates one axis, as `tf.image.resize` does to the last bit.

  By Keys' cubic kernel with a = -0.5, of distances in steps of 1/1024, from the
  four pixels around each center, of which those outside of the image have no
  weight. Not antialiased.
  """
  in_size = images.shape[axis]
  centers = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(
    in_size / size
  ) - np.float32(0.5)
  first = np.floor(centers)
  step = np.round((centers - first) * 1024) / 1024
  pixels = first.astype(int) + np.array([[-1], [0], [1], [2]])  # [4, size]
  x = np.stack([step + 1, step, 1 - step, 2 - step]).astype(np.float64)
  near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, far).astype(np.float32)
  weights[(pixels < 0) | (pixels >= in_size)] = 0
  weights *= np.float32(1) / sum(weights)  # One after the other.
  shape = [1, 1, 1]
  shape[axis] = size
  return sum(
    images.take(rows.clip(0, in_size - 1), axis) * weight.reshape(shape)
    for rows, weight in zip(pixels, weights, strict=True)
  )
