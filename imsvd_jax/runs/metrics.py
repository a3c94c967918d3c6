"""Writes and reads the numbers of a run: metrics.jsonl and TensorBoard.

The only module that imports clu. `metrics.jsonl` holds nothing that depends on
the clock, so a resumed run writes the same lines as one that never stopped.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from clu import metric_writers, parameter_overview
from etils import epath

from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError

METRICS_FILE = "metrics.jsonl"


def parameter_table(params: Mapping) -> str:
  """Returns a table of every parameter's shape, size and spread.

  The table is made of copies. A NumPy view of an array is cached with it and,
  on CPUs, keeps its buffer: the first step could not donate the state.
  """
  copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(params)
  return parameter_overview.get_parameter_overview(copies)


def to_floats(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Fetches scalars from the device; waits for the step that computes them."""
  return jax.tree.map(float, jax.device_get(dict(metrics)))


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns one level: groups such as "terms" are replaced by their scalars."""
  result: dict[str, float] = {}
  for name, value in metrics.items():
    result |= value if isinstance(value, Mapping) else {name: value}
  return result


class MetricWriter:
  """Writes scalars to TensorBoard and metrics.jsonl, from process 0 only."""

  def __init__(self, workdir: str, *, start_step: int) -> None:
    """Opens the files; drops lines after `start_step`, to be written again.

    Args:
      workdir: Existing directory of the run.
      start_step: Step that the run continues from; 0 if from the beginning.

    Raises:
      UserError: The files cannot be written. The methods raise it too.
    """
    self.workdir = workdir
    self._is_main = jax.process_index() == 0
    if not self._is_main:
      return
    directory = epath.Path(workdir)
    self._path = directory / METRICS_FILE
    lines = _Rewritten if files.is_remote(directory) else _Appended
    with self._writing():
      self._lines = lines(self._path, start_step)
      self._tensorboard = metric_writers.AsyncWriter(
        metric_writers.SummaryWriter(os.fspath(directory / "tensorboard"))
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
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")

  def sync(self) -> None:
    """Waits until the lines are on disk, or in the bucket.

    Call it before a checkpoint: after a crash of the machine, all lines before
    the checkpoint must exist.

    Raises:
      UserError: Somebody removed the file.
    """
    if self._is_main:
      # Checked first, because a bucket would create the file again.
      if not self._path.exists():
        raise UserError(
          f"{self._path} is gone: the working directory was removed while the"
          " run was writing to it. Restart with another --workdir."
        )
      with self._writing():
        self._lines.sync()

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._is_main:
      with self._writing():
        try:
          self._tensorboard.close()
        finally:
          self._lines.close()

  def _writing(self) -> contextlib.AbstractContextManager:
    return files.writing("the metrics", self._path.parent)


class _Appended:
  """Lines of a file on this machine, each written at once."""

  def __init__(self, path: epath.Path, start_step: int) -> None:
    if path.exists():
      partial = path.with_suffix(".partial")
      partial.write_text("".join(_lines_to_keep(path, start_step)))
      partial.replace(path)  # Atomic: a kill here loses nothing.
    self.file = path.open("a")

  def write(self, line: str) -> None:
    self.file.write(line)
    self.file.flush()

  def sync(self) -> None:
    os.fsync(self.file.fileno())

  def close(self) -> None:
    self.file.close()


class _Rewritten:
  """Lines of an object in a bucket, written at the next `sync`.

  An object cannot be appended to, so each `sync` writes all of it.
  """

  def __init__(self, path: epath.Path, start_step: int) -> None:
    self._path = path
    self._lines = _lines_to_keep(path, start_step) if path.exists() else []
    self._path.write_text("".join(self._lines))
    self._num_written = len(self._lines)

  def write(self, line: str) -> None:
    self._lines.append(line)

  def sync(self) -> None:
    if self._num_written < len(self._lines):
      self._path.write_text("".join(self._lines))
      self._num_written = len(self._lines)

  def close(self) -> None:
    self.sync()


def write_tensorboard(
  directory: str, step: int, scalars: Mapping[str, float]
) -> None:
  """Writes scalars of one step to event files of their own.

  Args:
    directory: Directory of the files, created if absent.
    step: Step of the scalars.
    scalars: Values by tag; they need not be finite.
  """
  writer = metric_writers.SummaryWriter(directory)
  writer.write_scalars(step, dict(scalars))
  writer.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the lines of a run's metrics.jsonl, oldest first."""
  path = epath.Path(workdir) / METRICS_FILE
  return [line for _, line in _parse(path)] if path.exists() else []


def _parse(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  for text in path.read_text().splitlines():
    try:
      yield text, json.loads(text)
    except json.JSONDecodeError:
      continue  # A line cut short by a kill; the run writes its step again.


def _lines_to_keep(path: epath.Path, step: int) -> list[str]:
  """Returns the lines up to a step, each with its line break."""

  def is_kept(line: Mapping[str, Any]) -> bool:
    # A run from the beginning writes step 0 again, and every run writes the
    # results of the final evaluation again.
    is_final = any(name.startswith("final_") for name in line)
    return step > 0 and line["step"] <= step and not is_final

  return [f"{text}\n" for text, line in _parse(path) if is_kept(line)]
