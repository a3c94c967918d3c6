"""How SIGINT ends a command: one line and exit code 130, never a traceback."""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from imsvd_jax.base.errors import EXIT_AT_ONCE

if TYPE_CHECKING:  # Types of Python's hooks.
  from sys import UnraisableHookArgs

_AGAIN_SECONDS = 0.05
# The main thread may take so long to hear of a SIGINT.
_PATIENCE_SECONDS = 1.0
_heard = threading.Event()


def end_at_once(number: int = 0, frame: FrameType | None = None) -> NoReturn:
  """Ends the process; a handler of SIGINT."""
  del number, frame
  with contextlib.suppress(OSError, ValueError, AttributeError):
    # Not descriptor 2, which a filter may read that prints it later.
    os.write(sys.stderr.fileno(), b"Interrupted.\n")
  os._exit(EXIT_AT_ONCE)


def listen() -> None:
  """Makes SIGINT end the process while a command imports what it needs.

  Call it before those imports, which take seconds. It does nothing where SIGINT
  is ignored, as in background jobs of a shell.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)


def raise_outside_imports() -> None:
  """Lets a command that `listen` protects clean up after SIGINT.

  Where the main thread is in C++, it hears nothing: XLA compiles for minutes.
  There the process ends at once, which is as safe as any kill.
  """
  if signal.getsignal(signal.SIGINT) is end_at_once:
    signal.signal(signal.SIGINT, end_or_raise)
    sys.unraisablehook = _interrupt_again
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reader, writer), daemon=True)
    watch.start()


def end_or_raise(number: int, frame: FrameType | None) -> NoReturn:
  """Raises KeyboardInterrupt; a handler of SIGINT."""
  del number
  _heard.set()
  if in_import(frame):
    end_at_once()
  raise KeyboardInterrupt


def _watch(reader: socket.socket, writer: socket.socket) -> None:
  """Ends the process if the handler of a SIGINT does not run soon."""
  del writer  # It stays open as long as this thread has it.
  while numbers := reader.recv(64):
    if signal.SIGINT in numbers:
      if not _heard.wait(_PATIENCE_SECONDS):
        end_at_once()
      _heard.clear()


def in_import(frame: FrameType | None) -> bool:
  """Returns whether a module is being imported.

  There an exception may pass through C++, which aborts the process or reports
  something else.
  """
  while frame is not None:
    if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
      return True
    frame = frame.f_back
  return False


def _interrupt_again(unraisable: "UnraisableHookArgs") -> None:
  """Raises an interrupt again that Python could not raise where it came.

  Python prints and forgets what is raised in a callback of its garbage
  collector, of which JAX has one, or in a destructor.
  """
  if unraisable.exc_type is not KeyboardInterrupt:
    sys.__unraisablehook__(unraisable)
    return
  main = threading.main_thread().ident or 0
  # A signal: it ends a wait of the main thread, too.
  again = threading.Timer(
    _AGAIN_SECONDS, signal.pthread_kill, (main, signal.SIGINT)
  )
  again.daemon = True
  again.start()
