"""Training by epochs that can be interrupted: heads, probes and fine-tuning.

At ImageNet's size it takes hours. So a `Keeper` writes where it stands to disk
every few minutes and before it obeys a signal, and the same measurement goes on
from there: after the same batch, with the same bits.
"""

import contextlib
import hashlib
import io
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from etils import epath

from imsvd_jax.base import agreement, console, files
from imsvd_jax.base.errors import EXIT_SAVED, Stopped, UserError
from imsvd_jax.evaluation.features import reason_of

EVERY_SECONDS = 300.0  # Between two writes.
_looks = itertools.count()


class Standing(NamedTuple):
  """Where training stands: after some batches of an epoch."""

  state: Any  # What a step changes: arrays.
  epoch: int = 0  # Finished ones.
  losses: Sequence[Any] = ()  # Of the next epoch's batches so far.
  mean_losses: Sequence[float] = ()  # Of the finished epochs.
  history: Sequence[np.ndarray] = ()  # What `finish` gave after epochs.


class StopRequest(Protocol):
  """Says whether a signal has asked to stop."""

  def requested(self, step: int) -> bool:
    """All processes call it with 0, 1, 2, ... and get the same answer."""


class Keeper:
  """Keeps the standing of one training on disk.

  Process 0 writes; all processes read, and start afresh unless all find the
  same.

  Attributes:
    path: The file.
    stopping: Listens for signals.
  """

  def __init__(
    self,
    directory: epath.Path,
    stopping: Callable[[], contextlib.AbstractContextManager[StopRequest]],
    key: Mapping[str, Any],
  ) -> None:
    """Reads and writes nothing yet.

    Args:
      directory: Where the file goes; created when it is needed.
      stopping: Listens for signals as long as its context lasts.
      key: All that the training is a function of, as JSON.
    """
    self._directory = directory
    self.stopping = stopping
    self._key = json.dumps(key, sort_keys=True)
    digest = hashlib.sha256(self._key.encode()).hexdigest()[:32]
    self.path = directory / f"epochs_{digest}.npz"
    self._parts: list[Keeper] = []
    self._written = time.monotonic()

  def part(self, name: str) -> "Keeper":
    """Returns the keeper of one training among several of a measurement."""
    key = {"key": self._key, "part": name}
    self._parts.append(Keeper(self._directory, self.stopping, key))
    return self._parts[-1]

  def remove(self) -> None:
    """Removes what is on disk; call it when all results are safe."""
    for part in self._parts:
      part.remove()
    if jax.process_index() == 0 and self._directory.exists():
      self.path.unlink(missing_ok=True)
      with contextlib.suppress(OSError, ValueError):  # It has other files.
        self._directory.rmdir()

  def restore(self, start: Standing) -> Standing:
    """Returns where an interrupted training stood, or `start`.

    Raises:
      UserError: The file is there and cannot be read.
    """
    with agreement.together(self.path):
      found = self._read(start)
    mark = [-1, -1] if found is None else [found.epoch, len(found.losses)]
    marks = np.reshape(agreement.of_everyone(np.asarray(mark)), (-1, 2))
    if found is None or (marks != marks[0]).any():
      return start
    console.say(
      f"Goes on after {found.epoch} epochs and {len(found.losses)} batches"
      f" ({self.path})."
    )
    return found

  def look(self, standing: Standing, stop: StopRequest) -> None:
    """Writes now and then; if asked to stop, writes and raises Stopped."""
    if stop.requested(next(_looks)):
      if not self.write(standing):
        raise Stopped(UserError.exit_code)
      console.say(
        f"Stopped by a signal: {self.path} is written. The same command goes on"
        " from there."
      )
      raise Stopped(EXIT_SAVED)
    if time.monotonic() - self._written > EVERY_SECONDS:
      self.write(standing)

  def write(self, standing: Standing) -> bool:
    """Writes where training stands; says so and returns False if it cannot."""
    self._written = time.monotonic()
    if jax.process_index():
      return True
    try:
      self._directory.mkdir(parents=True, exist_ok=True)
      files.write_whole(self.path, _to_bytes(self._key, standing))
    except Exception as error:  # Not worth hours of work.
      console.say(f"Cannot keep what is done so far: {reason_of(error)}")
      return False
    return True

  def _read(self, start: Standing) -> Standing | None:
    try:
      content = files.read_if_there(self.path)
    except OSError as error:  # It may pass, and the file may be good.
      raise UserError(
        f"Cannot read {self.path}: {reason_of(error)}. Repair that, or remove"
        " the file to start again."
      ) from error
    if content is None:
      return None
    try:
      return _from_bytes(content, self._key, start)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
      console.print_line(
        f"{self.path} is damaged ({reason_of(error)}); starting again."
      )
      return None


def _to_bytes(key: str, standing: Standing) -> bytes:
  leaves = jax.tree.leaves(standing.state)
  buffer = io.BytesIO()
  arrays: dict[str, Any] = {
    "key": key,
    "epoch": standing.epoch,
    "losses": np.asarray([np.asarray(loss) for loss in standing.losses]),
    "mean_losses": np.asarray(standing.mean_losses),
    "history": np.asarray(standing.history),
    **{f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(leaves)},
  }
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def _from_bytes(content: bytes, key: str, start: Standing) -> Standing:
  """Returns the standing; raises ValueError or KeyError if it is another's."""
  with np.load(io.BytesIO(content), allow_pickle=False) as stored:
    if str(stored["key"]) != key:
      raise ValueError("another key")

    def leaf(number: int, old: jax.Array) -> jax.Array:
      new = stored[f"leaf{number}"]
      if (new.shape, new.dtype) != (old.shape, old.dtype):
        raise ValueError(f"array {number} is {new.dtype}{list(new.shape)}")
      return jax.device_put(new, old.sharding)

    leaves, structure = jax.tree.flatten(start.state)
    return Standing(
      structure.unflatten([leaf(*pair) for pair in enumerate(leaves)]),
      int(stored["epoch"]),
      tuple(stored["losses"]),
      tuple(stored["mean_losses"].tolist()),
      tuple(stored["history"]),
    )


def train(
  state: Any,
  epochs: int,
  *,
  batches: Callable[[int, int], Iterable[Any]],
  step: Callable[[Any, Any, int], tuple[Any, Any, int]],
  finish: Callable[[Any, int, float], np.ndarray | None],
  meter: console.Progress,
  keeper: Keeper | None = None,
) -> Standing:
  """Trains, or goes on with what the keeper finds; returns the last standing.

  Args:
    state: Where training starts.
    epochs: How many there are in all.
    batches: From an epoch and a number of its batches, to be skipped, to the
      other batches of the epoch.
    step: From (state, batch, epoch) to the new state, the loss and the number
      of images.
    finish: From (state, epoch, mean loss) to what the history keeps of an
      epoch, if anything; raises UserError where training has diverged.
    meter: Counts the images.
    keeper: Keeps the standing on disk.

  Raises:
    Stopped: A signal asked for it; the standing is on disk.
  """
  at = Standing(state)
  if keeper is None:
    return _train(at, epochs, batches, step, finish, meter, lambda at: None)
  with keeper.stopping() as stop:
    at = _train(
      keeper.restore(at),
      *(epochs, batches, step, finish, meter),
      lambda at: keeper.look(at, stop),
    )
  keeper.write(at)
  return at


def _train(
  at: Standing,
  epochs: int,
  batches: Callable[[int, int], Iterable[Any]],
  step: Callable[[Any, Any, int], tuple[Any, Any, int]],
  finish: Callable[[Any, int, float], np.ndarray | None],
  meter: console.Progress,
  look: Callable[[Standing], None],
) -> Standing:
  state, mean_losses, history = at.state, [*at.mean_losses], [*at.history]
  losses = [*at.losses]
  for epoch in range(at.epoch, epochs):
    whole, before = not losses, meter.done
    for batch in batches(epoch, len(losses)):
      state, loss, count = step(state, batch, epoch)
      losses.append(loss)
      meter.add(count)
      look(Standing(state, epoch, losses, mean_losses, history))
    if not losses:
      raise UserError(
        f"Epoch {epoch} has no batch; expected one or more: set a smaller"
        " --set=batch_size."
      )
    if whole:
      seen = meter.done - before
      meter.expect(meter.done + seen * (epochs - epoch - 1))
    with np.errstate(all="ignore"):  # A head of a grid may diverge.
      mean = float(np.mean([np.asarray(loss) for loss in losses]))
    mean_losses.append(mean)
    kept = finish(state, epoch, mean)
    history += [] if kept is None else [kept]
    losses = []
    look(Standing(state, epoch + 1, losses, mean_losses, history))
  return Standing(state, max(epochs, at.epoch), [], mean_losses, history)
