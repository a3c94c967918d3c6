"""The training loop: follow a batch from the data set to the update."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from imsvd_jax import data
from imsvd_jax.base import console, devices, files
from imsvd_jax.base.config import HARMLESS_KEYS, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import host_pipeline
from imsvd_jax.evaluation.online import Evaluation
from imsvd_jax.objectives.diagnostics import collapse_warning
from imsvd_jax.runs import checkpointer as checkpoint
from imsvd_jax.runs import interruption, metrics, resume, weights
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import finite
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.finite import Skips
from imsvd_jax.training.state import TrainState

# A random network may look collapsed; one that has trained this long is.
MIN_STEPS_TO_WARN = 50

Hook = Callable[[int, TrainState, dict[str, Any]], None]


@interruption.ends_with_its_peers
def train_and_evaluate(
  config: ml_collections.ConfigDict, workdir: str
) -> TrainState:
  """Pretrains an encoder, or continues to, and evaluates it.

  Args:
    config: A recipe (see configs/common.py).
    workdir: Directory of the run. A run found there is continued.

  Returns:
    The final state.

  Raises:
    UserError: The config, the data or the workdir does not fit; one line that
      says what to do.
    Stopped: A SystemExit: SIGTERM or SIGINT came, or too many updates were not
      finite; `interruption` lists the codes.
  """
  # --- Check and build -------------------------------------------------------
  mesh = devices.make_mesh()
  devices.check_batch_size(config.batch_size, mesh.size, "batch_size")
  devices.check_batch_size(config.eval.batch_size, mesh.size, "eval.batch_size")
  _check_policy(config.not_finite)
  _check_periods(config)
  train_source = data.make_source(config.data, "train")
  experiment = experiment_lib.build(config, train_source.num_examples)
  host_pipeline.view_crops(config.views)  # Refuses what cannot be cut.
  workdir = files.make(workdir)

  # --- Start or resume -------------------------------------------------------
  # The order of the data hangs on it, and a folder's is in no configuration.
  facts = {"images_found": train_source.num_examples}
  checkpointer = checkpoint.Checkpointer(
    workdir,
    keep_last=config.checkpoint.keep_last,
    keep_every=config.checkpoint.keep_every,
    config=config.to_dict(),
    facts=facts,
  )
  if checkpointer.latest_step() is not None:
    stored = resume.load_facts(workdir)
    resume.check_config(
      resume.load_config(workdir) | stored,
      # Checkpoints of earlier versions have no facts.
      config.to_dict() | (facts if stored else {}),
      harmless=HARMLESS_KEYS,
      allow=config.allow_changes,
    )
  state = jax.jit(
    functools.partial(step_lib.init_state, experiment),
    out_shardings=devices.replicated(mesh),
  )()
  state, start_step = _restore_or_init(config, checkpointer, state)
  _describe(config, mesh, state, experiment, workdir, start_step)
  _describe_data(config, train_source)

  # --- Hooks -----------------------------------------------------------------
  writer = metrics.MetricWriter(workdir, start_step=start_step)
  progress = metrics.Progress(
    total_steps=experiment.total_steps,
    steps_per_epoch=experiment.steps_per_epoch,
    batch_size=config.batch_size,
    start_step=start_step,
    every_seconds=config.log.progress_seconds,
  )
  evaluation = Evaluation(experiment, train_source)
  finiteness = _Finiteness(config.not_finite, state)
  log = _Log(config, experiment, writer, progress, finiteness)
  saver = _Saver(checkpointer, log, writer, finiteness)
  hooks: list[Hook] = [
    log,
    _evaluation_hook(config, experiment, evaluation, writer, progress, log),
    # Last: a resumed run finds all lines of the step that was saved.
    _checkpoint_hook(config, experiment, saver),
  ]

  # --- The loop --------------------------------------------------------------
  train_step = step_lib.jit_train_step(experiment, devices.replicated(mesh))
  batches = host_pipeline.train_batches(
    train_source,
    views=config.views,
    batch_size=config.batch_size,
    seed=config.seed,
    start_step=start_step,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  steps = range(start_step + 1, experiment.total_steps + 1)
  batches = itertools.islice(batches, len(steps))
  with _closing(checkpointer, writer):
    with interruption.StopRequest() as stop:
      if start_step == 0:
        evaluation.online(0, state, writer)
      for step, batch in zip(
        steps, devices.prefetch(batches, mesh), strict=True
      ):
        state, step_metrics = train_step(state, batch)
        for hook in hooks:
          hook(step, state, step_metrics)
        if stop.requested(step):
          saver.save_and_exit(step, state, step_metrics)
      checkpointer.wait()
    # --- Finish: all is saved, and signals do again what they always do ------
    if config.eval.final:
      evaluation.final(state, writer, workdir)
  return state


def _check_policy(settings) -> None:
  if settings.policy not in ("skip", "stop"):
    raise UserError(
      f"not_finite.policy={settings.policy!r}; expected 'skip' or 'stop'."
    )
  if settings.max_in_a_row < 0:
    raise UserError(
      f"not_finite.max_in_a_row={settings.max_in_a_row}; expected 0 or more."
    )


def _check_periods(config) -> None:
  # Each step asks whether it is time: too late to find a period of nothing.
  for name, value, least in (
    ("log.every_steps", config.log.every_steps, 1),
    ("checkpoint.every_steps", config.checkpoint.every_steps, 0),
    ("checkpoint.every_minutes", config.checkpoint.every_minutes, 0),
    ("eval.every_epochs", config.eval.every_epochs, 0),
  ):
    if value < least:
      raise UserError(f"{name}={value}; expected {least} or more.")


def _restore_or_init(
  config, checkpointer, state: TrainState
) -> tuple[TrainState, int]:
  """Returns the run's own newest state, or the one that it starts with."""
  restored = checkpointer.restore(state)
  if restored is not None:
    if config.init_from:
      console.say("init_from is ignored: this run has checkpoints of its own.")
    return restored
  if config.init_from:
    state, report = weights.init_from(config.init_from, state)
    console.say(f"Weights from {config.init_from}, {report}")
  return state, 0


@contextlib.contextmanager
def _closing(checkpointer, writer) -> Iterator[None]:
  """Closes both; after a failure without hiding it, or waiting for peers."""
  try:
    yield
  except BaseException as error:
    ended_together = isinstance(error, interruption.Stopped)
    if jax.process_count() == 1 or ended_together:
      for thing in (checkpointer, writer):
        with contextlib.suppress(Exception):
          thing.close()
    raise
  checkpointer.close()
  writer.close()


def _describe(config, mesh, state, experiment, workdir, start_step) -> None:
  """Says what is about to run: parameters, config, devices, steps."""
  say = console.say
  say(metrics.parameter_table(state.params))
  say("Config:")
  for key, value in sorted(flatten(config).items()):
    say(f"  {key} = {value!r}")
  device = mesh.devices.flat[0]
  say(
    f"Devices: {mesh.size} x {device.device_kind} ({device.platform}),"
    f" {jax.process_count()} process(es); jax {jax.__version__}."
  )
  say(f"Workdir: {workdir}")
  if start_step:
    say(f"Continuing from the checkpoint of step {start_step}.")
  say(
    f"Training to step {experiment.total_steps}"
    f" ({experiment.steps_per_epoch:.2f} steps per epoch)."
    " The first step compiles."
  )


def _describe_data(config, source) -> None:
  """Says what was found where the config points: the folder may be another."""
  console.say(f"Data: {source.summary()}.")
  if config.batch_size > source.num_examples:
    console.say(
      f"batch_size={config.batch_size} is more than there are images: every"
      " batch has some of them twice."
    )


class _Log:
  """Hook that writes every so many steps and prints every so many seconds.

  A step's numbers are fetched after the next step has been dispatched: the
  device computes them and goes on, and never waits for the host.
  """

  def __init__(self, config, experiment, writer, progress, finiteness):
    self._finiteness = finiteness
    self._every_steps = config.log.every_steps
    self._experiment = experiment
    self._writer = writer
    self._progress = progress
    self._pending = None
    self._warned = False

  def __call__(self, step: int, state: TrainState, step_metrics: Any) -> None:
    del state
    self.flush()
    is_last = step == self._experiment.total_steps
    write = step % self._every_steps == 0 or is_last
    if write or self._progress.due():
      self._pending = (step, step_metrics, write)
    if is_last:
      self.flush()

  def flush(self) -> None:
    """Writes what waits to be written."""
    if self._pending is None:
      return
    step, step_metrics, write = self._pending
    self._pending = None
    values = metrics.to_floats(step_metrics)
    skips = values.pop("skips")
    if write:
      line = {"epoch": step / self._experiment.steps_per_epoch}
      line |= {**metrics.flat(values), "skipped": skips.total}
      self._writer.write(step, line)
      self._warn(step, values["diagnostics"])
      self._finiteness.check(skips, finite.checked_names(values))
    if self._progress.due() or step == self._experiment.total_steps:
      timing = self._progress.line(step, values)
      if timing:
        self._writer.write(step, timing, timing=True)

  def _warn(self, step: int, diagnostics: dict[str, float]) -> None:
    """Says that the run collapses, once when it begins to."""
    if step < MIN_STEPS_TO_WARN:
      return
    warning = collapse_warning(diagnostics)
    if warning and not self._warned:
      console.say(f"WARNING at step {step}: {warning}")
    self._warned = bool(warning)


class _Finiteness:
  """Says when updates were skipped, and stops the run where that is too much.

  Called at steps that are the same in every process, so that all stop as one.
  """

  def __init__(self, settings, state: TrainState):
    self._settings = settings
    self._seen = int(state.skips.total)  # Of the run that is continued.

  def check(self, skips: Skips, names: Sequence[str]) -> None:
    """Looks at the counts so far.

    Args:
      skips: Of NumPy or Python scalars.
      names: Of the values that the bits of `skips.values` stand for.

    Raises:
      Stopped: The policy says so.
    """
    total = int(skips.total)
    if total == self._seen:
      return
    new, self._seen = total - self._seen, total
    wrong = [n for i, n in enumerate(names) if int(skips.values) >> i & 1]
    what = (
      f"{new} update(s) were not finite and were discarded ({total} so far,"
      f" between steps {int(skips.first)} and {int(skips.last)}; not finite:"
      f" {', '.join(wrong)})"
    )
    worst, limit = int(skips.worst_in_a_row), self._settings.max_in_a_row
    if self._settings.policy == "stop":
      _not_finite(f"{what}; not_finite.policy is 'stop'.")
    if worst > limit:
      _not_finite(f"{what}; {worst} in a row, not_finite.max_in_a_row={limit}.")
    console.say(f"WARNING: {what}.")


def _not_finite(message: str) -> NoReturn:
  console.say(f"error: {message} The checkpoints before are intact.")
  raise interruption.Stopped(interruption.EXIT_NOT_FINITE)


class _Saver:
  """Saves what is worth it, after the metrics that led there."""

  def __init__(self, checkpointer, log, writer, finiteness):
    self._checkpointer = checkpointer
    self._log = log
    self._writer = writer
    self._finiteness = finiteness

  def save(self, step: int, state: TrainState, step_metrics: Any) -> None:
    """Starts to write a checkpoint; stops the run rather than a bad one."""
    self._log.flush()
    self._writer.sync()
    self._finiteness.check(
      jax.device_get(state.skips), finite.checked_names(step_metrics)
    )
    if not self._checkpointer.save(step, state):
      _not_finite(f"The state of step {step} is not finite and was not saved.")

  def save_and_exit(
    self, step: int, state: TrainState, step_metrics: Any
  ) -> NoReturn:
    """Saves, waits until it is on disk, and ends the run."""
    self.save(step, state, step_metrics)
    self._checkpointer.wait()
    console.say(
      f"Stopped by a signal: step {step} is saved. The same command resumes."
    )
    raise interruption.Stopped(interruption.EXIT_SAVED)


def _checkpoint_hook(config, experiment, saver) -> Hook:
  """Saves every so many steps, every so many minutes, and at the end.

  Minutes count at logging steps only: with peers the first process's clock
  decides, and asking it makes all of them wait for one another.
  """
  last_save = time.monotonic()

  def minutes_have_passed() -> bool:
    minutes = (time.monotonic() - last_save) / 60
    due = np.bool_(minutes >= config.checkpoint.every_minutes)
    if jax.process_count() > 1:
      due = multihost_utils.broadcast_one_to_all(due)
    return bool(due)

  def hook(step, state, step_metrics):
    nonlocal last_save
    every_steps = config.checkpoint.every_steps
    due = step == experiment.total_steps
    due |= every_steps > 0 and step % every_steps == 0
    if not due and step % config.log.every_steps == 0:
      due = minutes_have_passed()
    if due:
      saver.save(step, state, step_metrics)
      last_save = time.monotonic()

  return hook


def _evaluation_hook(
  config, experiment, evaluation, writer, progress, log
) -> Hook:
  """Online k-NN every so many epochs, and at the end."""
  every_steps = 0
  if config.eval.every_epochs > 0:
    every_steps = experiment_lib.epochs_to_steps(
      config.eval.every_epochs, experiment.steps_per_epoch
    )

  def hook(step, state, step_metrics):
    del step_metrics
    is_last = step == experiment.total_steps
    if every_steps and (step % every_steps == 0 or is_last):
      log.flush()  # The lines' order must not depend on what was saved when.
      start = time.monotonic()
      evaluation.online(step, state, writer)
      progress.pause(time.monotonic() - start)

  return hook


__all__ = ["train_and_evaluate"]
