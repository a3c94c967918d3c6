"""How a run ends early: exit codes, signals, and the death of a peer.

2    the user's to fix: config, data, disk (one line says what)
3    the numbers went wrong: too many non-finite updates
4    in a run of several processes this one or a peer failed, or none came
75   SIGTERM or SIGINT: saved; the same command resumes (EX_TEMPFAIL)
130  a second SIGINT: at once, nothing saved
"""

import functools
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from imsvd_jax.base.errors import PeerError, UserError

EXIT_NOT_FINITE = 3
EXIT_PEERS = PeerError.exit_code
EXIT_SAVED = 75
EXIT_AT_ONCE = 130


class Stopped(SystemExit):
  """The run ended early and in order; `code` says why."""


class StopRequest:
  """Listens for SIGTERM and SIGINT while a run can still save itself.

  A context manager. Outside the main thread, where Python takes no signals,
  it hears nothing. With peers, JAX's preemption service owns SIGTERM and makes
  all processes stop at the same step; a SIGINT is turned into one. Afterwards
  SIGTERM ends the process, as it does any: the service would swallow it.

  Signals are read by a thread: the main one may sit in a compilation for
  minutes, and a second SIGINT must end that too.
  """

  def __init__(self):
    self._has_peers = jax.process_count() > 1
    self._request = threading.Event()
    self._handlers = {}

  def __enter__(self):
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
    return self

  def __exit__(self, *exception):
    if not self._handlers:
      return
    for number, handler in self._handlers.items():
      # None: a handler that was not set from Python and cannot be set again.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if self._has_peers:
      # Nobody asks the service any more; a handler of ours disables it.
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.set_wakeup_fd(self._old_fd)
    self._writer.close()
    self._thread.join()
    self._reader.close()

  def requested(self, step: int) -> bool:
    """Whether to save and exit now; call it once after each step."""
    if self._has_peers:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._request.is_set()

  def _listen(self) -> None:
    interrupts = 0
    while numbers := self._reader.recv(64):
      for number in numbers:
        if number == signal.SIGINT:
          interrupts += 1
        if interrupts > 1:
          _print("SIGINT again: exiting at once, nothing saved.")
          os._exit(EXIT_AT_ONCE)
        if number in self._handlers:
          self._request_stop(signal.Signals(number).name)

  def _request_stop(self, name: str) -> None:
    if not self._request.is_set():
      _print(
        f"{name}: saving after this step, then exiting with code {EXIT_SAVED}"
        " (SIGINT again: at once)."
      )
    self._request.set()
    if self._has_peers:
      os.kill(os.getpid(), signal.SIGTERM)


def ends_with_its_peers(function: Callable) -> Callable:
  """Decorates a run: with peers, an error ends this process at once.

  The interpreter's own exit would wait for a peer that is dead, and peers that
  live would wait for this process in a collective.
  """

  @functools.wraps(function)
  def wrapped(*args, **kwargs):
    try:
      return function(*args, **kwargs)
    except UserError:
      raise  # One line, and an exit as quick: see cli.py.
    except Exception:
      if jax.process_count() == 1:
        raise
      traceback.print_exc()
      _print(
        f"error: process {jax.process_index()} of {jax.process_count()} cannot"
        " go on (a peer died, or the error above). Exiting with code"
        f" {EXIT_PEERS}; start all processes again to resume."
      )
      sys.stdout.flush()
      os._exit(EXIT_PEERS)

  return wrapped


def _print(message: str) -> None:
  print(message, file=sys.stderr, flush=True)
