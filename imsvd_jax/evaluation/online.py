"""A training run that measures itself: now and then, and at its end.

The online linear head is fitted to the features of the online k-NN: no gradient
reaches the encoder, and the training step needs no labels and does no work for
it.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from imsvd_jax import data
from imsvd_jax.base import console, devices, files, hashing
from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import protocols, results
from imsvd_jax.evaluation.binder import (
  RAW_PIXELS,
  Binder,
  Binding,
  Network,
  Weights,
)
from imsvd_jax.evaluation.data_set import DataSet
from imsvd_jax.evaluation.registry import evaluator_of
from imsvd_jax.runs import metrics
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.experiment import Experiment
from imsvd_jax.training.state import TrainState


class Evaluation:
  """Numbers of a run's encoder on its own data set.

  With labels, k-NN and linear accuracy: the bank and the probe's training set
  are the train split, the queries are the eval split. Says once where there is
  no eval split or there are no labels. Without labels, how much of its space
  the embedding uses.

  Each process embeds its own share of the images on its own devices, then all
  gather the features of all and evaluate them alike. Numbers go to the metrics
  and, with how they were made, to results.json.
  """

  def __init__(self, experiment: Experiment, train_source: Source) -> None:
    config = experiment.config
    self._experiment = experiment
    self._settings = config.eval
    self._binder = Binder(
      Network(
        model=experiment.model,
        config=config,
        data=config.data,
        discrete=experiment.objective.discrete,
        has_views=True,
      ),
      batch_size=config.eval.batch_size,
    )
    test = data.make_source(config.data, "eval")
    why = _why_not(train_source, test)
    if why:
      console.say(f"No k-NN or linear evaluation: {why}.")
    self._has_labels = not why
    self._data = DataSet(config.data, train_source, test)

  # --- Online -----------------------------------------------------------------

  def online(
    self, step: int, state: TrainState, writer: metrics.MetricWriter
  ) -> None:
    """Measures and logs the encoder as it is now."""
    if not self._settings.every_epochs:
      return
    start = time.monotonic()
    found = list(self._measure_online(step, state))
    if not found:
      return
    scalars = _scalars(found)
    writer.write(step, {f"online/{name}": v for name, v in scalars.items()})
    try:
      record_results(writer.workdir, found)
    except UserError as error:
      console.say(f"WARNING at step {step}: {error}")
    console.say(
      f"step {step}  online{' (random init)' if step == 0 else ''}:"
      f" {_summary(scalars)}  [{time.monotonic() - start:.1f} s]"
    )

  def _measure_online(
    self, step: int, state: TrainState
  ) -> Iterator[results.Result]:
    binding = self._bind(state, step)
    for name, protocol in protocols.online(self._settings).items():
      labels = evaluator_of(protocol).labels
      if labels and not self._has_labels:
        continue
      data_set = self._bank if labels else self._data
      try:
        result = binding.measure(name, protocol, data_set, online=True)
      except UserError as error:
        # A measurement that cannot be made is no reason to lose the run.
        console.say(f"WARNING at step {step}: no online evaluation: {error}")
        continue
      yield dataclasses.replace(result, values=results.shown(result))

  @functools.cached_property
  def _bank(self) -> DataSet:
    """The data of online k-NN and probe: train is a part of all of train."""
    train = self._data.train
    count = self._settings.bank_examples or train.num_examples
    part = self._binder.sample(train, count, seed=0)
    return DataSet(self._data.settings, part, self._data.test)

  # --- At the end -------------------------------------------------------------

  def final(
    self, state: TrainState, writer: metrics.MetricWriter, workdir: str
  ) -> None:
    """Prints k-NN and linear accuracy beside those of the baselines."""
    if not self._has_labels:
      return
    try:
      found = list(self._measure_final(state))
      self._print(found)
      record_results(workdir, found)
    except UserError as error:
      # The encoder is trained and saved; `evaluate` can measure it.
      console.say(f"WARNING: no final evaluation: {error}")
      return
    trained = _scalars(r for r in found if r.encoder == results.TRAINED)
    writer.write(
      int(state.step), {f"final_{name}": v for name, v in trained.items()}
    )

  def _measure_final(self, state: TrainState) -> Iterator[results.Result]:
    for binding in self._final_bindings(state):
      console.say(f"Evaluating {binding.weights.encoder} ...")
      for name, protocol in protocols.final(self._settings).items():
        yield binding.measure(name, protocol, self._data)

  def _final_bindings(self, state: TrainState) -> Iterator[Binding]:
    if self._settings.baselines:
      yield Binding(self._binder, RAW_PIXELS)
      random_init = step_lib.init_state(self._experiment)
      yield self._bind(random_init, 0, results.RANDOM_INIT)
    yield self._bind(state, int(state.step))

  def _print(self, found: Sequence[results.Result]) -> None:
    settings = self._settings
    train, test = self._data.train.num_examples, self._data.test.num_examples
    console.say(
      f"\nAccuracy on {test} held-out images ({train} train images;"
      f" k-NN with k = {settings.num_neighbors}, T = {settings.temperature};"
      " linear is L2 logistic regression on frozen features)"
    )
    console.say(f"{'':14}{'k-NN':>9}{'linear':>9}")
    for name, row in itertools.groupby(found, lambda result: result.encoder):
      cells = "".join(f"{result.final:9.2%}" for result in row)
      console.say(f"{name:14}{cells}")

  def _bind(
    self, state: TrainState, step: int, encoder: str = results.TRAINED
  ) -> Binding:
    """Binds the weights of a state."""
    variables = devices.local_view(
      {"params": state.params, "batch_stats": state.batch_stats},
      self._binder.mesh,
    )
    # Of copies: on CPUs, an array that NumPy has seen cannot be donated.
    checksum = hashing.checksum(_copies(variables))
    return Binding(self._binder, Weights(encoder, step, variables, checksum))


@jax.jit
def _copies(variables: dict[str, Any]) -> dict[str, Any]:
  return jax.tree.map(jnp.copy, variables)


def _why_not(train: Source, test: Source | None) -> str:
  """Returns why there is no accuracy to measure; "" if there is one."""
  if not train.num_classes:
    return "the images have no labels"
  if train.multi_label:
    return "the images have several labels each"
  if test is None:
    return "there is no evaluation split (data.eval_split)"
  if not test.num_classes:
    return f"{test.name} has no labels, though the train images have"
  return ""


def record_results(workdir: str, found: Sequence[results.Result]) -> None:
  """Adds results to the run's results.json, from process 0."""
  if jax.process_index() == 0:
    folder = epath.Path(workdir)
    with files.writing("the results", folder):
      results.write_results(folder / results.FILE_NAME, found)


def _scalars(found: Iterable[results.Result]) -> dict[str, float]:
  """Returns the numbers of results by their names in the metrics."""
  scalars = {}
  for result in found:
    kind = result.protocol.partition("/")[0]
    if result.final is not None:
      scalars[kind] = result.final
    else:
      scalars |= {f"{kind}/{name}": v for name, v in result.values.items()}
  return scalars


def _summary(scalars: Mapping[str, float]) -> str:
  """Returns the few numbers that the console shows."""
  shown = {
    "knn": "k-NN {:.2%}",
    "linear": "linear {:.2%}",
    "collapse/rank_me/features": "RankMe {:.1f}",
    "collapse/lidar": "LiDAR {:.1f}",
    "collapse/codes/entropy_mean": "entropy of a variable {:.2f} nats",
  }
  return ", ".join(
    text.format(scalars[name])
    for name, text in shown.items()
    if name in scalars
  )
