"""The command `evaluate`: loads runs, measures them and keeps the results.

Features are shared by all protocols that look at the same images, and kept on
disk under what they are a function of. So is where a long training stands,
until everything is measured. The encoder is frozen: its weights and BatchNorm
statistics are compared before and after every protocol.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from imsvd_jax.base import agreement, console, hashing
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import check_directory
from imsvd_jax.data import named
from imsvd_jax.evaluation import protocols, results, tables
from imsvd_jax.evaluation.binder import Binder, Binding, Network, Weights
from imsvd_jax.evaluation.data_set import DataSet
from imsvd_jax.evaluation.epochs import Keeper
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.evaluation.features import reason_of
from imsvd_jax.evaluation.registry import evaluator_of
from imsvd_jax.runs import interruption, metrics, ownership
from imsvd_jax.runs.encoder import (
  LoadedEncoder,
  data_settings,
  data_to_read,
  load_encoder,
)
from imsvd_jax.training.experiment import MAX_HOLDOUT

UNFINISHED = "unfinished"  # Directory beside the results.


def evaluate_runs(options: Options) -> list[results.Result]:
  """Evaluates each run, keeps the results and prints them as a table.

  Returns:
    Every result, run by run.

  Raises:
    UserError: Something does not fit, or protocols failed, a line for each;
      all that could be measured is kept.
  """
  if not options.workdir:
    raise UserError("--workdir names no run.")
  if options.output and len(options.workdir) > 1:
    raise UserError(
      f"--output={options.output} for {len(options.workdir)} runs, which would"
      " share one file; leave it out, or evaluate one at a time."
    )
  # Check what needs no weights before the first run is loaded.
  _check_splits(options)
  if options.data:
    named.check(options.data, options.splits)
  _choose(options, protocols.Crops(size=1, test_resize=1))
  everything, compared, failures = [], [], []
  for workdir in options.workdir:
    found: list[results.Result] = []
    try:
      run = Run(workdir, options)
      for result in run.measure_all():
        found.append(result)
      failures += run.failures
    finally:
      if found:
        _report(found, workdir, options)
    everything += found
    entries = [results.as_entry(result) for result in found]
    compared.append(tables.Run(run.encoder.config.to_dict(), entries))
  if options.markdown:
    _print(tables.markdown_table(compared))
  if failures:
    raise UserError("\n".join(failures))
  return everything


def _choose(
  options: Options, run_crops: protocols.Crops | None
) -> dict[str, protocols.Protocol]:
  return protocols.choose(
    options.protocol, options.set, seed=options.seed, run_crops=run_crops
  )


def _check_splits(options: Options) -> None:
  if options.splits and len(options.splits) != 2:
    raise UserError(
      f"--splits={','.join(options.splits)}; expected two names: of the train"
      " and of the test split."
    )


def _report(
  found: list[results.Result], workdir: str, options: Options
) -> None:
  """Prints the table of a run; beside the --markdown one, to the log."""
  text = results.table(found)
  if options.markdown:
    console.say(text)
  elif len(options.workdir) > 1:
    _print(f"{workdir}, step {found[0].step}\n{text}")
  else:
    _print(text)


def _print(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


class Run:
  """A run's frozen encoder and data, and the file of its results.

  Attributes:
    failures: A line for each protocol, or number of one, that failed.
  """

  def __init__(self, workdir: str, options: Options) -> None:
    """Loads the weights; raises UserError if the options do not fit them."""
    self._options = options
    self._output = _output_directory(workdir, options.output)
    self.encoder = load_encoder(
      workdir,
      options.step,
      use_target=options.target,
      check=functools.partial(self._choose_data, workdir),
    )
    self._keepers: list[Keeper] = []
    self._stop: interruption.StopRequest | None = None
    self._binding = Binding(
      Binder(_network(self.encoder), batch_size=options.batch_size),
      Weights(
        results.TRAINED,
        self.encoder.step,
        self.encoder.variables,
        hashing.checksum(self.encoder.variables),
      ),
      cache=self._cache_directory(),
      data_dir=options.data_dir,
      keep=self._keeper,
    )
    written = results.read_results(self._output / results.FILE_NAME)
    self._known = written if options.reuse else []
    self.failures: list[str] = []

  def measure_all(self) -> Iterator[results.Result]:
    """Measures, keeps and yields the result of each protocol in turn."""
    for name, protocol in self._chosen.items():
      console.say(f"{name} ...")
      try:
        result = self._binding.measure(
          name, protocol, self._data, known=self._known
        )
      except (agreement.LostPeerError, AssertionError):
        raise  # The latter is a bug of ours, whose traceback is needed.
      except Exception as error:
        if jax.process_count() > 1 and evaluator_of(protocol).joint:
          raise  # The others may be waiting for this process.
        self._failed(name, reason_of(error))
        continue
      for number, reason in result.failed.items():
        self._failed(f"{name}: {number}", reason)
      weights = self._binding.weights
      if hashing.checksum(weights.variables) != weights.checksum:
        raise RuntimeError("The frozen encoder changed during its evaluation.")
      self._keep(result)
      yield result
    for keeper in self._keepers:
      keeper.remove()

  def _keeper(self, key: Mapping[str, Any]) -> Keeper:
    directory = self._output / UNFINISHED
    self._keepers.append(Keeper(directory, self._stopping, key))
    return self._keepers[-1]

  def _stopping(
    self,
  ) -> contextlib.AbstractContextManager[interruption.StopRequest]:
    """Listens for signals; with peers until the command ends.

    JAX's service, which then owns SIGTERM, cannot be switched on again.
    """
    if jax.process_count() == 1:
      return interruption.StopRequest()
    if self._stop is None:
      self._stop = interruption.StopRequest().__enter__()
    return contextlib.nullcontext(self._stop)

  def _failed(self, name: str, reason: str) -> None:
    self.failures.append(f"{name}: {reason}")
    console.say(f"FAILED: {self.failures[-1]}")

  def _choose_data(self, workdir: str, config: ConfigDict) -> None:
    """Finds mistakes in what to measure on before the weights are read."""
    options = self._options
    self._chosen = _choose(options, _run_crops(config))
    reads_own = any(
      evaluator_of(protocol).own_data is None
      for protocol in self._chosen.values()
    )
    if reads_own and not options.data:
      ownership.check_data(workdir, config, trusted=options.trust_workdir)
    self._data = _data_set(config, options)
    if reads_own and options.splits:
      self._data.make()  # A wrong name is one line, not one of each protocol.

  def _cache_directory(self) -> pathlib.Path:
    if self._options.cache:
      return pathlib.Path(os.path.expanduser(self._options.cache))
    if "://" in str(self._output):
      return pathlib.Path.home() / ".cache" / "imsvd_jax" / "features"
    return pathlib.Path(self._output) / "features"

  def _keep(self, result: results.Result) -> None:
    """Writes a result to results.json and TensorBoard, from process 0."""
    if jax.process_index():
      return
    results.write_results(self._output / results.FILE_NAME, [result])
    scalars = results.scalars(result)
    if scalars:
      folder = os.fspath(self._output / "tensorboard" / "evaluate")
      metrics.write_tensorboard(folder, result.step or 0, scalars)


def _data_set(config: ConfigDict, options: Options) -> DataSet:
  """Returns the data that the options name; the run's own by default."""
  settings = data_to_read(config, options.data)
  if options.splits:
    settings.train_split, settings.eval_split = options.splits
  elif not options.data and "eval" in config:
    bank_split = config.eval.get("bank_split", "")
    settings.train_split = bank_split or settings.train_split
  if options.holdout is not None:
    if not 0 <= options.holdout <= MAX_HOLDOUT:
      raise UserError(
        f"--holdout={options.holdout:g}; expected a share of 0 to"
        f" {MAX_HOLDOUT}, such as 0.1."
      )
    settings.holdout = options.holdout
    # The part that is held out has no name, but no name means none.
    settings.eval_split = settings.eval_split or "held out"
  elif options.data and not options.splits:
    console.say(
      f"Splits of {options.data}: {settings.train_split!r} and"
      f" {settings.eval_split!r}; --splits=TRAIN,TEST names others."
    )
  return DataSet(settings)


def _network(encoder: LoadedEncoder) -> Network:
  return Network(
    model=encoder.model,
    config=encoder.config,
    data=data_settings(encoder.config),
    discrete=encoder.discrete,
    has_views=encoder.has_projector and "views" in encoder.config,
  )


def _run_crops(config: ConfigDict) -> protocols.Crops | None:
  """Returns the crops of the run, as a protocol has them, where it says."""
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


def _output_directory(workdir: str, output: str) -> epath.Path:
  path = epath.Path(os.path.expanduser(output or workdir))
  if not output and path.is_file():
    raise UserError(
      f"{workdir} is a file of weights; name a directory for its results with"
      " --output."
    )
  check_directory(path)
  return path
