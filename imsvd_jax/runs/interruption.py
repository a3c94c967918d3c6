"""How a run ends early: signals, the death of a peer, a deadline."""

import contextlib
import functools
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec, Self, TypeVar

import jax
from jax.experimental import multihost_utils

from imsvd_jax.base import interrupts
from imsvd_jax.base.agreement import LostPeerError
from imsvd_jax.base.errors import (
  EXIT_AT_ONCE,
  EXIT_SAVED,
  PeerError,
  Stopped,
  UserError,
)

# Words of Gloo and of JAX's coordination service when a peer has died.
_PEER_FAILURES = (
  "Gloo",
  "Connection closed by peer",
  "Connection reset by peer",
  "Socket closed",
  "coordination service",
  "CoordinationService",
  "heartbeat",
  "barrier",
)

P = ParamSpec("P")
T = TypeVar("T")


class StopRequest:
  """Listens for SIGTERM and SIGINT while a run can still save itself.

  A context manager. It ignores signals outside of the main thread, where Python
  delivers none. With peers, JAX's preemption service owns SIGTERM and makes all
  processes stop at the same step; a SIGINT is turned into a SIGTERM. On exit,
  SIGTERM ends the process again: the service would swallow it.

  A thread reads the signals, because the main thread may compile for minutes
  and a second SIGINT must end that too. Before the first step there is nothing
  to save: a command ends at the first signal, while in a Python program, which
  goes on, the run ends when the compilation does.

  Attributes:
    has_steps: Whether there is something to save. The loop of a training that
      begins without it sets it.
  """

  def __init__(self, *, has_steps: bool = True) -> None:
    self._has_peers = jax.process_count() > 1
    self._request = threading.Event()
    self._handlers: dict[int, Any] = {}
    self._is_command = False
    self.has_steps = has_steps

  def __enter__(self) -> Self:
    if threading.current_thread() is not threading.main_thread():
      return self
    self._reader, self._writer = socket.socketpair()
    self._writer.setblocking(False)
    self._thread = threading.Thread(target=self._listen, daemon=True)
    self._thread.start()
    self._old_fd = signal.set_wakeup_fd(
      self._writer.fileno(), warn_on_full_buffer=False
    )
    ours = [signal.SIGINT]
    if not self._has_peers:
      ours.append(signal.SIGTERM)
    # Python writes to the wakeup descriptor only where it has a handler.
    self._handlers = {n: signal.signal(n, lambda *_: None) for n in ours}
    before = self._handlers[signal.SIGINT]
    self._is_command = before is interrupts.end_or_raise
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends the listening; what comes then ends the process, as before."""
    if not self._handlers:
      return
    handlers, self._handlers = self._handlers, {}
    for number, handler in handlers.items():
      # None: a handler that was not set from Python and cannot be restored.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if self._has_peers:
      # Nothing polls the service any more; our handler would disable it.
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(self._old_fd)
    self._writer.close()
    self._thread.join()
    self._reader.close()

  @property
  def asked(self) -> bool:
    """Whether a signal has asked to stop; with peers, who must agree, False.

    For long work between steps, which may be left out then.
    """
    return not self._has_peers and self._request.is_set()

  def requested(self, step: int) -> bool:
    """Returns whether to save and exit now; call it once after each step."""
    if self._has_peers:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._request.is_set()

  def _listen(self) -> None:
    count = 0
    while numbers := self._reader.recv(64):
      for number in numbers:
        if number == signal.SIGINT:
          count += 1
        if count > 1:
          _print("SIGINT again: exiting at once, nothing saved.")
          os._exit(EXIT_AT_ONCE)
        if number in self._handlers:
          self._request_stop(signal.Signals(number).name)

  def _request_stop(self, name: str) -> None:
    if not self.has_steps and self._is_command and not self._has_peers:
      code = EXIT_AT_ONCE if name == "SIGINT" else EXIT_SAVED
      _print(
        f"{name} before the first step: nothing to save, exiting with code"
        f" {code}. The same command starts again."
      )
      os._exit(code)
    if not self._request.is_set():
      _print(
        f"{name}: saving after the step under way, then exiting with code"
        f" {EXIT_SAVED} (SIGINT again: at once)."
        if self.has_steps
        else f"{name}: stopping before the next step, as soon as what is being"
        " compiled is done (SIGINT again: at once)."
      )
    self._request.set()
    if self._has_peers:
      os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def sigterm_stops() -> Iterator[None]:
  """Makes SIGTERM end the block at once, with the code of what is saved.

  For work that is saved piece by piece. It does nothing outside of the main
  thread, and with peers, where JAX's service owns SIGTERM.
  """

  def stop(number: int, frame: FrameType | None) -> None:
    del number
    _print(f"SIGTERM: results so far are kept; exiting with code {EXIT_SAVED}.")
    if interrupts.in_import(frame):
      os._exit(EXIT_SAVED)
    raise Stopped(EXIT_SAVED)

  in_main = threading.current_thread() is threading.main_thread()
  if not in_main or jax.process_count() > 1:
    yield
    return
  before = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def ends_with_its_peers(run: Callable[P, T]) -> Callable[P, T]:
  """Decorates a run: with peers, an error ends this process at once.

  The interpreter's own exit would wait for a dead peer, and live peers would
  wait for this process in a collective.
  """

  @functools.wraps(run)
  def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
    try:
      return run(*args, **kwargs)
    except UserError:
      raise  # The command line prints it and exits as quickly.
    except Exception as error:
      if jax.process_count() == 1:
        raise
      reason = _peer_failure(error)
      if reason is None:
        traceback.print_exc()
        reason = "the error above"
      _print(
        f"error: process {jax.process_index()} of {jax.process_count()} cannot"
        f" continue ({reason}). Exiting with code {PeerError.exit_code}; start"
        " all processes again to resume."
      )
      sys.stdout.flush()
      os._exit(PeerError.exit_code)

  return wrapped


@contextlib.contextmanager
def deadline(minutes: float, message: str) -> Iterator[None]:
  """Ends this process with a message if the block takes longer.

  At once, with code 4: a thread that hangs in a system call or in a collective
  cannot be stopped, and the interpreter's exit would wait for it.
  """

  def give_up() -> None:
    _print(f"error: {message}")
    sys.stdout.flush()
    os._exit(PeerError.exit_code)

  timer = threading.Timer(60 * minutes, give_up)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _peer_failure(error: BaseException | None) -> str | None:
  """Returns what a collective says of a lost peer; None for other errors."""
  while error is not None:
    text = " ".join(str(error).split())
    lost = isinstance(error, LostPeerError)
    if lost or any(word in text for word in _PEER_FAILURES):
      return f"lost a peer: {text[:200]}"
    error = error.__cause__ or error.__context__
  return None


def _print(message: str) -> None:
  """Prints a line, also in a signal handler that interrupts a print."""
  line = f"{message}\n".encode(errors="backslashreplace")
  try:
    os.write(sys.stderr.fileno(), line)
  except (OSError, ValueError):  # It is not a file, or closed.
    print(message, file=sys.stderr, flush=True)
