"""Transfer: logistic regression on another data set than the run's own.

Nothing is downloaded: a set that is not on disk is reported as skipped.
"""

import os

import ml_collections

from imsvd_jax.evaluation import logistic, protocols
from imsvd_jax.evaluation.inputs import OwnData
from imsvd_jax.evaluation.transfer_sets import TRANSFER


def default_data_dir() -> str:
  """Returns where TensorFlow Datasets keeps its data by default."""
  default = "~/tensorflow_datasets"
  return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or default)


def own_data(
  protocol: protocols.Transfer, own: ml_collections.ConfigDict, data_dir: str
) -> OwnData:
  """Returns the set that the protocol names, prepared as the run prepares."""
  chosen = TRANSFER[protocol.data_set]
  data_dir = os.path.expanduser(data_dir) or default_data_dir()
  settings = own.copy_and_resolve_references()
  settings.num_examples = 0
  settings.name = chosen.name
  settings.path = os.path.join(data_dir, chosen.folder).rstrip(os.sep)
  settings.train_split, settings.eval_split = chosen.train, chosen.test
  return OwnData(settings, chosen.remedy)


EVALUATOR = logistic.EVALUATOR._replace(own_data=own_data)
