"""One owner of a run's directory: the lock that a training run holds.

On disks of this machine and on NFS the kernel keeps the lock, and releases it
when its owner ends, however that happens. Some file systems have no locks:
there a second start on the same machine is refused as long as the process that
the file names is alive. Otherwise, and in a bucket, the newest start owns the
run, and an older one stops before it writes the next time.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator

import jax

from imsvd_jax.base import agreement, files
from imsvd_jax.base.errors import UserError

LOCK_FILE = "lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
  """The lock of process 0; the run's other processes hold nothing."""

  def __init__(self, workdir: str) -> None:
    self._workdir = files.absolute(workdir)
    self._path = self._workdir / LOCK_FILE
    self._descriptor: int | None = None
    owner = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
      "id": os.urandom(8).hex(),  # Two starts in one second differ.
    }
    self._text = json.dumps(owner)

  def take(self) -> None:
    """Takes the lock.

    Raises:
      UserError: Another run holds it; nothing was changed.
    """
    with files.writing("the lock", self._workdir):
      if files.is_remote(self._path):
        self._path.write_text(self._text)
        return
      self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
      self._lock_descriptor(self._descriptor)
      os.ftruncate(self._descriptor, 0)
      os.pwrite(self._descriptor, self._text.encode(), 0)

  def _lock_descriptor(self, descriptor: int) -> None:
    """Raises UserError if somebody else has the lock."""
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return
    except OSError as error:
      if error.errno not in (*_HELD, *_UNSUPPORTED):
        raise
      is_held = error.errno in _HELD
    text = os.pread(descriptor, 4096, 0).decode(errors="replace")
    if is_held or _is_alive_here(text):
      raise UserError(
        f"{self._workdir} is in use by another run, {_who(text)}. Nothing was"
        " changed. Wait until it has ended, stop it, or use another --workdir."
      )

  def check(self) -> None:
    """Checks that no other run has taken the directory since.

    Raises:
      UserError: One has; this run must not write any more.
    """
    if jax.process_index() > 0:
      return
    with files.writing("the lock", self._workdir):
      content = files.read_if_there(self._path)
      if content is None and self._workdir.exists():  # Somebody removed it.
        self.release()
        self.take()
      elif content not in (None, self._text.encode()):
        owner = _who(content.decode(errors="replace"))
        raise UserError(
          f"Another run, {owner}, has taken over {self._workdir}. This one"
          " stops before it writes anything more. Stop one of the two, or give"
          " each its own --workdir."
        )

  def release(self) -> None:
    """Lets others take the lock; the file stays, empty."""
    if self._descriptor is None:
      return
    with contextlib.suppress(OSError):
      if os.pread(self._descriptor, 4096, 0) == self._text.encode():
        os.ftruncate(self._descriptor, 0)
    os.close(self._descriptor)
    self._descriptor = None


@contextlib.contextmanager
def owned(workdir: str) -> Iterator[Lock]:
  """Holds the lock of a run's directory; every process must call it.

  Args:
    workdir: The directory, which exists.

  Raises:
    UserError: Another run holds it: in all processes, and nothing was changed.
  """
  lock = Lock(workdir)
  try:
    with agreement.together(workdir):
      if jax.process_index() == 0:
        lock.take()
    yield lock
  finally:
    lock.release()


def running(workdir: str | os.PathLike) -> str:
  """Returns "running", "running on HOST?" or "", by the lock's file alone.

  It takes no lock, which a run that starts now could meet. Of another machine
  it cannot be known whether the process still lives.
  """
  content = files.read_if_there(files.absolute(workdir) / LOCK_FILE) or b""
  text = content.decode(errors="replace")
  host = _owner(text).get("host")
  if host in (None, socket.gethostname()):
    return "running" if _is_alive_here(text) else ""
  return f"running on {host}?"


def _owner(text: str) -> dict[str, object]:
  """Returns what a lock file says; {} if it says nothing."""
  try:
    found = json.loads(text)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def _who(text: str) -> str:
  owner = _owner(text)
  return "process {} on {}, started {}".format(
    *(owner.get(name, "unknown") for name in ("pid", "host", "started"))
  )


def _is_alive_here(text: str) -> bool:
  """Returns whether the owner is another, living process of this machine."""
  owner = _owner(text)
  pid = owner.get("pid")
  if owner.get("host") != socket.gethostname():
    return False
  if not isinstance(pid, int) or pid in (0, os.getpid()):
    return False
  try:
    os.kill(pid, 0)
  except PermissionError:
    return True
  except (OSError, OverflowError):
    return False
  return True
