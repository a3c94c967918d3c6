"""A training run that measures itself: now and then, and at its end.

The online linear head is fitted to the features of the online k-NN: no gradient
reaches the encoder, and the training step needs no labels and does no work for
it.
"""

import collections
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from imsvd_jax import data
from imsvd_jax.base import agreement, console, devices, files, hashing
from imsvd_jax.base.errors import EXIT_SAVED, Stopped, UserError
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import augmented_views, protocols, results
from imsvd_jax.evaluation.binder import (
  RAW_PIXELS,
  Binder,
  Binding,
  Network,
  Weights,
)
from imsvd_jax.evaluation.data_set import DataSet
from imsvd_jax.evaluation.features import reason_of
from imsvd_jax.evaluation.registry import evaluator_of
from imsvd_jax.runs import metrics
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.experiment import Experiment
from imsvd_jax.training.state import TrainState

T = TypeVar("T")

_ENTROPY = re.compile(r"codes/variable/\d+/entropy")  # See `collapse`.


class Evaluation:
  """Numbers of a run's encoder on its own data set.

  With labels, k-NN and linear accuracy: the bank and the probe's training set
  are the train split, the queries are the eval split. Says once where there is
  no eval split or there are no labels. Without labels, how much of its space
  the embedding uses.

  Each process embeds its own share of the images on its own devices, then all
  gather the features of all and evaluate them alike. Numbers go to the metrics
  and, with how they were made, to results.json.

  Attributes:
    has_labels: Whether there is an accuracy to measure.
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
    self._data = DataSet(config.data, train_source)
    self._labelled = self._data
    try:
      self._labelled = _labelled_data(config, train_source)
      why = _why_not(self._labelled)
    except UserError as error:  # Training needs no evaluation part.
      why = f"WARNING: {str(error).rstrip('.')}"
    if why:
      console.say(f"No k-NN or linear evaluation: {why}.")
    self.has_labels = not why
    self._has_shown_views = False
    self._failures: collections.Counter[str] = collections.Counter()

  # --- Online -----------------------------------------------------------------

  def online(
    self,
    step: int,
    state: TrainState,
    writer: metrics.MetricWriter,
    stopping: Callable[[], bool] = lambda: False,
  ) -> None:
    """Measures and logs the encoder as it is now.

    No measurement ends the run: what fails is said once, and counted.

    Args:
      step: Updates so far.
      state: The run's.
      writer: Of its metrics.
      stopping: Asked between batches of images; where it is true, nothing is
        logged.
    """
    if not self._settings.every_epochs:
      return
    start = time.monotonic()
    self._binder.stopping = stopping
    try:
      measured = list(self._measure_online(step, state))
    except Stopped:
      console.say(f"The evaluation of step {step} is left out.")
      return
    if not measured and not self._failures:
      return
    self._show(step, measured, writer)
    found = [
      dataclasses.replace(result, values=results.shown(result))
      for result in measured
    ]
    scalars = _scalars(found)
    if scalars:
      writer.write(step, {f"online/{name}": v for name, v in scalars.items()})
    try:
      record_results(writer.workdir, found)
    except UserError as error:
      console.say(f"WARNING at step {step}: {error}")
    console.say(
      f"step {step}  online{' (random init)' if step == 0 else ''}:"
      f" {_summary(scalars)}{self._failed_so_far()}"
      f"  [{time.monotonic() - start:.1f} s]"
    )

  def _measure_online(
    self, step: int, state: TrainState
  ) -> Iterator[results.Result]:
    failed = functools.partial(self._failed, f"at step {step}: no online")
    binding = _tried(lambda: self._bind(state, step), failed, "any protocol")
    if binding is None:
      return
    for name, protocol in protocols.online(self._settings).items():
      if self._binder.stopping():
        raise Stopped(EXIT_SAVED)
      if evaluator_of(protocol).labels and not self.has_labels:
        continue
      measure = functools.partial(self._measure, binding, name, protocol)
      result = _tried(measure, failed, name)
      if result is None:
        continue
      for number, reason in result.failed.items():
        failed(f"{name} {number}", reason)
      yield result

  def _show(
    self,
    step: int,
    measured: Sequence[results.Result],
    writer: metrics.MetricWriter,
  ) -> None:
    """Writes what is looked at: views, once, and a histogram of the variables.

    The views come from process 0 alone, which is the one that writes.
    """
    shown: dict[str, Any] = {}
    entropies = [
      value
      for result in measured
      for name, value in result.values.items()
      if _ENTROPY.fullmatch(name)
    ]
    if entropies:
      shown["code/entropies"] = np.asarray(entropies)
    if jax.process_index() == 0 and not self._has_shown_views:
      self._has_shown_views = True
      try:
        views = augmented_views.picture(
          self._data.train, self._experiment.config
        )
      except Exception as error:  # No picture ends a run.
        console.say(f"WARNING: no picture of the views: {reason_of(error)}")
      else:
        shown["views/views"] = views
    if shown:
      writer.write(step, shown, timing=True)

  def _measure(
    self, binding: Binding, name: str, protocol: protocols.Protocol
  ) -> results.Result:
    labels = evaluator_of(protocol).labels
    data_set = self._bank if labels else self._data
    return binding.measure(name, protocol, data_set, online=True)

  def _failed(self, when: str, name: str, reason: str) -> None:
    """Says that a measurement failed, the first time; counts it always."""
    self._failures[name] += 1
    if self._failures[name] == 1:
      console.say(f"WARNING {when} evaluation: {name} failed: {reason}")

  def _failed_so_far(self) -> str:
    """Returns the counts of what failed, for the log; "" if nothing did."""
    counts = [f"{name} {n}" for name, n in self._failures.items()]
    return f", failed so far: {', '.join(counts)}" if counts else ""

  @functools.cached_property
  def _bank(self) -> DataSet:
    """The data of online k-NN and probe: train is a part of all of train."""
    train = self._labelled.train
    count = self._settings.bank_examples or train.num_examples
    with agreement.together():  # It may read records.
      part = self._binder.sample(train, count, seed=0)
    return DataSet(self._labelled.settings, part, self._labelled.test)

  # --- At the end -------------------------------------------------------------

  def final(
    self, state: TrainState, writer: metrics.MetricWriter, workdir: str
  ) -> None:
    """Prints k-NN and linear accuracy beside those of the baselines.

    What fails is one line and a missing number; `evaluate` can repeat it.
    """
    if not self.has_labels:
      return
    reasons: list[str] = []
    found = list(self._measure_final(state, reasons))
    if not found:
      console.say(f"WARNING: no final evaluation: {reasons[-1]}")
      return
    self._print(found)
    try:
      record_results(workdir, found)
    except UserError as error:
      console.say(f"WARNING: no final evaluation: {error}")
    trained = _scalars(r for r in found if r.encoder == results.TRAINED)
    if trained:
      writer.write(
        int(state.step), {f"final_{name}": v for name, v in trained.items()}
      )

  def _measure_final(
    self, state: TrainState, reasons: list[str]
  ) -> Iterator[results.Result]:
    """Yields what can be measured; appends why the rest cannot."""

    def failed(name: str, reason: str) -> None:
      reasons.append(reason)
      console.say(f"WARNING: no {name} of {encoder}: {reason}")

    for encoder, bind in self._final_bindings(state).items():
      binding = _tried(bind, failed, "final evaluation")
      if binding is None:
        continue
      console.say(f"Evaluating {encoder} ...")
      for name, protocol in protocols.final(self._settings).items():
        measure = functools.partial(
          binding.measure, name, protocol, self._labelled
        )
        result = _tried(measure, failed, name)
        if result is not None:
          yield result

  def _final_bindings(
    self, state: TrainState
  ) -> dict[str, Callable[[], Binding]]:
    """Returns what makes each row of the closing table, by its name."""
    found = {results.TRAINED: lambda: self._bind(state, int(state.step))}
    if not self._settings.baselines:
      return found
    random_init = lambda: step_lib.init_state(self._experiment)
    return {
      results.RAW_PIXELS: lambda: Binding(self._binder, RAW_PIXELS),
      results.RANDOM_INIT: lambda: self._bind(
        random_init(), 0, results.RANDOM_INIT
      ),
      **found,
    }

  def _print(self, found: Sequence[results.Result]) -> None:
    settings = self._settings
    train, test = (
      source.num_examples
      for source in (self._labelled.train, self._labelled.test)
    )
    console.print_result(
      f"\nAccuracy on {test} held-out images ({train} train images;"
      f" k-NN with k = {settings.num_neighbors}, T = {settings.temperature};"
      " linear is L2 logistic regression on frozen features)"
    )
    console.print_result(f"{'':14}{'k-NN':>9}{'linear':>9}")
    for name, row in itertools.groupby(found, lambda result: result.encoder):
      final = {result.protocol: result.final for result in row}
      cells = "".join(
        f"{final[p]:9.2%}" if p in final else f"{'-':>9}"
        for p in protocols.FINAL
      )
      console.print_result(f"{name:14}{cells}")

  def _bind(
    self, state: TrainState, step: int, encoder: str = results.TRAINED
  ) -> Binding:
    """Binds the weights of a state."""
    variables = devices.whole(
      {"params": state.params, "batch_stats": state.batch_stats}
    )
    with agreement.together():
      variables = devices.local_view(variables, self._binder.mesh)
      # Of copies: on CPUs, an array that NumPy has seen cannot be donated.
      checksum = hashing.checksum(_copies(variables))
    return Binding(self._binder, Weights(encoder, step, variables, checksum))


@jax.jit
def _copies(variables: dict[str, Any]) -> dict[str, Any]:
  return jax.tree.map(jnp.copy, variables)


def _tried(
  measure: Callable[[], T], failed: Callable[[str, str], None], name: str
) -> T | None:
  """Returns what `measure` does; None, and calls `failed`, if it fails.

  Every process fails alike (see `agreement.together`), so that none waits for
  another in a collective. A lost peer is no failed measurement.
  """
  try:
    return measure()
  except agreement.LostPeerError:
    raise
  except Exception as error:
    failed(name, reason_of(error))
    return None


def _labelled_data(config: ConfigDict, train: Source) -> DataSet:
  """Returns the bank and the test images; the bank is train by default."""
  settings, bank = config.data, train
  if bank_split := config.eval.get("bank_split", ""):
    settings = settings.copy_and_resolve_references()
    settings.train_split = bank_split
    bank = data.make_source(settings, "train")
  return DataSet(settings, bank, data.make_source(settings, "eval"))


def _why_not(data_set: DataSet) -> str:
  """Returns why there is no accuracy to measure; "" if there is one."""
  train, test = data_set.train, data_set.given_test
  if not train.num_classes:
    reason = f" ({train.why_unlabeled})" if train.why_unlabeled else ""
    return f"the images have no labels{reason}"
  if train.multi_label:
    return "the images have several labels each"
  if test is None:
    return "there is no evaluation split (data.eval_split)"
  if not test.num_classes:
    reason = f" ({test.why_unlabeled})" if test.why_unlabeled else ""
    return f"{test.name} has no labels{reason}, though the train images have"
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
    "collapse/codes/entropy_mean": "entropy of the chosen bins {:.2f} nats",
  }
  return ", ".join(
    text.format(scalars[name])
    for name, text in shown.items()
    if name in scalars
  )
