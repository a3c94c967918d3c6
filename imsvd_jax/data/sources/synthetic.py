"""Random pixels, for debug configs and benchmarks.

Image i is the same in every run and for any number of images. Its label is
i mod 10: every class occurs, and no image says anything about its label.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.data import execution, stateless
from imsvd_jax.data import source as source_lib

NUM_CLASSES = 10


def make(settings: ConfigDict, split: str) -> source_lib.Source:
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

  images = None
  if source_lib.fits_in_memory(num_examples, size, channels):
    dataset = tf.data.Dataset.range(num_examples).map(
      tf.autograph.experimental.do_not_convert(fetch)
    )
    images = execution.read_all(dataset, num_examples)
  return source_lib.Source(
    name="synthetic",
    num_examples=num_examples,
    num_classes=NUM_CLASSES,
    label_names=tuple(map(str, range(NUM_CLASSES))),
    channels=channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    labels=np.arange(num_examples, dtype=np.int32) % NUM_CLASSES,
    images=images,
    fetch=fetch,
  )
