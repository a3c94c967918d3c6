"""The training loop: follow a batch from the data set to the update."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from imsvd_jax import data
from imsvd_jax.base import agreement, console, devices, files
from imsvd_jax.base.errors import EXIT_SAVED, Stopped
from imsvd_jax.base.every import Every
from imsvd_jax.data import array_batches, boxes, host_pipeline, placement
from imsvd_jax.data.source import Source
from imsvd_jax.evaluation.online import Evaluation
from imsvd_jax.runs import (
  environment,
  interruption,
  log_lines,
  metrics,
  ownership,
  resume,
  weights,
)
from imsvd_jax.runs import lock as lock_lib
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.metric_lines import Mark
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import finite
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.experiment import BEGINNING, Experiment, Progress
from imsvd_jax.training.state import TrainState

_Batches = Iterator[dict[str, Any]]
_Steps = Mapping[int, Callable[..., Any]]  # Side of the global views -> step.


@interruption.ends_with_its_peers
def train_and_evaluate(config: ConfigDict, workdir: str) -> TrainState:
  """Pretrains an encoder, or resumes a run, and evaluates it.

  Args:
    config: A recipe (see configs/common.py).
    workdir: Directory of the run. A run found there is resumed.

  Returns:
    The final state.

  Raises:
    UserError: The config, the data or the workdir does not fit; one line that
      says what to do.
    Stopped: A SystemExit: SIGTERM or SIGINT came, or too many updates were not
      finite; `base.errors` lists the codes.
  """
  # --- Build: the config is checked before anything is written ---------------
  environment.check()
  mesh = devices.make_mesh()
  experiment_lib.check(config, mesh.size)
  source = data.make_source(config.data, "train")
  experiment = experiment_lib.build(config, source.num_examples)
  if config.init_from and resume.is_new(workdir):
    weights.check_source(config.init_from)
  with agreement.together(workdir):
    workdir = files.make(workdir)
  with (
    lock_lib.owned(workdir) as lock,
    log_lines.log_of(workdir),
    interruption.StopRequest(has_steps=False) as stop,
  ):
    return _pretrain(experiment, source, mesh, workdir, lock, stop)


def _pretrain(
  experiment: Experiment,
  source: Source,
  mesh: jax.sharding.Mesh,
  workdir: str,
  lock: lock_lib.Lock,
  stop: interruption.StopRequest,
) -> TrainState:
  """Starts or resumes the run in a directory that nobody else writes to."""
  # --- Start or resume -------------------------------------------------------
  config = experiment.config
  checkpointer = resume.open_checkpoints(config, source.num_examples, workdir)
  ownership.sign(workdir, config)
  start, state = _start(experiment, source, mesh, checkpointer, workdir)
  experiment = start.experiment
  if start.is_finished:
    stop.close()
    checkpointer.close()
    return _finished(start, source, state, workdir)
  log_lines.describe_change(experiment, start.progress, start.changed, state)
  log_lines.describe_run(experiment, state.params, mesh, workdir, start.step)
  log_lines.describe_data(config, source)

  # --- What the loop needs ---------------------------------------------------
  batches = _batches(experiment, source, mesh, start.steps)
  run = _open(start, state, checkpointer, workdir, lock)
  train_steps, state, batches = _train_steps(start, mesh, state, batches)
  evaluation = Evaluation(experiment, source)
  log_period = Every(steps=config.log.every_steps)
  evaluation_period = Every(steps=experiment.evaluation_steps)
  save_period = Every(
    steps=config.checkpoint.every_steps,
    minutes=config.checkpoint.every_minutes,
    clock_steps=config.log.every_steps,
  )

  # --- The loop --------------------------------------------------------------
  with _closing(checkpointer, run.writer):
    if start.step == 0:
      evaluation.online(0, state, run.writer, lambda: stop.asked)
    _check_may_start(stop)
    for step, batch in zip(start.steps, batches, strict=True):
      is_last = step == experiment.last_step
      judgment = log_lines.NO_JUDGMENT
      train_step = train_steps[experiment.view_size(step)]
      state, step_metrics = train_step(state, batch)  # Returns at once.
      stop.has_steps = True

      run.log.flush()  # The step before, while the devices compute this one.
      run.log.add(step, step_metrics, write=is_last or log_period.due(step))

      if is_last or evaluation_period.due(step):
        run.log.flush()  # The order of lines must not depend on the clock.
        lock.check()
        with run.log.paused():
          evaluation.online(step, state, run.writer)
          judgment = run.log.judge(step)
        is_last |= experiment_lib.ends(config, judgment.state)

      is_better = checkpointer.improves(judgment.scores)
      if is_last or is_better or save_period.due(step):
        run.save(step, state, step_metrics, judgment)
        save_period.restart()

      if stop.requested(step):
        run.save(step, state, step_metrics, judgment)
        checkpointer.wait()
        console.say(
          f"Stopped by a signal: step {step} is saved. The same command"
          " resumes."
        )
        raise Stopped(EXIT_SAVED)
      if is_last:
        break
    checkpointer.wait()

    # --- Finish: all is saved; a signal ends the process again ----------------
    stop.close()
    log_lines.describe_end(run.writer)
    if config.eval.final:
      evaluation.final(state, run.writer, workdir)
    log_lines.describe_next(
      workdir, config.model.backbone, evaluation.has_labels
    )
  return state


# --- Its parts ----------------------------------------------------------------


def _check_may_start(stop: interruption.StopRequest) -> None:
  """Ends a run before its first step, whose compilation may take minutes."""
  if stop.asked:
    console.say(
      "Stopped by a signal before the first step: nothing was to be saved."
      " The same command starts again."
    )
    raise Stopped(EXIT_SAVED)


class _Start(NamedTuple):
  """Where training begins: at step 0, or at the newest checkpoint.

  Attributes:
    experiment: What the config means from `step` on.
    step: Updates so far.
    progress: How far the run has come.
    marks: What the checkpoints record of the metrics.
    changed: Keys of the run's plan that differ from the checkpoint's.
    is_finished: Whether there is no step left.
  """

  experiment: Experiment
  step: int = 0
  progress: Progress = BEGINNING
  marks: Sequence[Mark] = ()
  changed: Sequence[str] = ()
  is_finished: bool = False

  @property
  def steps(self) -> range:
    """The steps that are left."""
    return range(self.step + 1, self.experiment.last_step + 1)


class _Run(NamedTuple):
  """What the loop writes to; `save` is the order in which it does."""

  start: _Start
  lock: lock_lib.Lock
  checkpointer: Checkpointer
  writer: metrics.MetricWriter
  skip_limit: finite.SkipLimit
  log: log_lines.StepLog

  def save(
    self,
    step: int,
    state: TrainState,
    step_metrics: Mapping[str, Any],
    judgment: log_lines.Judgment,
  ) -> None:
    """Saves a checkpoint; a state that is not finite ends the run."""
    self.lock.check()
    self.log.flush()
    # A resumed run finds all lines before its checkpoint.
    mark = self.writer.sync()
    skips = jax.device_get(state.skips)
    self.skip_limit.check(skips, finite.checked_names(step_metrics))
    progress = self.start.experiment.progress(
      step, step_metrics["learning_rate"], self.start.progress
    )
    record = {"progress": progress._asdict(), "metrics": mark._asdict()}
    record |= judgment._asdict()
    if not self.checkpointer.save(step, state, record):
      finite.stop(f"The state of step {step} is not finite and was not saved.")


def _start(
  experiment: Experiment,
  source: Source,
  mesh: jax.sharding.Mesh,
  checkpointer: Checkpointer,
  workdir: str,
) -> tuple[_Start, TrainState]:
  """Restores the newest checkpoint, or makes the first state."""
  config, replicated = experiment.config, devices.replicated(mesh)
  restored = checkpointer.restore(
    step_lib.abstract_state(experiment, replicated)
  )
  if restored is None:
    console.say(f"A new run in {workdir}: making the first weights.")
    state = step_lib.initial_state(experiment, replicated)
    if config.init_from:
      state, report = weights.init_from(config.init_from, state)
      console.say(f"Weights from {config.init_from}, {report}")
    return _Start(experiment), state
  state, step = restored
  with agreement.together(workdir):
    marks = resume.load_marks(workdir, step)
    progress, changed = resume.load_progress(workdir, step, experiment)
  experiment = experiment_lib.build(
    config, source.num_examples, step=step, progress=progress
  )
  was_ended = resume.was_ended(workdir, step, config)
  is_finished = was_ended or step >= experiment.last_step
  start = _Start(experiment, step, progress, marks, changed, is_finished)
  return start, state


def _finished(
  start: _Start, source: Source, state: TrainState, workdir: str
) -> TrainState:
  """Says how to go on; evaluates if a kill came before that was done."""
  experiment, step = start.experiment, start.step
  config = experiment.config
  more = (
    f"--config.epochs={2 * config.epochs:g}"
    " --config.allow_changes=\"('epochs',)\""
  )
  if step < experiment.last_step:
    more = '--config.stop.when=""'
  console.say(f"{workdir}: finished at step {step}; for more: {more}.")
  is_evaluated = metrics.check_finished(workdir, step, start.marks)
  if config.eval.final and not is_evaluated:
    writer = metrics.MetricWriter(workdir, start_step=step, marks=start.marks)
    Evaluation(experiment, source).final(state, writer, workdir)
    writer.close()
  return state


def _batches(
  experiment: Experiment, source: Source, mesh: jax.sharding.Mesh, steps: range
) -> _Batches:
  """Yields the batch of each step, on the devices."""
  config, images = experiment.config, source.images
  order = dict(
    batch_size=config.batch_size,
    seed=config.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  # Images in memory are cut out by the step, on the devices.
  where = experiment_lib.placement(config)
  data_set = placement.data_set(source, where, mesh)
  batches: _Batches
  if images is None:
    # A pipeline for each size of the views, opened when its steps come.
    batches = itertools.chain.from_iterable(
      itertools.islice(
        host_pipeline.train_batches(
          source,
          views=experiment_lib.at_size(config, size).views,
          start_step=part.start - 1 + experiment.offset,
          **order,
        ),
        len(part),
      )
      for part, size in experiment.phases(steps)
    )
  else:
    batches = array_batches.ordered(
      images,
      boxes.view_crops(config.views),
      start_step=steps.start - 1 + experiment.offset,
      **order,
    )
    if data_set is None:
      batches = placement.with_images(batches, images)
  every_step = {} if data_set is None else {"data_set": data_set}
  batches = devices.prefetch(itertools.islice(batches, len(steps)), mesh)
  return (batch | every_step for batch in batches)


def _open(
  start: _Start,
  state: TrainState,
  checkpointer: Checkpointer,
  workdir: str,
  lock: lock_lib.Lock,
) -> _Run:
  """Opens the metrics and the log of the run."""
  config = start.experiment.config
  with agreement.together(workdir):
    others = metrics.other_writers(config, workdir)
  writer = metrics.MetricWriter(
    workdir, start_step=start.step, marks=start.marks, others=others
  )
  log_lines.record_config(writer, config)
  skip_limit = finite.SkipLimit(
    config.not_finite.policy,
    config.not_finite.max_in_a_row,
    seen=int(state.skips.total),
  )
  log = log_lines.StepLog(
    start.experiment,
    writer,
    skip_limit,
    start_step=start.step,
    every_seconds=config.log.progress_seconds,
  )
  return _Run(start, lock, checkpointer, writer, skip_limit, log)


def _train_steps(
  start: _Start,
  mesh: jax.sharding.Mesh,
  state: TrainState,
  batches: _Batches,
) -> tuple[_Steps, TrainState, _Batches]:
  """Returns the step for each size of the views, the state and the batches.

  Several sizes are compiled ahead, for the state and the first batch as they
  lie on the devices.
  """
  experiment, replicated = start.experiment, devices.replicated(mesh)
  sizes = [size for _, size in experiment.phases(start.steps)]
  train_steps = step_lib.train_steps(experiment, replicated, sizes)
  if len(sizes) == 1:
    return train_steps, state, batches
  first = next(batches)
  shardings = step_lib.state_shardings(experiment, replicated)
  state = jax.device_put(state, shardings)
  compiled = step_lib.compile_ahead(train_steps, state, first)
  return compiled, state, itertools.chain([first], batches)


@contextlib.contextmanager
def _closing(
  checkpointer: Checkpointer, writer: metrics.MetricWriter
) -> Iterator[None]:
  """Closes both; after a failure without hiding it or waiting for peers."""
  try:
    yield
  except BaseException as error:
    if jax.process_count() == 1 or isinstance(error, Stopped):
      for thing in (checkpointer, writer):
        with contextlib.suppress(Exception):
          thing.close()
    raise
  checkpointer.close()
  writer.close()


__all__ = ["train_and_evaluate"]
