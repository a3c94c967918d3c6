"""Writes and reads the numbers of a run: metrics.jsonl and TensorBoard.

The only module that imports clu, and late: it imports TensorFlow. Without it
there are no TensorBoard files. `metrics.jsonl` holds nothing that depends on
the clock, so a resumed run writes the same lines as one that never stopped.
"""

import collections
import contextlib
import hashlib
import itertools
import logging
import os
import types
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from imsvd_jax.base import console, devices, files, metric_groups
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import metric_lines

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def parameter_table(params: Mapping) -> str:
  """Returns a table of every parameter's shape, size and spread.

  The table is made of copies. A NumPy view of an array is cached with it and,
  on CPUs, keeps its buffer: the first step could not donate the state. Without
  clu it is one line. With several processes, all must call it.
  """
  try:
    from clu import parameter_overview
  except ImportError:
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return f"Parameters: {count:,} (the package clu shows a table of them)."
  copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(params)
  return parameter_overview.get_parameter_overview(devices.whole(copies))


def to_floats(metrics: Mapping[str, Any]) -> dict[str, Any]:
  """Fetches scalars from the device; waits for the step that computes them."""
  return jax.tree.map(float, jax.device_get(dict(metrics)))


def flat(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns one level: groups such as "terms" are replaced by their scalars."""
  result: dict[str, float] = {}
  for name, value in metrics.items():
    result |= value if isinstance(value, Mapping) else {name: value}
  return result


class Writer(Protocol):
  """Where the numbers of a run also go; only process 0 has one."""

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes numbers, words, pictures [H, W, C] and samples [N] of a step."""

  def sync(self) -> None:
    """Waits until what was written cannot be lost; before a checkpoint."""

  def close(self) -> None:
    """Writes what is left."""


def other_writers(config: ConfigDict, workdir: str) -> list[Writer]:
  """Returns the writers that a config asks for, in process 0."""
  project = config.log.get("wandb_project", "")
  if not project or jax.process_index() > 0:
    return []
  from imsvd_jax.runs import wandb_writer

  return [wandb_writer.WandbWriter(project, workdir, config)]


class MetricWriter:
  """Writes scalars to TensorBoard and metrics.jsonl, from process 0 only.

  Attributes:
    workdir: The run's directory.
    history: The numbers of metrics.jsonl so far, in process 0.
  """

  def __init__(
    self,
    workdir: str,
    *,
    start_step: int,
    marks: Sequence[metric_lines.Mark] = (),
    others: Sequence[Writer] = (),
  ) -> None:
    """Opens the files; drops lines after `start_step`, to be written again.

    A damaged file is reported and kept beside.

    Args:
      workdir: Existing directory of the run.
      start_step: Step that the run continues from; 0 if from the beginning.
      marks: See `metric_lines.keep`.
      others: Further writers, which this one closes.

    Raises:
      UserError: The files cannot be written. The methods raise it too.
    """
    self.workdir = workdir
    self.history: list[dict[str, float]] = []
    self._is_main = jax.process_index() == 0
    if not self._is_main:
      return
    directory = epath.Path(workdir)
    self._path = directory / METRICS_FILE
    lines = _Rewritten if files.is_remote(directory) else _Appended
    with self._writing():
      kept, _ = _kept_lines(self._path, start_step, marks)
      self._lines = lines(self._path, kept)
      self._num_lines = len(kept)
      self.history += filter(None, map(metric_lines.decode, kept))
      self._digest = hashlib.sha256("".join(kept).encode())
    tensorboard = os.fspath(directory / "tensorboard")
    self._others = [_TensorBoard(tensorboard, start_step=start_step), *others]

  def write(
    self,
    step: int,
    scalars: Mapping[str, Any],
    *,
    words: Mapping[str, str] = types.MappingProxyType({}),
    timing: bool = False,
  ) -> None:
    """Writes numbers and words of a step.

    Args:
      step: The step.
      scalars: Numbers by name; with `timing` also pictures and samples.
      words: Texts by name.
      timing: Whether they depend on the clock, or are to be looked at:
        metrics.jsonl does not get them.
    """
    if not self._is_main:
      return
    with self._writing():
      for writer in self._others:
        writer.write(step, {**scalars, **words})
      if not timing:
        line = metric_lines.encode(step, scalars, words)
        self.history.append({"step": step, **scalars})
        self._lines.write(line)
        self._num_lines += 1
        self._digest.update(line.encode())

  def sync(self) -> metric_lines.Mark:
    """Waits until the lines are on disk, or in the bucket.

    Call it before a checkpoint: after a crash of the machine, all lines before
    the checkpoint must exist.

    Returns:
      What the checkpoint has to record, in process 0.

    Raises:
      UserError: Somebody removed or replaced the file.
    """
    if not self._is_main:
      return metric_lines.Mark(0, "")
    with self._writing():
      # Checked first, because a bucket would create the file again.
      if lost := self._lines.lost():
        raise UserError(lost)
      self._lines.sync()
      for writer in self._others:
        writer.sync()
    return metric_lines.Mark(self._num_lines, self._digest.hexdigest())

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._is_main:
      # Each is closed, whatever the others do.
      with self._writing(), contextlib.ExitStack() as stack:
        for writer in (self._lines, *self._others):
          stack.callback(writer.close)

  def _writing(self) -> contextlib.AbstractContextManager:
    return files.writing("the metrics", self._path.parent)


class _TensorBoard:
  """Event files, written by a thread of their own.

  Its first work is to import clu, and with it TensorFlow, which takes seconds:
  not before the first step is done, and the run goes on meanwhile.
  """

  def __init__(self, directory: str, *, start_step: int = -1) -> None:
    self._directory = directory
    self._start_step = start_step
    self._waiting: list[tuple[int, Mapping[str, Any]]] = []
    self._writer: Any = None
    self._thread = futures.ThreadPoolExecutor(1, "tensorboard")
    self._last: futures.Future | None = None

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes later; raises what went wrong before."""
    if self._last is not None and self._last.done():
      self._last.result()
    self._waiting.append((step, values))
    if step > self._start_step:
      self._last = self._thread.submit(self._write, self._last)

  def sync(self) -> None:
    """Does nothing: metrics.jsonl has all that a resumed run needs."""

  def close(self) -> None:
    """Writes what waits; raises what went wrong."""
    try:
      self._thread.submit(self._write, self._last).result()
      self._writer.close()
    finally:
      self._thread.shutdown()

  def _write(self, before: futures.Future | None) -> None:
    if before is not None:
      before.result()  # After an error nothing more is written.
    if self._writer is None:
      self._writer = _summary_writer(self._directory)
    while self._waiting:
      _write_summaries(self._writer, *self._waiting.pop(0))


def _write_summaries(writer: Any, step: int, values: Mapping[str, Any]) -> None:
  """Writes each value as what it is: a text, a picture, bins or a number."""
  kinds: dict[str, dict[str, Any]] = collections.defaultdict(dict)
  for name, value in values.items():
    kinds[_kind(value)][metric_groups.tag(name)] = value
  for kind, found in kinds.items():
    getattr(writer, f"write_{kind}")(step, found)


def _kind(value: Any) -> str:
  if isinstance(value, str):
    return "texts"
  dimensions = np.ndim(value)
  return "images" if dimensions > 1 else ("scalars", "histograms")[dimensions]


def _summary_writer(directory: str) -> Any:
  """Returns clu's writer of event files; without clu, one that does nothing."""
  try:
    from clu import metric_writers
  except ImportError as error:
    console.say(
      f"No TensorBoard files: they need the package clu ({error})."
      f" {METRICS_FILE} has the numbers."
    )
    return _NoWriter()
  return metric_writers.SummaryWriter(directory)


class _NoWriter:
  def write_scalars(self, step: int, values: Mapping[str, Any]) -> None:
    pass

  write_texts = write_images = write_histograms = write_scalars

  def close(self) -> None:
    pass


class _Appended:
  """Lines of a file on this machine, each written at once."""

  def __init__(self, path: epath.Path, kept: Sequence[str]) -> None:
    del kept  # They are there.
    self._path = path
    self.file = open(path, "a+")  # noqa: SIM115
    files.flush_to_disk(path.parent)

  def write(self, line: str) -> None:
    self.file.write(line)
    self.file.flush()

  def lost(self) -> str:
    """Returns what happened if the path is no longer the open file."""
    with contextlib.suppress(FileNotFoundError):
      if os.path.samestat(os.fstat(self.file.fileno()), os.stat(self._path)):
        return ""
    what = "replaced" if self._path.exists() else "removed"
    message = f"{self._path} was {what} while the run was writing to it"
    if not self._path.parent.exists():
      return f"{message}, and its directory too. Restart with a new --workdir."
    self.file.seek(0)
    copy = _copy_beside(self._path, "saved", self.file.read().encode())
    return (
      f"{message}. All its lines are in {copy}. Find out who did it, then put"
      " that file back and start the same command again to resume."
    )

  def sync(self) -> None:
    os.fsync(self.file.fileno())

  def close(self) -> None:
    self.file.close()


class _Rewritten:
  """Lines of an object in a bucket, written at the next `sync`.

  An object cannot be appended to, so each `sync` writes all of it.
  """

  def __init__(self, path: epath.Path, kept: Sequence[str]) -> None:
    self._path = path
    self._lines = list(kept)
    self._path.write_text("".join(self._lines))
    self._num_written = len(self._lines)

  def write(self, line: str) -> None:
    self._lines.append(line)

  def lost(self) -> str:
    if self._path.exists():
      return ""
    return (
      f"{self._path} is gone: the working directory was removed while the run"
      " was writing to it. Restart with another --workdir."
    )

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
  writer = _TensorBoard(directory)
  writer.write(step, scalars)
  writer.close()


def read_metrics(workdir: str | os.PathLike) -> list[dict[str, float]]:
  """Returns the numbers of a run's metrics.jsonl, by line, oldest first.

  Lines of words are left out. Numbers that were not finite are NaN. Lines that
  cannot be read are left out, too, and the log says so.
  """
  path = epath.Path(workdir) / METRICS_FILE
  lines = metric_lines.split(_read(path))
  found = [numbers for line in lines if (numbers := metric_lines.decode(line))]
  if len(found) < len(lines):
    count = len(lines) - len(found)
    logger.warning("%d lines of %s cannot be read; left out.", count, path)
  return [numbers for numbers in found if len(numbers) > 1]


def _read(path: epath.Path) -> bytes:
  return files.read_if_there(path) or b""


def check_finished(
  workdir: str | os.PathLike, step: int, marks: Sequence[metric_lines.Mark]
) -> bool:
  """Reports damage to the lines of a finished run, as at any other start.

  Every process must call it.

  Returns:
    Whether the numbers of the final evaluation are there.
  """
  final: list[str] = []
  if jax.process_index() == 0:
    path = epath.Path(workdir) / METRICS_FILE
    with files.writing("the metrics", path.parent):
      _, final = _kept_lines(path, step, marks, with_final=True)
  return bool(multihost_utils.broadcast_one_to_all(np.bool_(bool(final))))


def _kept_lines(
  path: epath.Path,
  step: int,
  marks: Sequence[metric_lines.Mark],
  *,
  with_final: bool = False,
) -> tuple[list[str], list[str]]:
  """Drops lines after a step from the file; reports and copies damage."""
  content = _read(path)
  kept, final, complaint = metric_lines.keep(
    metric_lines.split(content), step, marks
  )
  if complaint:
    copy = _copy_beside(path, "damaged", content)
    console.print_line(
      f"WARNING: {path} is damaged: {complaint}. The damaged file is {copy}."
    )
  text = "".join(kept + (final if with_final else [])).encode()
  # Also where nothing changes: a run that does not know yet that it has lost
  # the directory appends to the old file.
  if text != content or not with_final:
    files.write_whole(path, text)  # A kill here loses nothing.
  return kept, final


def _copy_beside(path: epath.Path, kind: str, content: bytes) -> epath.Path:
  """Writes metrics.jsonl.KIND-1, or another number where that exists."""
  names = (path.parent / f"{path.name}.{kind}-{n}" for n in itertools.count(1))
  copy = next(  # An earlier start may have written the same.
    name for name in names if files.read_if_there(name) in (None, content)
  )
  files.write_whole(copy, content)
  return copy
