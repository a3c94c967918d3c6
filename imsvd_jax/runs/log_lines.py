"""What a run says: its description, and the numbers of its steps."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from ml_collections import ConfigDict

from imsvd_jax.base import agreement, console, files
from imsvd_jax.base.config import flatten
from imsvd_jax.base.console import print_detail, say
from imsvd_jax.base.errors import counted
from imsvd_jax.data import WITHOUT_FILES
from imsvd_jax.runs import metrics
from imsvd_jax.training import finite, optim, verdict
from imsvd_jax.training.experiment import Experiment, Progress
from imsvd_jax.training.state import TrainState

if TYPE_CHECKING:  # It imports TensorFlow.
  from imsvd_jax.data.source import Source


def describe_run(
  experiment: Experiment,
  params: Any,
  mesh: jax.sharding.Mesh,
  workdir: str,
  start_step: int,
) -> None:
  """Prints what is about to run; parameters and config to the log alone."""
  config = experiment.config
  print_detail(metrics.parameter_table(params))
  print_detail("Config:")
  for key, value in sorted(flatten(config).items()):
    print_detail(f"  {key} = {value!r}")
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  say(
    f"Model: {config.model.backbone}, {config.model.dtype}, {count:,}"
    f" parameters with the head of {experiment.embedding_size} dimensions."
  )
  settings = ", ".join(
    f"{name} {value}" for name, value in experiment.hyperparameters.items()
  )
  say(f"Objective: {config.objective.name} ({settings}).")
  device = mesh.devices.flat[0]
  say(
    f"Devices: {mesh.size} x {device.device_kind} ({device.platform}),"
    f" {jax.process_count()} process(es); jax {jax.__version__}."
  )
  if device.platform == "cpu" and config.model.dtype == "bfloat16":
    say(
      "A CPU is slower in bfloat16: --config.model.dtype=float32 makes a new"
      " run faster here."
    )
  log = f"; {LOG_FILE} there has every setting" if _has_log(workdir) else ""
  say(f"Workdir: {workdir}{log}.")
  if start_step:
    say(f"Continuing from the checkpoint of step {start_step}.")
  _describe_warmup(experiment)
  if len(experiment.resolutions) > 1:
    schedule = ", ".join(
      f"{size} from step {done + 1 - experiment.offset}"
      for done, size in experiment.resolutions
    )
    say(
      f"Pixels of a side of the global views: {schedule}. Every size is"
      " compiled before the first step."
    )
  say(
    f"Training to step {experiment.last_step}"
    f" ({experiment.steps_per_epoch:.2f} steps per epoch)."
    " The first step compiles."
  )


def record_config(writer: metrics.MetricWriter, config: ConfigDict) -> None:
  """Writes the config as text beside the numbers."""
  rows = (f"    {k} = {v!r}" for k, v in sorted(flatten(config).items()))
  writer.write(0, {}, words={"config": "\n".join(rows)}, timing=True)


def log_of(workdir: str) -> contextlib.AbstractContextManager[None]:
  """Keeps what is printed in the run's log; a bucket has none."""
  if not _has_log(workdir):
    return contextlib.nullcontext()
  return console.log_in(os.path.join(workdir, LOG_FILE))


def _has_log(workdir: str) -> bool:
  return not files.is_remote(files.absolute(workdir))


def describe_end(writer: metrics.MetricWriter) -> None:
  """Prints the verdict on a run that has ended."""
  found = verdict.judge(writer.history)
  if found is None:
    return
  console.print_result(f"\nVerdict: {verdict.at_end(found)}")


def describe_next(workdir: str, backbone: str, has_labels: bool) -> None:
  """Prints what one may type after a run, of what works for such a run."""
  protocols = "knn/imsvd,collapse" if has_labels else "collapse"
  # torchvision's ViTs have neither mean pooling nor registers.
  library = "timm" if backbone.startswith("vit") else "torchvision"
  run = f"--workdir={shlex.quote(workdir)}"
  console.print_result(
    "\nNext:"
    f"\n  imsvd evaluate {run} --protocol={protocols}"
    f"\n  imsvd explain {run}"
    f"\n  imsvd export {run} --format={library}"
    " --output=encoder.pth"
  )


def _describe_warmup(experiment: Experiment) -> None:
  """Says that the warm-up is shortened, if it is."""
  wanted = experiment.config.optimizer.warmup_epochs
  wanted_steps = round(wanted * experiment.steps_per_epoch)
  steps = optim.fitting_warmup(wanted_steps, experiment.total_steps)
  if steps < wanted_steps:
    say(
      f"optimizer.warmup_epochs={wanted:g} is not shorter than epochs="
      f"{experiment.config.epochs:g}: the warm-up is shortened to"
      f" {counted(steps, 'step')}, a tenth of the run."
    )


def describe_change(
  experiment: Experiment,
  progress: Progress,
  changed: Sequence[str],
  state: TrainState,
) -> None:
  """Says what a changed plan does to the learning rate, if one changed."""
  if not changed:
    return
  now = float(experiment.schedule(state.step - state.skips.total))
  say(
    f"The plan changes ({', '.join(changed)}): the learning rate was"
    f" {progress.learning_rate:.4g} and is {now:.4g} from here on, by"
    f" optimizer.schedule={experiment.config.optimizer.schedule!r};"
    ' "constant" keeps it, "restart" begins a new warm-up and cosine, "cosine"'
    " is the plan of a run of this length."
  )


def describe_data(config: ConfigDict, source: Source) -> None:
  """Prints what the data source found: a path may lead to other images."""
  say(f"Data: {source.summary()}.")
  if config.data.path and config.data.name in WITHOUT_FILES:
    say(
      f"data.path={config.data.path} is not read: data.name is"
      f" {config.data.name!r}, which needs no files. Set data.name, too, such"
      " as --config.data.name=folder."
    )
  if config.batch_size > source.num_examples:
    say(
      f"batch_size={config.batch_size} is larger than the number of images:"
      " every batch repeats some of them."
    )


LOG_FILE = "train.log"


class Judgment(NamedTuple):
  """What all processes know of the verdict on a run.

  Attributes:
    state: One of `verdict.STATES`; "" before the first logged step.
    scores: Of the latest state; see `verdict.scores`.
  """

  state: str
  scores: dict[str, float]


NO_JUDGMENT = Judgment("", {})


class StepLog:
  """Writes the numbers of steps, and prints a line every few seconds.

  `add` keeps a step's numbers on the device; `flush` fetches them. Call `flush`
  after the next step has been dispatched, so that the device never waits for
  the host.

  Args:
    experiment: From `experiment.build`.
    writer: Where the numbers go.
    skip_limit: Checks the skipped updates of the steps that are written.
    start_step: Step that the run continues from.
    every_seconds: Between two lines on the console.
  """

  def __init__(
    self,
    experiment: Experiment,
    writer: metrics.MetricWriter,
    skip_limit: finite.SkipLimit,
    *,
    start_step: int,
    every_seconds: float,
  ) -> None:
    self._experiment = experiment
    self._writer = writer
    self._skip_limit = skip_limit
    self._every_seconds = every_seconds
    self._pending: tuple[int, Mapping[str, Any], bool] | None = None
    self._warned = ""
    stop = experiment.config.get("stop", {})
    self._stop_when_diverged = stop.get("when_diverged", False)
    self._last_time: float | None = None  # Of the line on the console.
    self._last_step = start_step

  def add(
    self, step: int, step_metrics: Mapping[str, Any], *, write: bool
  ) -> None:
    """Keeps a step's numbers if they are to be written or printed."""
    if write or self._print_is_due():
      self._pending = (step, step_metrics, write)

  def flush(self) -> None:
    """Fetches, writes, prints and checks the numbers that wait.

    Raises:
      Stopped: Too many updates were skipped.
    """
    if self._pending is None:
      return
    step, step_metrics, write = self._pending
    self._pending = None
    values = metrics.to_floats(step_metrics)
    skips = values.pop("skips")
    if write:
      line = {"epoch": self._experiment.epoch(step)}
      line |= {**metrics.flat(values), "skipped": skips.total}
      if len(self._experiment.resolutions) > 1:
        line["view_size"] = self._experiment.view_size(step)
      self._writer.write(step, line)
      self._warn(step)
      self._skip_limit.check(skips, finite.checked_names(values))
    if self._print_is_due() or step == self._experiment.last_step:
      self._print(step, values)

  def judge(self, step: int) -> Judgment:
    """Writes and prints the verdict on the run so far, and its scores.

    Every process must call it; the numbers of process 0 decide.
    """
    history = self._writer.history
    found = verdict.judge(history)
    judgment = Judgment(found.state if found else "", verdict.scores(history))
    agreed = agreement.exchange(json.dumps(judgment))[0]
    judgment = Judgment(*json.loads(agreed))
    if found is not None:
      words = {"verdict": found.name, "why": found.why}
      if found.advice:
        words["advice"] = found.advice
      self._writer.write(step, {}, words=words)
      scores = {f"verdict/{k}": v for k, v in judgment.scores.items()}
      self._writer.write(step, scores, timing=True)
      say(f"step {step}  {found}", "red" if found.is_bad else "green")
    return judgment

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Takes the time of the block out of the next throughput."""
    start = time.monotonic()
    yield
    if self._last_time is not None:
      self._last_time += time.monotonic() - start

  def _print_is_due(self) -> bool:
    if self._last_time is None:
      return True
    return time.monotonic() - self._last_time >= self._every_seconds

  def _print(self, step: int, values: Mapping[str, Any]) -> None:
    """Prints the line; writes the throughput since the last one.

    The first line has no throughput: the time before it was compilation.
    """
    now, timing = time.monotonic(), {}
    if self._last_time is not None and step > self._last_step:
      steps_per_second, seconds_left = console.pace(
        step - self._last_step,
        now - self._last_time,
        self._experiment.last_step - step,
      )
      batch_size = self._experiment.config.batch_size
      timing = {
        "images_per_second": steps_per_second * batch_size,
        "seconds_left": seconds_left,
      }
    self._last_time, self._last_step = now, step
    line, brief = self._format(step, values, timing)
    console.print_progress(line, step / self._experiment.last_step, brief)
    if timing:
      self._writer.write(step, timing, timing=True)

  def _format(
    self, step: int, values: Mapping[str, Any], timing: Mapping[str, float]
  ) -> tuple[str, str]:
    """Returns the line for the log, and the one for a terminal."""
    terms = " ".join(f"{k} {v:.4f}" for k, v in values["terms"].items())
    parts = [
      f"step {step}/{self._experiment.last_step}",
      f"epoch {self._experiment.epoch(step):.2f}",
      f"loss {values['loss']:.4f} ({terms})",
      f"lr {values['learning_rate']:.4g}",
    ]
    if timing:
      parts.append(f"{timing['images_per_second']:,.0f} images/s")
      parts.append(f"left {console.duration(timing['seconds_left'])}")
    brief = [parts[0], f"loss {values['loss']:.4f}", *parts[4:]]
    return "  ".join(parts), "  ".join(brief)

  def _warn(self, step: int) -> None:
    """Says that the run collapses or diverges, once when it begins to."""
    found = verdict.judge(self._writer.history)
    bad = found.name if found is not None and found.is_bad else ""
    if found is not None and bad not in ("", self._warned):
      verb = "has" if found.state == verdict.DIVERGED else "is"
      say(f"WARNING at step {step}: The run {verb} {found}", "red")
    self._warned = bad
    if not self._stop_when_diverged:
      return
    state = agreement.exchange(found.state if found is not None else "")[0]
    if state == verdict.DIVERGED:
      finite.stop(
        f"The run has diverged at step {step}; stop.when_diverged is True."
      )
