"""Transfer: logistic regression on another data set than the run's own.

Nothing is downloaded: a set that is not on disk is reported as skipped.
"""

import os

import ml_collections

from imsvd_jax.evaluation import logistic, protocols
from imsvd_jax.evaluation.transfer_sets import TRANSFER


def own_data(
  protocol: protocols.Transfer, own: ml_collections.ConfigDict, data_dir: str
) -> tuple[ml_collections.ConfigDict, str]:
  """Returns the protocol's set, prepared as the run's data, and its remedy.

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


EVALUATOR = logistic.EVALUATOR._replace(own_data=own_data)
