"""Files of a run and of commands, on this machine or in a bucket.

An object in a bucket is written whole or not at all, and cannot be appended to.
"""

import contextlib
import errno
import importlib.util
import os
import re
import stat
from collections.abc import Iterator

from etils import epath

from imsvd_jax.base.errors import UserError

# Errors about a name, or about what is found under it.
_NAME_ERRNOS = (
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EEXIST,
  errno.EINVAL,
  errno.ENAMETOOLONG,
  errno.ELOOP,
)
# Errors of a machine or its disks, whatever the content of a file.
_MACHINE_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.EIO,
  errno.ESTALE,
  errno.ENOMEM,
  errno.EMFILE,
  errno.ENFILE,
  errno.EAGAIN,
  errno.EBUSY,
  errno.ETIMEDOUT,
  errno.ENOLCK,
  errno.ENODEV,
  errno.ECONNRESET,
  errno.ECONNREFUSED,
  errno.ENETUNREACH,
  errno.EHOSTUNREACH,
)
# Errors of a bucket that another try cannot fix, by the names that TensorFlow,
# Google's libraries and Python give them. Any other may be the network's.
_LASTING = {
  "DefaultCredentialsError",
  "FileNotFoundError",
  "Forbidden",
  "NotFound",
  "NotFoundError",
  "PermissionDeniedError",
  "PermissionError",
  "Unauthorized",
  "UnauthenticatedError",
  "UnimplementedError",
}
# Errors of a network, a busy service, an account or a device, as TensorFlow,
# TensorStore, JAX, Google's libraries and Python write them, in the error's
# name or in its text.
_PASSING = (
  "ABORTED",
  "CANCELLED",
  "DEADLINE_EXCEEDED",
  "PERMISSION_DENIED",
  "RESOURCE_EXHAUSTED",
  "UNAUTHENTICATED",
  "UNAVAILABLE",
  "Cancelled",
  "ConnectionError",
  "DeadlineExceeded",
  "DefaultCredentialsError",
  "Forbidden",
  "JaxRuntimeError",
  "MemoryError",
  "PermissionDenied",
  "PermissionError",
  "ResourceExhausted",
  "ServiceUnavailable",
  "Timeout",
  "TooManyRequests",
  "Unauthenticated",
  "Unauthorized",
  "UnavailableError",
  "can't start new thread",
  "timed out",
)
# Orbax and TFDS take these characters of a path for a pattern.
_PATTERN = "[]?*\\"


class Passing(Exception):
  """Another process met an error that may pass."""


def is_remote(path: str | os.PathLike) -> bool:
  """True of gs://BUCKET/DIR and the like."""
  return "://" in os.fspath(path)


def printable(name: str) -> str:
  """Returns a name of a file as text that any encoding and any line can hold.

  Bytes that are not UTF-8 and control characters, such as new lines, are
  escaped.
  """
  text = os.fsencode(name).decode("utf-8", "backslashreplace")
  return re.sub(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029]",
    lambda match: match[0].encode("unicode_escape").decode(),
    text,
  )


def absolute(path: str | os.PathLike) -> epath.Path:
  """Returns the path with ~ expanded; a remote one as it is.

  Raises:
    UserError: This kind of path is not supported.
  """
  if not is_remote(path):
    return epath.Path(path).expanduser().absolute()
  try:
    return epath.Path(path)
  except KeyError:
    raise UserError(
      f"{os.fspath(path)} is neither a directory nor in a known kind of bucket;"
      " expected a directory, or gs://BUCKET/DIR."
    ) from None


def pattern_in(path: str | os.PathLike) -> str:
  """Returns "[ ]", say, if a library would take a path for a pattern."""
  return " ".join(mark for mark in _PATTERN if mark in os.fspath(path))


def check_workdir(directory: epath.Path) -> None:
  """Raises UserError if Orbax would lose the checkpoints of a run there."""
  if found := pattern_in(directory):
    raise UserError(
      f"The workdir {directory} has {found} in its path; Orbax takes that for a"
      " pattern, and would lose every checkpoint. Use a --workdir without"
      " [ ] ? * and \\; to continue a run, copy it to such a path"
      " (docs/reliability.md says how to rescue its checkpoints)."
    )


def make(path: str) -> str:
  """Creates a run's directory; returns its absolute path.

  Raises:
    UserError: It cannot be created, or checkpoints would be lost in it.
  """
  directory = absolute(path)
  check_workdir(directory)
  if os.fspath(directory).startswith("gs://") and not _has_cloud_storage():
    raise UserError(
      f"Checkpoints in {directory} need the package google-cloud-storage: pip"
      ' install -e ".[gcs]".'
    )
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except Exception as error:
    reason = refusal(error, directory)
    if reason is None:
      raise
    raise UserError(
      f"Cannot create the workdir {directory}: {reason}."
      " Choose another with --workdir."
    ) from error
  return os.fspath(directory)


@contextlib.contextmanager
def writing(what: str, directory: epath.Path) -> Iterator[None]:
  """Turns the refusal of a disk or a bucket into one clear line.

  Args:
    what: What the block writes, for the message.
    directory: The run's directory.

  Raises:
    UserError: The disk is full, read-only or gone.
  """
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = refusal(error, directory)
    if reason is None:
      raise
    raise UserError(
      f"Cannot write {what} in {directory}: {reason}. The checkpoints already"
      " there are intact; make room or repair the directory, and run the same"
      " command again to resume."
    ) from error


def refusal(error: BaseException, path: str | os.PathLike) -> str | None:
  """Returns why a path cannot be written; None if another try may succeed.

  Args:
    error: What writing it raised; its causes count.
    path: A directory of this machine or of a bucket.
  """
  return (_lasting_reason if is_remote(path) else _disk_reason)(error)


def _disk_reason(error: BaseException | None) -> str | None:
  """Returns why a disk refused; None if something else failed."""
  for cause in _causes(error):
    if isinstance(cause, OSError) and cause.errno:
      return os.strerror(cause.errno)
    for number in _MACHINE_ERRNOS + _NAME_ERRNOS:
      # TensorStore and TensorFlow put the system's message into their own.
      if os.strerror(number) in str(cause):
        return os.strerror(number)
  return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _lasting_reason(error: BaseException | None) -> str | None:
  """Returns why a bucket will refuse another try; None if it may not."""
  for cause in _causes(error):
    if type(cause).__name__ in _LASTING:
      return (str(cause).splitlines() or [type(cause).__name__])[0].rstrip(".")
  return None


def is_passing(error: BaseException | None, path: str | os.PathLike) -> bool:
  """Returns whether a read failed for a reason other than the content.

  Such as the network, the disk, memory, a permission: what was read may be
  good.

  Args:
    error: What reading raised; its causes count.
    path: What was read.
  """
  words = [*_PASSING, *map(os.strerror, _MACHINE_ERRNOS)]
  for cause in _causes(error):
    if isinstance(cause, Passing):
      return True
    if isinstance(cause, OSError) and cause.errno:
      if cause.errno not in _NAME_ERRNOS:
        return True
      continue
    # The path itself may hold one of the words.
    text = f"{type(cause).__name__}: {cause}".replace(os.fspath(path), "")
    if any(word in text for word in words):
      return True
  return False


def root_cause(error: BaseException) -> str:
  """Returns the first line of what an error came from."""
  while error.__cause__ is not None:
    error = error.__cause__
  first_line = (str(error).splitlines() or [""])[0][:300]
  if isinstance(error, Passing):
    return first_line
  return f"{type(error).__name__}: {first_line}".rstrip(".: ")


def _has_cloud_storage() -> bool:
  try:
    return importlib.util.find_spec("google.cloud.storage") is not None
  except ModuleNotFoundError:
    return False  # The parent package is missing too.


def check_output(path: str) -> str:
  """Returns the path, with ~ expanded, if a file can be written there.

  Raises:
    UserError: It cannot. Call this before the work, not after it.
  """
  path = os.path.expanduser(path)
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    raise UserError(f"The folder {folder} does not exist; create it.")
  if os.path.isdir(path):
    raise UserError(f"{path} is a folder; give the name of a file.")
  if os.path.exists(path) and not os.path.isfile(path):
    raise UserError(
      f"{path} is not a regular file and would be replaced by one; choose"
      " another --output."
    )
  if not os.access(folder, os.W_OK):
    raise UserError(f"May not write into {folder}; choose another --output.")
  return path


def check_directory(path: str | os.PathLike[str]) -> None:
  """Checks that a directory exists, or can be created, and is writable.

  Raises:
    UserError: It cannot. Call this before the work, not after it.
  """
  existing = os.fspath(path)
  if "://" in existing:
    return
  existing = os.path.abspath(existing)
  while not os.path.exists(existing):
    existing = os.path.dirname(existing)
  if not os.path.isdir(existing):
    raise UserError(f"{existing} is a file; --output names a directory.")
  if not os.access(existing, os.W_OK):
    raise UserError(f"May not write into {existing}; choose another --output.")


@contextlib.contextmanager
def in_place_when_done(path: str | os.PathLike[str]) -> Iterator[str]:
  """Yields a temporary name to write to; renames it if the block succeeds.

  After a crash of the machine, too, there is the old file or the new one,
  whole.
  """
  # Two processes may write to one path at the same time.
  unfinished = f"{os.fspath(path)}.{os.getpid()}.unfinished"
  try:
    yield unfinished
    flush_to_disk(unfinished)
    os.replace(unfinished, path)
    flush_to_disk(os.path.dirname(unfinished) or ".")
  except OSError as error:
    if str(error.filename) not in ("None", unfinished):
      raise  # The error is about another file.
    raise UserError(f"Cannot write {path}: {error.strerror}.") from error
  finally:
    if os.path.exists(unfinished):
      os.remove(unfinished)


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file whole or not at all; it is on disk on return."""
  if is_remote(path):
    epath.Path(path).write_bytes(content)
    return
  with in_place_when_done(path) as unfinished:
    epath.Path(unfinished).write_bytes(content)


def read_if_there(path: str | os.PathLike[str]) -> bytes | None:
  """Returns what a file holds; None only if it does not exist.

  `exists` is also False where a disk does not answer.

  Raises:
    UserError: It is no regular file: reading a pipe could wait for ever.
  """
  file = epath.Path(path)
  if is_remote(path):
    return file.read_bytes() if file.exists() else None
  try:
    if not stat.S_ISREG(os.stat(file).st_mode):
      raise UserError(f"{file} is not a regular file; move it away.")
    return file.read_bytes()
  except FileNotFoundError:
    return None


def flush_to_disk(path: str | os.PathLike[str]) -> None:
  """Waits until a file, or the names in a directory, are on disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    if error.errno != errno.EINVAL:  # Not every directory can be flushed.
      raise
  finally:
    os.close(descriptor)
