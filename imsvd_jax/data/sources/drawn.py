"""What sources share whose images are drawn from factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.data import source as source_lib


def make(
  settings: ConfigDict,
  split: str,
  *,
  draw_factors: Callable[[int, int], np.ndarray],
  render: Callable[[np.ndarray, int, int], np.ndarray],
  masks_of: Callable[[np.ndarray, int, int], np.ndarray],
  labels_of: Callable[[np.ndarray], np.ndarray],
  **about: Any,
) -> source_lib.Source:
  """Returns `data.num_examples` drawings; a quarter as many for evaluation.

  Args:
    settings: config.data.
    split: One of its two.
    draw_factors: (images, seed) -> factors [n, columns].
    render: (factors, side, channels) -> uint8 [n, side, side, channels].
    masks_of: The same of the objects alone, white on black.
    labels_of: Factors -> class numbers [n].
    **about: Other attributes of the source.
  """
  num_examples = source_lib.require_num_examples(settings)
  if split != settings.train_split:
    num_examples = max(1, num_examples // 4)
  factors = draw_factors(num_examples, source_lib.split_number(split))
  size, channels = settings.image_size, settings.channels

  images = None
  if source_lib.fits_in_memory(num_examples, size * size * channels):
    images = render(factors, size, channels)
  fetch = source_lib.computed(
    lambda i: render(factors[i : i + 1], size, channels)[0],
    (size, size, channels),
  )
  return source_lib.Source(
    num_examples=num_examples,
    channels=channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    images=images,
    fetch=fetch,
    labels=labels_of(factors).astype(np.int32),
    factors=factors,
    masks=lambda factors: masks_of(factors, size, channels),
    draw=lambda factors: render(factors, size, channels),
    **about,
  )
