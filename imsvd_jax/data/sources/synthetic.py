"""Random pixels, for debug configs and benchmarks.

Image i is the same in every run and for any number of images. Its label is
i mod 10: every class occurs, and no image says anything about its label.
"""

from __future__ import annotations

import math

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.data import source as source_lib
from imsvd_jax.data import stateless

NUM_CLASSES = 10


def make(settings: ConfigDict, split: str) -> source_lib.Source:
  """Returns `data.num_examples` images, different ones for each split."""
  num_examples = source_lib.require_num_examples(settings)
  key = stateless.key(source_lib.split_number(split))
  shape = (settings.image_size, settings.image_size, settings.channels)

  def image(index: int | np.ndarray) -> np.ndarray:
    # Eight pixels from each word.
    words = np.arange(-(-math.prod(shape) // 8))
    pixels = stateless.fold_in(stateless.fold_in(key, index), words)
    return pixels.view(np.uint8)[: math.prod(shape)].reshape(shape)

  images = None
  if source_lib.fits_in_memory(num_examples, math.prod(shape)):
    images = np.stack([image(index) for index in range(num_examples)])
  fetch = source_lib.computed(image, shape)
  return source_lib.Source(
    name="synthetic",
    num_examples=num_examples,
    num_classes=NUM_CLASSES,
    label_names=tuple(map(str, range(NUM_CLASSES))),
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    labels=np.arange(num_examples, dtype=np.int32) % NUM_CLASSES,
    images=images,
    fetch=fetch,
  )
