"""Turns a run into what evaluators are given: features, views and labels.

The only place that does so. A `Binder` compiles the functions of a network
once; a `Binding` puts weights to them, those of a training state (`online`) or
of a checkpoint (`offline`), and measures protocols on a `DataSet`.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

import imsvd_jax
from imsvd_jax.base import agreement, console, devices
from imsvd_jax.base.errors import EXIT_SAVED, Stopped, UserError
from imsvd_jax.data import boxes, evaluation_batches, host_pipeline, part
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import (
  augmented_views,
  epochs,
  feature_cache,
  input_checks,
  protocols,
  results,
)
from imsvd_jax.evaluation.data_set import DataSet, preparation
from imsvd_jax.evaluation.features import Embed, Features, extract
from imsvd_jax.evaluation.inputs import (
  Backbone,
  Batches,
  Evaluator,
  Inputs,
  TrainEpoch,
)
from imsvd_jax.evaluation.registry import evaluate, evaluator_of
from imsvd_jax.models import Encoder
from imsvd_jax.runs import encoder as encoder_lib


class Network(NamedTuple):
  """A network without its weights."""

  model: Encoder  # Its backbone and projector.
  config: ConfigDict  # The recipe, or what a file of weights has of it.
  data: ConfigDict  # The recipe's `data`, complete.
  discrete: bool  # Whether embeddings are soft discrete variables.
  has_views: bool  # Whether it has a projector and a recipe of views.


class Weights(NamedTuple):
  """Weights to measure, and how `results.json` names them."""

  encoder: str  # As `Result.encoder`.
  step: int | None  # Of the checkpoint; None for raw pixels.
  # {"params", "batch_stats"} on this process's devices; None for raw pixels.
  variables: dict[str, Any] | None
  checksum: str | None  # Of the variables.


RAW_PIXELS = Weights(results.RAW_PIXELS, None, None, None)


class Binder:
  """Functions of a network's weights and of images, compiled once."""

  def __init__(self, network: Network, *, batch_size: int) -> None:
    """Compiles nothing yet; rounds the global batch up to fit the devices."""
    self.network = network
    self.mesh = devices.make_mesh(jax.local_devices())
    num_devices = self.mesh.size * jax.process_count()
    self.batch_size = -(-batch_size // num_devices) * num_devices
    self._features = jax.jit(
      functools.partial(encoder_lib.features_of, network.model, network.data)
    )
    self._samples: dict[tuple[int, int, int], tuple[Source, Source]] = {}
    self.stopping: Callable[[], bool] = lambda: False

  @functools.cached_property
  def views(self) -> augmented_views.ViewEmbedder:
    """The embedder of augmented views."""
    return augmented_views.ViewEmbedder(
      self.network.model,
      self.network.config,
      discrete=self.network.discrete,
      batch_size=self.batch_size,
    )

  def sample(self, source: Source, count: int, *, seed: int) -> Source:
    """Returns `augmented_views.some_images`, which are read once."""
    key = (id(source), count, seed)
    if key not in self._samples:
      some = augmented_views.some_images(source, count, seed=seed)
      self._samples[key] = (source, some)  # The source, to keep its id.
    return self._samples[key][1]

  def embed(
    self, weights: Weights, images: np.ndarray
  ) -> jax.Array | np.ndarray:
    """Maps this process's uint8 [B, S, S, C] to features float32 [B, F]."""
    if weights.variables is None:
      return images.reshape(len(images), -1).astype(np.float32) / 255.0
    count = len(images) + -len(images) % self.mesh.size
    placed = devices.shard_batch(devices.pad_rows(images, count), self.mesh)
    features = self._features(weights.variables, placed)
    return features[: len(images)] if count > len(images) else features

  def eval_batches(self, source: Source, resize: int, crop: int) -> Batches:
    """Yields this process's share of the images, each once.

    Raises:
      Stopped: `stopping` says that the run is to end.
    """
    batches = evaluation_batches.eval_batches(
      source,
      batch_size=self.batch_size,
      resize=resize,
      crop=crop,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    for batch in batches:
      if self.stopping():
        raise Stopped(EXIT_SAVED)
      yield batch


class Binding:
  """One set of weights of a network, ready to be measured.

  Features are shared by all protocols that look at the same images.
  """

  def __init__(
    self,
    binder: Binder,
    weights: Weights,
    *,
    cache: pathlib.Path | None = None,
    data_dir: str = "",
    keep: Callable[[dict[str, Any]], epochs.Keeper] | None = None,
  ) -> None:
    """Computes nothing yet.

    Args:
      binder: Of the network.
      weights: What to measure.
      cache: Directory that keeps features; they stay in memory by default.
      data_dir: Where the data sets are that protocols bring along.
      keep: From all that a training is a function of to its keeper; nothing is
        kept by default.
    """
    self.binder = binder
    self.weights = weights
    self.embed: Embed = functools.partial(binder.embed, weights)
    self._cache = cache
    self._data_dir = data_dir
    self._keep = keep
    self._features: dict[tuple[int, int, int], tuple[Source, Features]] = {}

  def measure(
    self,
    name: str,
    protocol: protocols.Protocol,
    run_data: DataSet,
    *,
    online: bool = False,
    known: Iterable[Mapping[str, Any]] = (),
  ) -> results.Result:
    """Returns the result of one protocol.

    Args:
      name: The protocol's, for the record.
      protocol: What to measure.
      run_data: For protocols that do not bring their own.
      online: Whether a training run measures itself, for the record.
      known: Entries of results.json that need no repetition.

    Raises:
      UserError: Data and protocol do not fit each other.
      Exception: It could not be measured. After any other than `LostPeerError`
        all processes can measure the next protocol, if the evaluator's work is
        not `joint`.
    """
    start = time.monotonic()
    evaluator = evaluator_of(protocol)
    data_set, remedy = run_data, ""
    if evaluator.own_data is not None:
      own = self.binder.network.data
      settings, remedy = evaluator.own_data(protocol, own, self._data_dir)
      data_set = DataSet(settings)
    planned = results.Result(
      protocol=name,
      evaluator=protocol.evaluator,
      hyperparameters=dataclasses.asdict(protocol),
      data=data_set.described(with_test=evaluator.labels),
      step=self.weights.step,
      seed=getattr(protocol, "seed", 0),
      online=online,
      encoder=self.weights.encoder,
      weights=self.weights.checksum,
    )
    before = results.find(known, planned)
    if before is not None:
      return before
    subject = _Subject(self, data_set, protocol)
    try:
      _check_before_the_work(evaluator, protocol, data_set)
      inputs = subject.inputs(evaluator)
    except UserError as error:
      if evaluator.own_data is None:
        raise
      # The other protocols are still worth having.
      return dataclasses.replace(planned, skipped=f"{error} {remedy}".rstrip())
    return results.with_values(
      planned,
      dict(evaluate(protocol, inputs)),  # A generator: here is the work.
      num_images=subject.num_images(evaluator),
      seconds=time.monotonic() - start,
    )

  def features(
    self,
    source: Source,
    settings: ConfigDict,
    name: str,
    resize: int,
    crop: int,
  ) -> Features:
    """Returns the features of all images, computed once for every protocol.

    `settings` are the source's `config.data`; `resize` is the size of the
    shorter side before the central crop, of side `crop`.
    """
    key = (id(source), resize, crop)
    if key not in self._features:
      compute = lambda: extract(
        self.embed,
        self.binder.eval_batches(source, resize, crop),
        name=f"{name} images",
      )
      if self._cache is None:
        found = compute()
      else:
        prepared = preparation(settings) | {"resize": resize, "crop": crop}
        stored_as = {
          **self._weights_key(),
          "data": source.fingerprint(),
          "split": source.name,
          "preprocessing": prepared,
        }
        found = feature_cache.cached_features(self._cache, stored_as, compute)
      self._features[key] = (source, found)  # The source, to keep its id.
    return self._features[key][1]

  def keeper(
    self, data_set: DataSet, protocol: protocols.Protocol
  ) -> epochs.Keeper | None:
    """Returns what keeps the training of a protocol, if anything does."""
    if self._keep is None:
      return None
    sources = (data_set.train, data_set.test)
    return self._keep(
      {
        **self._weights_key(),
        "data": [source.fingerprint() for source in sources],
        "splits": [source.name for source in sources],
        "preprocessing": preparation(data_set.settings),
        "train_crops": [data_set.train.train_kernel, data_set.train.antialias],
        "evaluator": protocol.evaluator,
        "protocol": dataclasses.asdict(protocol),
      }
    )

  def _weights_key(self) -> dict[str, Any]:
    return {
      "weights": self.weights.checksum,
      "dtype": str(self.binder.network.config.model.dtype),
      "version": imsvd_jax.__version__,
    }


class _Subject:
  """Weights and data under one protocol.

  A method per field of `Inputs`, of its name, makes what goes there.
  """

  def __init__(
    self, binding: Binding, data_set: DataSet, protocol: Any
  ) -> None:
    self._binding = binding
    self._binder = binding.binder
    self._data = data_set
    self._protocol = protocol

  def inputs(self, evaluator: Evaluator) -> Inputs:
    """Returns what the evaluator declares that it needs, and no more."""
    return Inputs(**{name: getattr(self, name)() for name in evaluator.needs})

  def num_images(self, evaluator: Evaluator) -> int:
    """Returns how many images the numbers are of."""
    images = self._data.test if evaluator.labels else self._sample
    return images.num_examples

  # --- Features ---------------------------------------------------------------

  def train(self) -> Features:
    return self._central(self._data.train, "train")

  def test(self) -> Features:
    return self._central(self._data.test, "test")

  def sample(self) -> Features:
    return self._central(self._sample, "train")

  def test_crops(self) -> Features:
    wanted, settings = self._protocol.crops, self._data.settings
    return self._binding.features(
      self._data.test, settings, "test", wanted.test_resize, wanted.size
    )

  def _central(self, source: Source, name: str) -> Features:
    settings = self._data.settings
    return self._binding.features(
      source, settings, name, settings.resize, settings.crop
    )

  # --- Labels and images ------------------------------------------------------

  def num_classes(self) -> int:
    return self._data.train.num_classes

  def train_labels(self) -> Callable[[], np.ndarray]:
    return lambda: part.labels_of(self._data.train)

  def test_labels(self) -> Callable[[], np.ndarray]:
    return lambda: part.labels_of(self._data.test)

  def train_epochs(self) -> Callable[[np.ndarray | None], TrainEpoch]:
    protocol, own = self._protocol, self._binder.network.data.crop
    if protocol.crops.size != own:
      console.say(
        f"NOTE: this protocol's crops have {protocol.crops.size} pixels, the"
        f" run's own {own}; --set=crops=run takes the run's."
      )

    def epochs_of(chosen: np.ndarray | None) -> TrainEpoch:
      train = self._data.train
      return host_pipeline.labeled_epochs(
        train if chosen is None else part.take(train, chosen),
        crop=boxes.Crop(*dataclasses.astuple(protocol.crops)[:4]),
        batch_size=protocol.batch_size,
        seed=protocol.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )

    return epochs_of

  def test_batches(self) -> Callable[[], Batches]:
    wanted = self._protocol.crops
    return lambda: self._binder.eval_batches(
      self._data.test, wanted.test_resize, wanted.size
    )

  def keeper(self) -> epochs.Keeper | None:
    return self._binding.keeper(self._data, self._protocol)

  # --- The network ------------------------------------------------------------

  def embed(self) -> Embed:
    return self._binding.embed

  def backbone(self) -> Backbone | None:
    variables = self._binding.weights.variables
    if variables is None:
      return None
    network = self._binder.network
    params, batch_stats = (
      variables[name].get("backbone", {}) for name in ("params", "batch_stats")
    )
    apply = functools.partial(_apply_backbone, network.model, network.data)
    side = self._protocol.crops.size
    images = jax.ShapeDtypeStruct(
      (1, side, side, network.data.channels), np.uint8
    )
    features, _ = jax.eval_shape(
      functools.partial(apply, train=False), params, batch_stats, images
    )
    return Backbone(apply, params, batch_stats, features.shape[-1])

  # --- Views ------------------------------------------------------------------

  @functools.cached_property
  def _sample(self) -> Source:
    protocol = self._protocol
    with agreement.together():  # It may read records.
      return self._binder.sample(
        self._data.train, protocol.max_images, seed=protocol.seed
      )

  @functools.cached_property
  def _views(self) -> Mapping[str, np.ndarray]:
    variables = self._binding.weights.variables
    if variables is None or not self._binder.network.has_views:
      return {}
    return self._binder.views.inputs(variables, self._sample, self._protocol)

  def embeddings(self) -> np.ndarray | None:
    return self._views.get("embeddings")

  def view_groups(self) -> np.ndarray | None:
    return self._views.get("view_groups")

  def codes(self) -> np.ndarray | None:
    return self._views.get("codes")


def _apply_backbone(
  model: Encoder,
  settings: ConfigDict,
  params: Any,
  batch_stats: Any,
  images: jax.Array,
  train: bool,
) -> tuple[jax.Array, Any]:
  """Returns the features of uint8 images, and the updated statistics."""
  features, updated = model.apply(
    {"params": {"backbone": params}, "batch_stats": {"backbone": batch_stats}},
    encoder_lib.normalized(images, settings),
    train=train,
    method=model.features,
    mutable=["batch_stats"],
  )
  return features, updated.get("batch_stats", {}).get("backbone", {})


def _check_before_the_work(
  evaluator: Evaluator, protocol: protocols.Protocol, data_set: DataSet
) -> None:
  """Raises for mistakes that would otherwise show after hours of embedding."""
  train = data_set.train
  if evaluator.labels:
    test = data_set.test
    for source, name in ((train, "train"), (test, "test")):
      if not source.num_classes:
        input_checks.check_labels(None, source.num_examples, name)
    # A stream's labels are not known before its records are read.
    if not (train.labels is None or test.labels is None or train.multi_label):
      input_checks.check_classes(train.labels, test.labels[test.labels >= 0])
  if evaluator.check is not None:
    evaluator.check(protocol, train.num_examples)
