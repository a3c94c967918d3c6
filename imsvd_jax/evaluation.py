"""Evaluation inside a pretraining run: online k-NN, and the closing table.

Binds the run's model and data to the evaluators, which see neither.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from imsvd_jax import augment, data, metrics, sharding
from imsvd_jax import train_step as step_lib
from imsvd_jax.data import pipeline
from imsvd_jax.errors import UserError
from imsvd_jax.evaluators import features, knn, linear


class Evaluation:
  """k-NN and linear accuracy of a run's encoder on its own data set.

  The bank and the probe's training set are the train split, the queries are
  the eval split. Says once, and does nothing, where there is no eval split or
  there are no labels.

  Each process embeds its own share of the images on its own devices, then all
  gather the features of all and evaluate them alike.
  """

  def __init__(self, experiment: step_lib.Experiment, train_source: Any):
    self._experiment = experiment
    self._mesh = sharding.make_mesh(jax.local_devices())
    self._config = experiment.config
    self._train = train_source
    self._eval = None
    self._apply = jax.jit(
      functools.partial(_features, experiment.model, self._config.data)
    )
    source = data.make_source(self._config.data, "eval")
    if not train_source.num_classes:
      self._skip("the images have no labels")
    elif source is None:
      self._skip("there is no evaluation split (data.eval_split)")
    else:
      self._eval = source

  def online(self, step: int, state: Any, writer: metrics.MetricWriter) -> None:
    """Measures and logs k-NN accuracy of the encoder as it is now."""
    if self._eval is None or not self._config.eval.every_epochs:
      return
    start = time.monotonic()
    try:
      accuracy = self._knn(*self._extract(self.embed(state)))
    except UserError as error:
      # A measurement that cannot be made is no reason to lose the run.
      metrics.say(f"WARNING at step {step}: no online k-NN: {error}")
      return
    writer.write(step, {"knn": accuracy})
    metrics.say(
      f"step {step}  online k-NN {accuracy:.2%}"
      f"{' (random init)' if step == 0 else ''}"
      f"  [{time.monotonic() - start:.1f} s]"
    )

  def final(
    self, state: Any, writer: metrics.MetricWriter, workdir: str
  ) -> None:
    """Prints k-NN and linear accuracy beside what one had for nothing."""
    if self._eval is None:
      return
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
      metrics.say(f"Evaluating {name} ...")
      train, test = self._extract(embed)
      results[name] = {
        "knn": self._knn(train, test),
        "linear": linear.logistic_regression(
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
    variables = sharding.local_view(
      {"params": state.params, "batch_stats": state.batch_stats}, self._mesh
    )

    def embed(images):
      return self._apply(variables, sharding.shard_batch(images, self._mesh))

    return embed

  def _extract(self, embed) -> tuple[features.Features, features.Features]:
    return tuple(
      features.extract(embed, self._batches(source))
      for source in (self._train, self._eval)
    )

  def _batches(self, source) -> Iterator[dict[str, np.ndarray]]:
    return pipeline.eval_batches(
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
    metrics.say(
      f"\nAccuracy on {test} held-out images ({train} train images;"
      f" k-NN with k = {settings.num_neighbors}, T = {settings.temperature};"
      " linear is L2 logistic regression on frozen features)"
    )
    metrics.say(f"{'':14}{'k-NN':>9}{'linear':>9}")
    for name, row in results.items():
      metrics.say(f"{name:14}{row['knn']:9.2%}{row['linear']:9.2%}")
    if jax.process_index() == 0:
      with open(os.path.join(workdir, "final.json"), "w") as file:
        rows = {k: {**row, "num_images": test} for k, row in results.items()}
        json.dump(rows, file, indent=2)

  def _skip(self, why: str) -> None:
    metrics.say(f"No k-NN or linear evaluation: {why}.")


def _features(model, settings, variables, images) -> jax.Array:
  images = augment.normalize(images, mean=settings.mean, std=settings.std)
  return model.apply(variables, images, train=False)[0]


def _pixels(images: np.ndarray) -> np.ndarray:
  return images.reshape(len(images), -1).astype(np.float32) / 255.0
