"""Scans of handwritten digits that are part of scikit-learn: no download.

1797 scans of 8 x 8 pixels, enlarged to `data.image_size` with bicubic
interpolation. The splits are scikit-learn's
`train_test_split(test_size=0.2, random_state=0, stratify=labels)`: 1437 images
for "train" and 360 for "test", with the same proportion of every digit.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict
from sklearn import datasets, model_selection

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import source as source_lib


def make(settings: ConfigDict, split: str) -> source_lib.Source:
  """Returns the "train" (1437) or "test" (360) scans."""
  source_lib.reject_num_examples(settings)
  digits = datasets.load_digits()
  parts = model_selection.train_test_split(
    np.arange(len(digits.target)),
    test_size=0.2,
    random_state=0,
    stratify=digits.target,
  )
  rows_of = dict(zip(("train", "test"), parts, strict=True))
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
  size = settings.image_size
  images = scans[..., None].astype(np.float32) * (255 / 16)
  images = np.asarray(tf.image.resize(images, (size, size), method="bicubic"))
  images = np.clip(np.round(images), 0, 255).astype(np.uint8)
  return np.repeat(images, settings.channels, axis=-1)
