"""Parts of a training set that are the same on every machine and version.

Images enter a part in the order of a hash of (seed, index). NumPy's generators
may change their streams between versions; a published 1% list must not change.
"""

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.hashing import hash_order


def subset(labels: np.ndarray, fraction: float, *, seed: int) -> np.ndarray:
  """Returns the images of a class-balanced part, for semi-supervised training.

  Every class gives the same number of images, `fraction` of the mean class size
  (rounded, at least one), or all it has if that is fewer. Parts are nested: the
  1% of a seed lies within its 10%.

  Args:
    labels: int [N] by index in the data set, -1 where unknown (never taken).
    fraction: Above 0, at most 1.
    seed: Chooses the images.

  Returns:
    int64 indices into the data set, increasing.

  Raises:
    UserError: The fraction is out of range or nothing is labelled.
  """
  if not 0 < fraction <= 1:
    raise UserError(
      f"A part of {fraction} of the labels; expected more than 0, at most 1."
    )
  classes, counts = np.unique(labels[labels >= 0], return_counts=True)
  if not classes.size:
    raise UserError(
      "The training set has no labels, so no labelled part can be chosen: "
      "use a labelled data set."
    )
  per_class = max(1, round(fraction * float(counts.mean())))
  return _take(labels, dict.fromkeys(classes.tolist(), per_class), seed)


def split_classes(
  labels: np.ndarray, fraction: float, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """Splits off `fraction` of the images of every class.

  Of every class at least one image is split off and at least one stays; a class
  with a single image keeps it. Labels are int [N]; the seed chooses the images.

  Returns:
    Indices of the images that stay and of those split off, both increasing.

  Raises:
    UserError: No class has two images.
  """
  classes, counts = np.unique(labels, return_counts=True)
  given = {
    label: min(max(1, round(fraction * count)), count - 1)
    for label, count in zip(classes.tolist(), counts.tolist(), strict=True)
  }
  away = _take(labels, given, seed)
  if not away.size:
    raise UserError(
      "Every class of train has one image, so none can be held out to choose "
      "a hyper-parameter: give a single value, or more images."
    )
  return np.setdiff1d(np.arange(len(labels)), away), away


def _take(
  labels: np.ndarray, per_class: dict[int, int], seed: int
) -> np.ndarray:
  """Returns the first `per_class[label]` of each class in hash order."""
  order = hash_order(len(labels), seed=seed)
  by_class = order[np.argsort(labels[order], kind="stable")]
  classes, starts = np.unique(labels[by_class], return_index=True)
  members = np.split(by_class, starts[1:])
  taken = [
    images[: per_class.get(label, 0)]
    for label, images in zip(classes.tolist(), members, strict=True)
  ]
  return np.sort(np.concatenate(taken)).astype(np.int64)
