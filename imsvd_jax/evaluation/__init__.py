"""Evaluators: each is given features and yields named numbers.

An evaluator is `run(inputs, protocol)`, a generator of `(name, value)`; a
protocol (`PROTOCOLS`) names its evaluator and holds every hyper-parameter:

  protocol = lookup(PROTOCOLS, "knn/imsvd", "protocol")
  for name, value in evaluate(protocol, Inputs(train=train, test=test)):
    ...

A new evaluator is one file and one line of `EVALUATORS`. Fine-tuning is not
here: it is a training run, and its protocols are data only.
"""

from collections.abc import Callable, Iterator

from imsvd_jax.base.errors import lookup
from imsvd_jax.base.hashing import checksum
from imsvd_jax.evaluation import collapse, knn, logistic, probe
from imsvd_jax.evaluation import linear as sgd
from imsvd_jax.evaluation.feature_cache import cached_features
from imsvd_jax.evaluation.features import Embed, Features, extract
from imsvd_jax.evaluation.inputs import Inputs
from imsvd_jax.evaluation.knn import knn_accuracy
from imsvd_jax.evaluation.linear import train_linear
from imsvd_jax.evaluation.logistic import logistic_regression
from imsvd_jax.evaluation.probe import linear_probe
from imsvd_jax.evaluation.protocols import PROTOCOLS, Protocol
from imsvd_jax.evaluation.results import Result, table, write_results
from imsvd_jax.evaluation.scores import METRICS, Accuracy
from imsvd_jax.evaluation.subsets import subset
from imsvd_jax.evaluation.transfer import TRANSFER, run_transfer

EVALUATORS: dict[str, Callable[..., Iterator[tuple[str, float]]]] = {
  "knn": knn.run,
  "lbfgs": logistic.run,
  "probe": probe.run,
  "linear": sgd.run,
  "collapse": collapse.run,
}


def evaluate(protocol: Protocol, inputs: Inputs) -> Iterator[tuple[str, float]]:
  """Yields the named numbers of one protocol."""
  run = lookup(EVALUATORS, protocol.evaluator, "evaluator")
  return run(inputs, protocol)


__all__ = [
  "EVALUATORS",
  "METRICS",
  "PROTOCOLS",
  "TRANSFER",
  "Accuracy",
  "Embed",
  "Features",
  "Inputs",
  "Protocol",
  "Result",
  "cached_features",
  "checksum",
  "evaluate",
  "extract",
  "knn_accuracy",
  "linear_probe",
  "logistic_regression",
  "run_transfer",
  "subset",
  "table",
  "train_linear",
  "write_results",
]
