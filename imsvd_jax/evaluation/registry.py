"""The evaluators by name. A new one is one file and one line here."""

from collections.abc import Iterator

from imsvd_jax.base.errors import lookup
from imsvd_jax.evaluation import (
  collapse,
  finetune,
  knn,
  linear,
  logistic,
  probe,
  transfer_sets,
)
from imsvd_jax.evaluation.inputs import Evaluator, Inputs
from imsvd_jax.evaluation.protocols import Protocol

EVALUATORS: dict[str, Evaluator] = {
  "knn": knn.EVALUATOR,
  "lbfgs": logistic.EVALUATOR,
  "probe": probe.EVALUATOR,
  "linear": linear.EVALUATOR,
  "finetune": finetune.EVALUATOR,
  "transfer": logistic.EVALUATOR._replace(own_data=transfer_sets.own_data),
  "collapse": collapse.EVALUATOR,
}


def evaluator_of(protocol: Protocol) -> Evaluator:
  """Returns the evaluator that a protocol names."""
  return lookup(EVALUATORS, protocol.evaluator, "evaluator")


def evaluate(
  protocol: Protocol, inputs: Inputs
) -> Iterator[tuple[str, float | Exception]]:
  """Yields the named numbers of one protocol, see `Evaluator.run`."""
  return evaluator_of(protocol).run(inputs, protocol)
