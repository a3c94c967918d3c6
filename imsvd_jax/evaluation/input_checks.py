"""Checks that evaluators share; each raises one clear line."""

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.features import Features

# Features and labels of train, those of test, and the number of classes.
Splits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]


def check_features(features: np.ndarray, name: str) -> np.ndarray:
  """Returns `features` as float32 [N, F] once they are usable.

  Args:
    features: Array [N, F]; raw pixels are flattened by the caller.
    name: What they are, for the message ("bank", "test").

  Raises:
    UserError: They are not a non-empty matrix, or not all finite.
  """
  features = np.asarray(features, dtype=np.float32)
  if features.ndim != 2 or not features.size:
    raise UserError(
      f"The {name} features have shape {features.shape}; expected [N, F] with "
      "at least one image and one feature."
    )
  # In blocks: a mask of all of ImageNet's features would take gigabytes.
  finite = np.concatenate(
    [
      np.isfinite(features[i : i + 4096]).all(axis=1)
      for i in range(0, len(features), 4096)
    ]
  )
  if not finite.all():
    bad = np.flatnonzero(~finite)
    raise UserError(
      f"{bad.size} of {len(features)} {name} features hold NaN or infinity "
      f"(first: row {bad[0]}); the encoder diverged or its checkpoint is "
      "damaged: evaluate an earlier step."
    )
  return features


def check_labels(
  labels: np.ndarray | None, num_images: int, name: str
) -> np.ndarray:
  """Returns `labels` as int32 [N] once every image has one.

  Args:
    labels: Integers [N], -1 where unknown, or None.
    num_images: N, the number of features they belong to.
    name: What they label, for the message.

  Raises:
    UserError: Labels are missing, or not one per image.
  """
  if labels is None:
    raise UserError(
      f"The {name} images have no labels; this protocol needs them: choose a "
      "labelled data set, or the protocol 'collapse'."
    )
  labels = np.asarray(labels)
  if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
    raise UserError(
      f"The {name} labels have shape {labels.shape} and type {labels.dtype}; "
      f"expected {num_images} integers, one per image."
    )
  missing = int((labels < 0).sum())
  if missing:
    raise UserError(
      f"{missing} of {num_images} {name} images have no label (-1); this "
      "protocol needs a label for every image: drop those images first."
    )
  return labels.astype(np.int32)


def check_classes(train_labels: np.ndarray, test_labels: np.ndarray) -> int:
  """Returns the number of classes, once train [N] has all classes of test [Q].

  Raises:
    UserError: A class of test never occurs in train.
  """
  absent = np.setdiff1d(test_labels, train_labels)
  if absent.size:
    listed = ", ".join(str(label) for label in absent[:5])
    more = ", ..." if absent.size > 5 else ""
    raise UserError(
      f"{absent.size} of the {len(np.unique(test_labels))} test classes never "
      f"occur in train ({listed}{more}), so they cannot be predicted: check "
      "that both splits number their classes alike, or use more of train."
    )
  return int(train_labels.max()) + 1


def check_pair(
  train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns checked features of both splits, of one width.

  Raises:
    UserError: Either is unusable, or their widths differ.
  """
  train = check_features(train, "train")
  test = check_features(test, "test")
  if train.shape[1] != test.shape[1]:
    raise UserError(
      f"Train features have {train.shape[1]} values and test features "
      f"{test.shape[1]}; expected one width: extract both with one encoder."
    )
  return train, test


def check_splits(train: Features, test: Features) -> Splits:
  """Returns both splits once they are usable.

  Raises:
    UserError: Features or labels are unusable.
  """
  x_train, x_test = check_pair(train.features, test.features)
  y_train = check_labels(train.labels, len(x_train), "train")
  y_test = check_labels(test.labels, len(x_test), "test")
  return x_train, y_train, x_test, y_test, check_classes(y_train, y_test)
