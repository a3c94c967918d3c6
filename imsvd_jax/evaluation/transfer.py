"""The standard transfer suite: eleven small classification sets.

Features of each set go through the protocol `linear/lbfgs` with the set's own
metric. A set that is not on disk is skipped, with how to prepare it: downloads
never start by themselves.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.evaluation import logistic, protocols, results
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class TransferSet:
  """One set of the suite.

  Attributes:
    tfds: Its name in TensorFlow Datasets, or None: see `prepare`.
    train: The split that is fitted; C is chosen on a part of it.
    test: The split that is scored.
    num_classes: Classes, for a check of the labels.
    metric: A name in `metrics.METRICS`.
    labels: The field that holds the labels. "label" is one class per image;
      for VOC, "labels" lists those present and "labels_no_difficult" those
      that count.
    prepare: How to prepare it where TensorFlow Datasets cannot.
  """

  tfds: str | None
  train: str
  test: str
  num_classes: int
  metric: str = "top1"
  labels: str = "label"
  prepare: str | None = None

  def how_to_prepare(self, data_dir: str) -> str:
    """Returns one line that says what to do."""
    return self.prepare or (
      'prepare it once with: python -c "import tensorflow_datasets as tfds; '
      f"tfds.builder({self.tfds!r}, data_dir={data_dir!r})"
      '.download_and_prepare()"'
    )


TRANSFER: dict[str, TransferSet] = {
  "food101": TransferSet("food101", "train", "validation", 101),
  "cifar10": TransferSet("cifar10", "train", "test", 10),
  "cifar100": TransferSet("cifar100", "train", "test", 100),
  "sun397": TransferSet("sun397/standard-part1-120k", "train", "test", 397),
  "cars196": TransferSet("cars196", "train", "test", 196),
  "aircraft": TransferSet(
    None,
    "trainval",
    "test",
    100,
    metric="mean_per_class",
    prepare=(
      "TensorFlow Datasets has no FGVC-Aircraft: sort its images into "
      "aircraft/trainval/VARIANT/ and aircraft/test/VARIANT/ in the data "
      "directory"
    ),
  ),
  "voc2007": TransferSet(
    "voc/2007",
    "train+validation",
    "test",
    20,
    metric="map_11_point",
    labels="labels",
  ),
  "dtd": TransferSet("dtd", "train+validation", "test", 47),
  "pets": TransferSet(
    "oxford_iiit_pet", "train", "test", 37, metric="mean_per_class"
  ),
  "caltech101": TransferSet(
    "caltech101", "train", "test", 102, metric="mean_per_class"
  ),
  "flowers102": TransferSet(
    "oxford_flowers102",
    "train+validation",
    "test",
    102,
    metric="mean_per_class",
  ),
}


def default_data_dir() -> str:
  """Returns where TensorFlow Datasets keeps its data unless told."""
  default = "~/tensorflow_datasets"
  return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or default)


def is_prepared(name: str, data_dir: str | os.PathLike) -> bool:
  """Returns whether a set of the suite is complete on disk.

  Args:
    name: A name in `TRANSFER`.
    data_dir: Where TensorFlow Datasets keeps its data; local.
  """
  chosen = TRANSFER[name]
  if chosen.tfds is None:
    folders = (Path(data_dir) / name / s for s in (chosen.train, chosen.test))
    return all(folder.is_dir() for folder in folders)
  # Written last, so a download that was cut short has none.
  versions = (Path(data_dir) / chosen.tfds).glob("*/dataset_info.json")
  return any(versions)


def run_transfer(
  load: Callable[[str, TransferSet], tuple[Features, Features]],
  *,
  data_dir: str | os.PathLike | None = None,
  names: tuple[str, ...] = tuple(TRANSFER),
  protocol: protocols.Lbfgs = protocols.PROTOCOLS["linear/lbfgs"],
  step: int | None = None,
  weights: str | None = None,
  preparation: Mapping[str, Any] | None = None,
  known: Callable[[results.Result], results.Result | None] | None = None,
) -> Iterator[results.Result]:
  """Yields the result of every named set; skipped ones say why.

  Args:
    load: From a set to the features of its train and test split.
    data_dir: Where the data lies; `default_data_dir()` unless given.
    names: Which sets.
    protocol: Hyper-parameters; each set replaces the metric by its own.
    step: Of the checkpoint, for the record.
    weights: Checksum of the encoder's, for the record.
    preparation: How images are prepared, for the record.
    known: Returns the result of a planned measurement that is there already.
  """
  data_dir = str(data_dir or default_data_dir())
  for name in names:
    chosen = lookup(TRANSFER, name, "transfer set")
    own = dataclasses.replace(protocol, metric=chosen.metric)
    common = {
      "protocol": f"transfer/{name}",
      "evaluator": own.evaluator,
      "hyperparameters": dataclasses.asdict(own),
      "data": {
        "name": chosen.tfds or name,
        **dataclasses.asdict(chosen),
        "preprocessing": dict(preparation or {}),
      },
      "step": step,
      "seed": own.seed,
      "weights": weights,
    }
    before = known and known(results.Result(**common))
    if before:
      yield before
      continue
    if not is_prepared(name, data_dir):
      how = chosen.how_to_prepare(data_dir)
      yield results.Result(**common, skipped=f"{name} is not prepared; {how}")
      continue
    start = time.monotonic()
    try:
      train, test = load(name, chosen)
    except UserError as error:  # The other sets are still worth having.
      yield results.Result(**common, skipped=f"{name}: {error}")
      continue
    values = dict(logistic.run(Inputs(train=train, test=test), own))
    yield results.make_result(
      **common,
      values=values,
      num_images=len(test.features),
      seconds=time.monotonic() - start,
    )
