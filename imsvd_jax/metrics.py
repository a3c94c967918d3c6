"""Where numbers go: console, metrics.jsonl and TensorBoard.

The only importer of clu. `metrics.jsonl` holds nothing that depends on the
clock, so that a resumed run writes the very lines of one that never stopped.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from clu import metric_writers, parameter_overview

from imsvd_jax.errors import UserError

METRICS_FILE = "metrics.jsonl"


def say(message: str) -> None:
  """Prints one line to the console, from process 0 only."""
  if jax.process_index() == 0:
    print(message, file=sys.stderr, flush=True)


def parameter_table(params: Mapping) -> str:
  """Returns a table of every parameter's shape, size and spread."""
  return parameter_overview.get_parameter_overview(params)


def to_floats(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Fetches scalars from the device: waits for the step that makes them."""
  return jax.tree.map(float, jax.device_get(dict(metrics)))


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns one level: what "terms" and "diagnostics" hold stands for them."""
  result = {}
  for name, value in metrics.items():
    result |= value if isinstance(value, Mapping) else {name: value}
  return result


def duration(seconds: float) -> str:
  """Returns "1:02:03" or "2:03"."""
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02d}:{seconds:02d}"
  return f"{minutes}:{seconds:02d}"


class MetricWriter:
  """Writes scalars to TensorBoard and metrics.jsonl, from process 0 only."""

  def __init__(self, workdir: str, *, start_step: int):
    """Opens the files; drops lines past `start_step`, which will come again.

    Args:
      workdir: Existing directory of the run.
      start_step: Step that the run continues from; 0 if from the beginning.

    Raises:
      UserError: The files cannot be written; so do the methods.
    """
    self._is_main = jax.process_index() == 0
    if not self._is_main:
      return
    self._path = pathlib.Path(workdir) / METRICS_FILE
    with self._writing():
      _drop_lines_after(self._path, start_step)
      self._file = self._path.open("a")
      self._tensorboard = metric_writers.AsyncWriter(
        metric_writers.SummaryWriter(os.path.join(workdir, "tensorboard"))
      )

  def write(
    self, step: int, scalars: Mapping[str, float], *, timing: bool = False
  ) -> None:
    """Writes scalars of a step; `timing` ones to TensorBoard alone."""
    if not self._is_main:
      return
    with self._writing():
      self._tensorboard.write_scalars(step, dict(scalars))
      if not timing:
        line = {"step": step, **scalars}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

  def sync(self) -> None:
    """Waits until the lines are on disk.

    A checkpoint must not outlive, in a crash of the machine, the lines before
    it. Nor may a run go on writing to a file that somebody removed.
    """
    if self._is_main:
      with self._writing():
        os.fsync(self._file.fileno())
      if not self._path.exists():
        raise UserError(
          f"{self._path} is gone: the working directory was removed while the"
          " run was writing to it. Restart with another --workdir."
        )

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._is_main:
      with self._writing():
        try:
          self._tensorboard.close()
        finally:
          self._file.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      if not _is_of_the_disk(error):
        raise
      raise UserError(
        f"Cannot write the metrics in {self._path.parent}: {_reason(error)}."
        " The checkpoints are intact; make room or mend the directory, and run"
        " the same command again to resume."
      ) from error


def write_tensorboard(
  directory: str, step: int, scalars: Mapping[str, float]
) -> None:
  """Writes scalars of one step to event files of their own.

  Args:
    directory: Where the files lie; made if absent.
    step: Of the scalars.
    scalars: Finite or not, by tag.
  """
  writer = metric_writers.SummaryWriter(directory)
  writer.write_scalars(step, dict(scalars))
  writer.close()


def _is_of_the_disk(error: BaseException) -> bool:
  # TensorBoard's writer fails later, in a wrapping, with TensorFlow's errors.
  error = _root(error)
  return isinstance(error, OSError) or (
    type(error).__module__.partition(".")[0] == "tensorflow"
  )


def _root(error: BaseException) -> BaseException:
  while error.__cause__ is not None:
    error = error.__cause__
  return error


def _reason(error: BaseException) -> str:
  error = _root(error)
  text = getattr(error, "strerror", None) or str(error) or repr(error)
  return text.splitlines()[0].rstrip(".")


def read_metrics(workdir: str) -> list[dict[str, float]]:
  """Returns the lines of a run's metrics.jsonl, oldest first."""
  path = pathlib.Path(workdir) / METRICS_FILE
  return [line for _, line in _parse(path)] if path.exists() else []


def _parse(path: pathlib.Path):
  for text in path.read_text().splitlines():
    try:
      yield text, json.loads(text)
    except json.JSONDecodeError:
      continue  # A line cut short by a kill; its step will come again.


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return

  def is_kept(line):
    # A run from the beginning writes step 0 again, and any writes the results
    # of the final evaluation again.
    is_final = any(name.startswith("final_") for name in line)
    return step > 0 and line["step"] <= step and not is_final

  kept = [text for text, line in _parse(path) if is_kept(line)]
  partial = path.with_suffix(".partial")
  partial.write_text("".join(f"{text}\n" for text in kept))
  partial.replace(path)  # Atomic: a kill here loses nothing.


class Progress:
  """One console line every few seconds: where the run is and how fast."""

  def __init__(
    self,
    *,
    total_steps: int,
    steps_per_epoch: float,
    batch_size: int,
    start_step: int,
    every_seconds: float,
  ):
    self._total_steps = total_steps
    self._steps_per_epoch = steps_per_epoch
    self._batch_size = batch_size
    self._every_seconds = every_seconds
    self._last_time: float | None = None
    self._last_step = start_step

  def due(self) -> bool:
    """True when the last line is old enough (or there was none)."""
    if self._last_time is None:
      return True
    return time.monotonic() - self._last_time >= self._every_seconds

  def line(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
    """Prints the line; returns the throughput since the last one.

    The first line has no throughput: the time before it was compilation.
    """
    now = time.monotonic()
    timing = {}
    if self._last_time is not None and step > self._last_step:
      seconds = (now - self._last_time) / (step - self._last_step)
      timing = {
        "images_per_second": self._batch_size / seconds,
        "seconds_left": seconds * (self._total_steps - step),
      }
    self._last_time, self._last_step = now, step
    say(self._format(step, metrics, timing))
    return timing

  def pause(self, seconds: float) -> None:
    """Takes `seconds` spent on evaluation out of the next throughput."""
    if self._last_time is not None:
      self._last_time += seconds

  def _format(self, step, metrics, timing) -> str:
    terms = " ".join(f"{k} {v:.4f}" for k, v in metrics["terms"].items())
    parts = [
      f"step {step}/{self._total_steps}",
      f"epoch {step / self._steps_per_epoch:.2f}",
      f"loss {metrics['loss']:.4f} ({terms})",
      f"lr {metrics['learning_rate']:.4g}",
    ]
    if timing:
      parts.append(f"{timing['images_per_second']:,.0f} images/s")
      parts.append(f"left {duration(timing['seconds_left'])}")
    return "  ".join(parts)
