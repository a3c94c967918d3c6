"""Evaluation inside a pretraining run: online numbers, and the closing table.

Binds the run's model and data to the evaluators, which see neither. The online
linear head is fitted to the features of the online k-NN: no gradient reaches
the encoder, and the training step needs no label and does no work for it.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from imsvd_jax import data
from imsvd_jax.base import console, devices, files
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import evaluation_batches
from imsvd_jax.evaluation import (
  PROTOCOLS,
  augmented_views,
  collapse,
  features,
  inputs,
  knn,
  logistic,
  probe,
  results,
)
from imsvd_jax.runs import metrics
from imsvd_jax.training import augment
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib


class Evaluation:
  """Numbers of a run's encoder on its own data set.

  With labels, k-NN and linear accuracy: the bank and the probe's training set
  are the train split, the queries are the eval split. Says once where there is
  no eval split or there are no labels. Without labels, how much of its space
  the embedding uses.

  Each process embeds its own share of the images on its own devices, then all
  gather the features of all and evaluate them alike.
  """

  def __init__(self, experiment: experiment_lib.Experiment, train_source: Any):
    self._experiment = experiment
    self._mesh = devices.make_mesh(jax.local_devices())
    self._config = experiment.config
    self._train = train_source
    self._eval = None
    self._apply = jax.jit(
      functools.partial(_features, experiment.model, self._config.data)
    )
    source = data.make_source(self._config.data, "eval")
    if not train_source.num_classes:
      self._skip("the images have no labels")
    elif train_source.multi_label:
      self._skip("the images have several labels each")
    elif source is None:
      self._skip("there is no evaluation split (data.eval_split)")
    elif not source.num_classes:
      self._skip(f"{source.name} has no labels, though the train images have")
    else:
      self._eval = source

  def online(self, step: int, state: Any, writer: metrics.MetricWriter) -> None:
    """Measures and logs the encoder as it is now."""
    if not self._config.eval.every_epochs:
      return
    start = time.monotonic()
    found: dict[str, float] = {}
    for measure in (self._online_probes, self._online_collapse):
      try:
        for name, value in measure(state):
          found[name] = value  # What comes before an error is kept.
      except UserError as error:
        # A measurement that cannot be made is no reason to lose the run.
        console.say(f"WARNING at step {step}: no online evaluation: {error}")
    if not found:
      return
    writer.write(step, {f"online/{name}": v for name, v in found.items()})
    console.say(
      f"step {step}  online{' (random init)' if step == 0 else ''}:"
      f" {_summary(found)}  [{time.monotonic() - start:.1f} s]"
    )

  def _online_probes(self, state: Any) -> Iterator[tuple[str, float]]:
    """Accuracy of k-NN and of a linear head on features as they are now."""
    if self._eval is None:
      return
    train, test = self._extract(self.embed(state), self._bank)
    yield "knn", self._knn(train, test)
    epochs = self._config.eval.linear_epochs
    if not epochs:
      return
    protocol = dataclasses.replace(PROTOCOLS["linear/online"], epochs=epochs)
    result = probe.linear_probe(
      train.features,
      train.labels,
      test.features,
      test.labels,
      **dataclasses.asdict(protocol),
    )
    yield "linear", result.accuracy.top1

  def _online_collapse(self, state: Any) -> Iterator[tuple[str, float]]:
    """What the evaluator `collapse` says of some images of train."""
    if not self._config.eval.collapse_images:
      return
    images, embedder, protocol = self._collapse_subject
    found = embedder.inputs(self._variables(state), images, protocol)
    central = features.extract(
      self.embed(state), self._batches(images), name="images"
    )
    given = inputs.Inputs(train=central, **found)
    for name, value in collapse.run(given, protocol):
      if not results.is_detail(name):
        yield f"collapse/{name}", value

  @functools.cached_property
  def _bank(self) -> Any:
    """The images that vote and that the linear head learns from, online."""
    count = self._config.eval.bank_examples or self._train.num_examples
    return augmented_views.some_images(self._train, count, seed=0)

  @functools.cached_property
  def _collapse_subject(self) -> tuple[Any, Any, Any]:
    """Some images, what embeds their views, and the protocol."""
    count = self._config.eval.collapse_images
    protocol = dataclasses.replace(
      PROTOCOLS["collapse/online"],
      max_images=count,
      lidar_groups=max(2, count // 8),
    )
    embedder = augmented_views.ViewEmbedder(
      self._experiment.model,
      self._config,
      discrete=self._experiment.objective.discrete,
      batch_size=self._config.eval.batch_size,
    )
    images = augmented_views.some_images(self._train, count, seed=0)
    return images, embedder, protocol

  def final(
    self, state: Any, writer: metrics.MetricWriter, workdir: str
  ) -> None:
    """Prints k-NN and linear accuracy beside what one had for nothing."""
    if self._eval is None:
      return
    try:
      self._final(state, writer, workdir)
    except UserError as error:
      # The encoder is trained and saved; `imsvd_jax.evaluate` can measure it.
      console.say(f"WARNING: no final evaluation: {error}")

  def _final(
    self, state: Any, writer: metrics.MetricWriter, workdir: str
  ) -> None:
    encoders = {"trained": self.embed(state)}
    if self._config.eval.baselines:
      random_init = step_lib.init_state(self._experiment)
      encoders = {
        "raw pixels": _pixels,
        "random init": self.embed(random_init),
        **encoders,
      }
    results = {}
    for name, embed in encoders.items():
      console.say(f"Evaluating {name} ...")
      train, test = self._extract(embed, self._train)
      results[name] = {
        "knn": self._knn(train, test),
        "linear": logistic.logistic_regression(
          train.features, train.labels, test.features, test.labels
        ).accuracy.top1,
      }
    self._report(results, workdir)
    step = int(state.step)
    writer.write(step, {f"final_{k}": v for k, v in results["trained"].items()})

  def embed(self, state: Any) -> Callable[[np.ndarray], jax.Array]:
    """Returns images uint8 [B, H, W, C] -> features float32 [B, F].

    Of this process's images; B is a multiple of its devices.
    """
    variables = self._variables(state)

    def embed(images):
      return self._apply(variables, devices.shard_batch(images, self._mesh))

    return embed

  def _variables(self, state: Any) -> dict[str, Any]:
    return devices.local_view(
      {"params": state.params, "batch_stats": state.batch_stats}, self._mesh
    )

  def _extract(
    self, embed, train: Any
  ) -> tuple[features.Features, features.Features]:
    return tuple(
      features.extract(embed, self._batches(source))
      for source in (train, self._eval)
    )

  def _batches(self, source) -> Iterator[dict[str, np.ndarray]]:
    return evaluation_batches.eval_batches(
      source,
      batch_size=self._config.eval.batch_size,
      resize=self._config.data.resize,
      crop=self._config.data.crop,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _knn(self, train, test) -> float:
    settings = self._config.eval
    k, temperature = settings.num_neighbors, settings.temperature
    results = knn.knn_accuracy(
      train.features,
      train.labels,
      test.features,
      test.labels,
      num_neighbors=[k],
      temperatures=[temperature],
    )
    return results[k, temperature].top1

  def _report(self, results: dict[str, dict[str, float]], workdir: str) -> None:
    settings = self._config.eval
    train, test = self._train.num_examples, self._eval.num_examples
    console.say(
      f"\nAccuracy on {test} held-out images ({train} train images;"
      f" k-NN with k = {settings.num_neighbors}, T = {settings.temperature};"
      " linear is L2 logistic regression on frozen features)"
    )
    console.say(f"{'':14}{'k-NN':>9}{'linear':>9}")
    for name, row in results.items():
      console.say(f"{name:14}{row['knn']:9.2%}{row['linear']:9.2%}")
    if jax.process_index() == 0:
      rows = {k: {**row, "num_images": test} for k, row in results.items()}
      folder = epath.Path(workdir)
      with files.writing("the final numbers", folder):
        (folder / "final.json").write_text(json.dumps(rows, indent=2))

  def _skip(self, why: str) -> None:
    console.say(f"No k-NN or linear evaluation: {why}.")


def _summary(found: Mapping[str, float]) -> str:
  """The few numbers that the console shows."""
  shown = {
    "knn": "k-NN {:.2%}",
    "linear": "linear {:.2%}",
    "collapse/rank_me/features": "RankMe {:.1f}",
    "collapse/lidar": "LiDAR {:.1f}",
    "collapse/codes/entropy_mean": "entropy of a variable {:.2f} nats",
  }
  return ", ".join(
    text.format(found[name]) for name, text in shown.items() if name in found
  )


def _features(model, settings, variables, images) -> jax.Array:
  images = augment.normalize(images, mean=settings.mean, std=settings.std)
  return model.apply(variables, images, train=False)[0]


def _pixels(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float32) / 255.0
