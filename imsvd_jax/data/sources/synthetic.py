"""Random pixels: for debug configs and for measuring everything else.

Image i is the same in every run and whatever the number of images. Its label is
i mod 10: every class occurs, and nothing can be learned about it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.data import source as source_lib
from imsvd_jax.data import stateless

NUM_CLASSES = 10


def make(settings: Any, split: str) -> source_lib.Source:
  """Returns `data.num_examples` images, different ones for each split."""
  num_examples = source_lib.require_num_examples(settings)
  key = stateless.key(source_lib.split_number(split))
  size, channels = settings.image_size, settings.channels

  def fetch(index: tf.Tensor) -> tf.Tensor:
    seed = tf.bitcast(stateless.fold_in(key, index), tf.int32)
    # Four pixels from each 32-bit word.
    words = tf.random.stateless_uniform(
      [-(-size * size * channels // 4)], seed, None, None, tf.int32
    )
    pixels = tf.reshape(tf.bitcast(words, tf.uint8), [-1])
    pixels = pixels[: size * size * channels]
    return tf.reshape(pixels, [size, size, channels])

  source = source_lib.Source(
    name="synthetic",
    num_examples=num_examples,
    num_classes=NUM_CLASSES,
    label_names=tuple(map(str, range(NUM_CLASSES))),
    channels=channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    labels=np.arange(num_examples, dtype=np.int32) % NUM_CLASSES,
    fetch=fetch,
  )
  return source_lib.hold_in_memory(source, size)
