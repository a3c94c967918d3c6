"""Binds runs to the evaluators: weights, data, views, and where results go.

Features are shared by all protocols that look at the same images, and kept on
disk under what they are a function of. The backbone is frozen: its weights and
BatchNorm statistics are compared before and after every probe.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import imsvd_jax
from imsvd_jax import data
from imsvd_jax.base import console, hashing
from imsvd_jax.base import devices as sharding
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.base.files import check_directory
from imsvd_jax.data import crops, evaluation_batches, host_pipeline, part
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation import (
  PROTOCOLS,
  TRANSFER,
  augmented_views,
  evaluate,
  feature_cache,
  finetune,
  input_checks,
  knn,
  protocols,
  results,
  tables,
  transfer,
)
from imsvd_jax.evaluation.features import Features, extract
from imsvd_jax.evaluation.inputs import Inputs
from imsvd_jax.runs import metrics
from imsvd_jax.runs.encoder import data_settings, load_encoder

RESULTS_FILE = "results.json"
TRANSFER_PREFIX = "transfer"


# --- The command --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Options:
  """What to evaluate, and how; the flags of the command.

  Attributes:
    protocols: Names in `PROTOCOLS`, "transfer" or "transfer/SET".
    settings: Hyper-parameters to change, as `protocols.with_settings` takes.
    step: Which checkpoint; the newest by default.
    use_target: Take the EMA target network's weights.
    data: "NAME" or "NAME=PATH" of another data set than the run's own.
    splits: Names of its train and test split; the run's own by default.
    data_dir: Where the transfer sets lie; TensorFlow Datasets' own by default.
    seed: Of every protocol that has one.
    batch_size: Images that are embedded together, over all devices.
    output: Directory of the results; the run's own by default.
    cache: Directory of the features; "features" in the output by default.
    reuse: Take measurements that are there already for the same weights.
  """

  protocols: Sequence[str]
  settings: Sequence[str] = ()
  step: int | None = None
  use_target: bool = False
  data: str = ""
  splits: Sequence[str] = ()
  data_dir: str = ""
  seed: int | None = None
  batch_size: int = 256
  output: str = ""
  cache: str = ""
  reuse: bool = False


def evaluate_runs(
  workdirs: Sequence[str], options: Options, *, markdown: bool = False
) -> list[results.Result]:
  """Evaluates each run, keeps the results and prints them as a table.

  Args:
    workdirs: Directories of runs, or files of weights.
    options: What to evaluate.
    markdown: Print one table that compares the runs instead.

  Returns:
    Every result, run by run.

  Raises:
    UserError: Something does not fit; what was measured before is kept.
  """
  if not workdirs:
    raise UserError("--workdir names no run.")
  if options.output and len(workdirs) > 1:
    raise UserError(
      f"--output={options.output} for {len(workdirs)} runs, which would share"
      " one file; leave it out, or evaluate one at a time."
    )
  # A wrong name is better known before the first run is loaded.
  choose(options, protocols.Crops(size=1, test_resize=1))
  everything, compared = [], []
  for workdir in workdirs:
    found: list[results.Result] = []
    try:
      run = Run(workdir, options)
      for result in run.measure_all():
        found.append(result)
    finally:
      if found and not markdown:
        title = f"{workdir}, step {run.encoder.step}\n" if workdirs[1:] else ""
        _print(f"{title}{results.table(found)}")
      elif found:
        console.say(results.table(found))
    everything += found
    entries = [results.as_entry(result) for result in found]
    compared.append(tables.Run(run.encoder.config.to_dict(), entries))
  if markdown:
    _print(tables.markdown_table(compared))
  return everything


def choose(
  options: Options, run_crops: protocols.Crops | None
) -> dict[str, protocols.Protocol]:
  """Returns the protocols that the options name, with their settings.

  Args:
    options: What to evaluate.
    run_crops: What "crops=run" stands for; None if nobody knows.

  Raises:
    UserError: A name, key or value is unknown.
  """
  known = {
    **PROTOCOLS,
    TRANSFER_PREFIX: None,
    **{f"{TRANSFER_PREFIX}/{name}": None for name in TRANSFER},
  }
  chosen = {}
  for name in options.protocols:
    protocol = lookup(known, name, "protocol")
    if name == TRANSFER_PREFIX:
      chosen |= {f"{TRANSFER_PREFIX}/{n}": _transfer(n) for n in TRANSFER}
    else:
      chosen[name] = protocol or _transfer(name.partition("/")[2])
  if not chosen:
    raise UserError("--protocol names none; --protocol=help lists them.")
  if options.seed is not None:
    chosen = {
      name: _seeded(protocol, options.seed) for name, protocol in chosen.items()
    }
  return protocols.with_settings(chosen, options.settings, run_crops=run_crops)


def _transfer(name: str) -> protocols.Lbfgs:
  metric = TRANSFER[name].metric
  return dataclasses.replace(PROTOCOLS["linear/lbfgs"], metric=metric)


def _seeded(protocol: protocols.Protocol, seed: int) -> protocols.Protocol:
  has_seed = any(f.name == "seed" for f in dataclasses.fields(protocol))
  return dataclasses.replace(protocol, seed=seed) if has_seed else protocol


def _print(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


# --- One run ------------------------------------------------------------------


class Run:
  """A run's frozen encoder on a data set, as the evaluators want it."""

  def __init__(self, workdir: str, options: Options):
    """Loads the weights.

    Args:
      workdir: Directory of the run, or a file of weights.
      options: What to evaluate.

    Raises:
      UserError: There are no such weights, or the options do not fit them.
    """
    self._options = options
    self._output = _output_directory(workdir, options.output)
    self.encoder = load_encoder(
      workdir, options.step, use_target=options.use_target
    )
    self._chosen = choose(options, self._run_crops())
    self._mesh = sharding.make_mesh(jax.local_devices())
    devices = self._mesh.size * jax.process_count()
    self._batch_size = -(-options.batch_size // devices) * devices
    self._apply = jax.jit(self.encoder.apply)
    self._weights = hashing.checksum(self.encoder.variables)
    self._known = results.read_results(self._output / RESULTS_FILE)
    self._features: dict[str, Features] = {}
    self._sources: dict[str, Source] = {}

  def measure_all(self) -> Iterator[results.Result]:
    """Measures, keeps and yields the result of each protocol in turn."""
    for name, protocol in self._chosen.items():
      console.say(f"{name} ...")
      try:
        result = self._measure(name, protocol)
      except UserError as error:
        raise UserError(f"{name}: {error}") from error
      self._keep(result)
      yield result

  # --- Protocols --------------------------------------------------------------

  def _measure(self, name: str, protocol: protocols.Protocol) -> results.Result:
    start = time.monotonic()
    if name.startswith(f"{TRANSFER_PREFIX}/"):
      return self._transfer(name, protocol)
    needs_labels = protocol.evaluator != "collapse"
    train = self._source("train")
    test = self._source("eval") if needs_labels else None
    fields = {
      "protocol": name,
      "evaluator": protocol.evaluator,
      "hyperparameters": dataclasses.asdict(protocol),
      "data": self._described(protocol),
      "step": self.encoder.step,
      "seed": getattr(protocol, "seed", 0),
      "weights": self._weights,
    }
    known = self._measured_before(results.Result(**fields))
    if known is not None:
      return known
    _check_before_the_work(protocol, train, test)
    measure = {
      "linear": self._linear,
      "finetune": self._fine_tune,
      "collapse": self._collapse,
    }.get(protocol.evaluator, self._of_features)
    values, num_images = measure(protocol, train, test)
    values = dict(values)  # Evaluators are generators: here is the work.
    self._check_frozen()
    return results.make_result(
      **fields,
      values=values,
      num_images=num_images,
      seconds=time.monotonic() - start,
    )

  def _of_features(self, protocol, train, test):
    inputs = Inputs(
      train=self._embedded(train, "train"), test=self._embedded(test, "test")
    )
    return evaluate(protocol, inputs), test.num_examples

  def _linear(self, protocol, train, test):
    self._note_other_crops(protocol)
    settings = protocol.crops
    if train.labels is not None:  # Of a stream they come with the batches.
      input_checks.check_classes(train.labels, part.labels_of(test))
    inputs = Inputs(
      test=self._embedded(
        test, "test", resize=settings.test_resize, crop=settings.size
      ),
      num_classes=train.num_classes,
      embed=self._embed,
      train_epoch=host_pipeline.labelled_epochs(
        train,
        crop=crops.Crop(*dataclasses.astuple(settings)[:4]),
        batch_size=protocol.batch_size,
        seed=protocol.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      ),
    )
    return evaluate(protocol, inputs), test.num_examples

  def _fine_tune(self, protocol, train, test):
    self._note_other_crops(protocol)
    labelled = finetune.labelled_part(train, protocol)
    values = finetune.fine_tune(
      self.encoder, labelled, test, protocol, batch_size=self._batch_size
    )
    return values, test.num_examples

  def _collapse(self, protocol, train, test):
    del test
    some = augmented_views.some_images(
      train, protocol.max_images, seed=protocol.seed
    )
    found = {"train": self._embedded(some, "train")}
    if self.encoder.has_projector and "views" in self.encoder.config:
      embedder = augmented_views.ViewEmbedder(
        self.encoder.model,
        self.encoder.config,
        discrete=self.encoder.discrete,
        batch_size=self._batch_size,
      )
      found |= embedder.inputs(self.encoder.variables, some, protocol)
    return evaluate(protocol, Inputs(**found)), some.num_examples

  def _transfer(self, name: str, protocol: protocols.Lbfgs) -> results.Result:
    own = data_settings(self.encoder)
    data_dir = os.path.expanduser(self._options.data_dir)
    data_dir = data_dir or transfer.default_data_dir()

    def load(set_name: str, chosen: transfer.TransferSet):
      settings = own.copy_and_resolve_references()
      settings.num_examples = 0
      settings.name = f"tfds:{chosen.tfds}" if chosen.tfds else "folder"
      settings.path = (
        data_dir if chosen.tfds else os.path.join(data_dir, set_name)
      )
      settings.train_split, settings.eval_split = chosen.train, chosen.test
      return tuple(
        self._embedded(data.make_source(settings, split), set_name)
        for split in ("train", "eval")
      )

    (result,) = transfer.run_transfer(
      load,
      data_dir=data_dir,
      names=(name.partition("/")[2],),
      protocol=protocol,
      step=self.encoder.step,
      weights=self._weights,
      preparation=_preparation(own),
      known=self._measured_before,
    )
    return result

  # --- Data -------------------------------------------------------------------

  def _source(self, split: str) -> Source:
    """Returns the "train" or "eval" part of the data, made once."""
    if split not in self._sources:
      settings = self._data_settings()
      source = data.make_source(settings, split)
      if source is None:
        raise UserError(
          f"{settings.name} has no test split (data.eval_split is empty);"
          " name both with --splits=TRAIN,TEST."
        )
      self._sources[split] = source
    return self._sources[split]

  def _data_settings(self) -> Any:
    options = self._options
    settings = data_settings(self.encoder, options.data)
    if options.splits:
      if len(options.splits) != 2:
        raise UserError(
          f"--splits={','.join(options.splits)}; expected two names: of the"
          " train and of the test split."
        )
      settings.train_split, settings.eval_split = options.splits
    if not settings.name:
      raise UserError(
        "These weights do not say which data they belong to; give --data, such"
        " as --data=tfds:imagenet2012 or --data=folder=~/images."
      )
    return settings

  def _described(self, protocol: protocols.Protocol) -> dict[str, Any]:
    """What `results.json` says about the data."""
    settings = self._data_settings()
    described = {
      "name": settings.name,
      "train": settings.train_split,
      "preprocessing": _preparation(settings),
    }
    if protocol.evaluator != "collapse":
      described["test"] = settings.eval_split
    if settings.path:
      described["path"] = settings.path
    if settings.num_examples:
      described["num_examples"] = settings.num_examples
    return described

  def _run_crops(self) -> protocols.Crops | None:
    """The crops that the run was trained with, as a protocol has them."""
    config = self.encoder.config
    if "views" not in config:
      return None
    view = config.views.view1
    return protocols.Crops(
      size=config.data.crop,
      scale=tuple(view.crop_scale),
      ratio=tuple(view.crop_ratio),
      flip_probability=float(view.flip_prob),
      test_resize=config.data.resize,
    )

  def _note_other_crops(self, protocol: Any) -> None:
    own = self.encoder.config.data.crop
    if protocol.crops.size != own:
      console.say(
        f"NOTE: this protocol's crops have {protocol.crops.size} pixels, the"
        f" run's own {own}; --set=crops=run takes the run's."
      )

  # --- The frozen encoder -----------------------------------------------------

  def _embed(self, images: np.ndarray) -> jax.Array:
    """Maps this process's uint8 [B, S, S, C] to features float32 [B, F]."""
    padding = -len(images) % self._mesh.size
    padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
    placed = sharding.shard_batch(padded, self._mesh)
    features = self._apply(self.encoder.variables, placed)
    return features[: len(images)] if padding else features

  def _embedded(
    self,
    source: Source,
    name: str,
    *,
    resize: int | None = None,
    crop: int | None = None,
  ) -> Features:
    """Returns the features of all images, computed once for every protocol."""
    settings = data_settings(self.encoder)
    settings.resize = resize or settings.resize
    settings.crop = crop or settings.crop
    key = {
      "weights": self._weights,
      "data": source.fingerprint(),
      "split": source.name,
      "preprocessing": _preparation(settings),
      "dtype": str(self.encoder.config.model.dtype),
      "version": imsvd_jax.__version__,
    }
    memory_key = json.dumps(key, sort_keys=True)
    if memory_key not in self._features:
      self._features[memory_key] = feature_cache.cached_features(
        self._cache_directory(),
        key,
        lambda: extract(
          self._embed,
          evaluation_batches.eval_batches(
            source,
            batch_size=self._batch_size,
            resize=settings.resize,
            crop=settings.crop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
          ),
          name=f"{name} images",
        ),
      )
    return self._features[memory_key]

  def _cache_directory(self) -> pathlib.Path:
    if self._options.cache:
      return pathlib.Path(os.path.expanduser(self._options.cache))
    if "://" in str(self._output):
      return pathlib.Path.home() / ".cache" / "imsvd_jax" / "features"
    return pathlib.Path(self._output) / "features"

  def _check_frozen(self) -> None:
    """Raises if a weight or a BatchNorm statistic of the backbone changed."""
    if hashing.checksum(self.encoder.variables) != self._weights:
      raise RuntimeError("The frozen encoder changed during its evaluation.")

  # --- Results ----------------------------------------------------------------

  def _measured_before(self, planned: results.Result) -> results.Result | None:
    """Returns the measurement that is there already, if it may be reused."""
    if not self._options.reuse:
      return None
    return results.find(self._known, planned)

  def _keep(self, result: results.Result) -> None:
    """Writes a result to results.json and TensorBoard, from process 0."""
    if jax.process_index():
      return
    results.write_results(self._output / RESULTS_FILE, [result])
    scalars = results.scalars(result)
    if scalars:
      metrics.write_tensorboard(
        os.fspath(self._output / "tensorboard" / "evaluate"),
        result.step or 0,
        scalars,
      )


def _output_directory(workdir: str, output: str) -> epath.Path:
  path = epath.Path(os.path.expanduser(output or workdir))
  if not output and path.is_file():
    raise UserError(
      f"{workdir} is a file of weights; name a directory for its results with"
      " --output."
    )
  check_directory(path)
  return path


def _preparation(settings: Any) -> dict[str, Any]:
  """How images are prepared, of the data settings."""
  names = ("resize", "crop", "interpolation", "channels", "mean", "std")
  found = settings.to_dict()
  return {
    name: list(value) if isinstance(value, tuple | list) else value
    for name, value in ((name, found[name]) for name in names)
  }


def _check_before_the_work(
  protocol: protocols.Protocol, train: Source, test: Source | None
) -> None:
  """Raises for mistakes that would else show after hours of embedding."""
  if test is not None:
    for source, name in ((train, "train"), (test, "test")):
      if not source.num_classes:
        input_checks.check_labels(None, source.num_examples, name)
  if protocol.evaluator == "knn":
    knn.check_settings(
      sorted(protocol.num_neighbors), protocol.temperatures, train.num_examples
    )
