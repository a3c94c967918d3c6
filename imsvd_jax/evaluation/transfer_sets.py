"""The standard transfer suite: eleven small classification sets.

Nothing is downloaded: a set that is not on disk is reported as skipped.
"""

import dataclasses
import os
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class TransferSet:
  """One set of the suite."""

  name: str  # As `data.name` has it.
  train: str  # The split that is fitted; C is chosen on a part of it.
  test: str  # The split that is scored.
  metric: str = "top1"  # A name in `scores.METRICS`.
  # Its folder in the data directory, where TensorFlow Datasets does not find it
  # by itself.
  folder: str = ""
  remedy: str = ""  # How to prepare it where TensorFlow Datasets cannot.


TRANSFER: dict[str, TransferSet] = {
  "food101": TransferSet("tfds:food101", "train", "validation"),
  "cifar10": TransferSet("tfds:cifar10", "train", "test"),
  "cifar100": TransferSet("tfds:cifar100", "train", "test"),
  "sun397": TransferSet("tfds:sun397/standard-part1-120k", "train", "test"),
  "cars196": TransferSet("tfds:cars196", "train", "test"),
  "aircraft": TransferSet(
    "folder",
    "trainval",
    "test",
    metric="mean_per_class",
    folder="aircraft",
    remedy=(
      "TensorFlow Datasets has no FGVC-Aircraft: sort its images into"
      " aircraft/trainval/VARIANT/ and aircraft/test/VARIANT/ in the data"
      " directory."
    ),
  ),
  "voc2007": TransferSet(
    "tfds:voc/2007", "train+validation", "test", metric="map_11_point"
  ),
  "dtd": TransferSet("tfds:dtd", "train+validation", "test"),
  "pets": TransferSet(
    "tfds:oxford_iiit_pet", "train", "test", metric="mean_per_class"
  ),
  "caltech101": TransferSet(
    "tfds:caltech101", "train", "test", metric="mean_per_class"
  ),
  "flowers102": TransferSet(
    "tfds:oxford_flowers102",
    "train+validation",
    "test",
    metric="mean_per_class",
  ),
}


def own_data(
  protocol: Any, own: ConfigDict, data_dir: str
) -> tuple[ConfigDict, str]:
  """Returns a protocol's set, prepared as the run's data, and its remedy.

  Without `data_dir` it is where TensorFlow Datasets keeps its data by default.
  """
  chosen = TRANSFER[protocol.data_set]
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  data_dir = os.path.expanduser(data_dir or default)
  settings = own.copy_and_resolve_references()
  settings.num_examples = 0
  settings.name = chosen.name
  settings.path = os.path.join(data_dir, chosen.folder).rstrip(os.sep)
  settings.train_split, settings.eval_split = chosen.train, chosen.test
  return settings, chosen.remedy
