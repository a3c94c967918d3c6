"""Files of a run and of commands, on this machine or in a bucket.

An object in a bucket is written whole or not at all, and cannot be appended to.
"""

import contextlib
import errno
import importlib.util
import os
from collections.abc import Iterator

from etils import epath

from imsvd_jax.base.errors import UserError

# Errors of this machine's file systems that the user can fix.
_DISK_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EFBIG,
  errno.EROFS,
  errno.EACCES,
  errno.EPERM,
  errno.ENOENT,
  errno.ENOTDIR,
  errno.EISDIR,
  errno.EEXIST,
  errno.ENAMETOOLONG,
  errno.ELOOP,
  errno.EIO,
  errno.ESTALE,
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
# Errors of a network or a busy service, as TensorFlow, TensorStore, Google's
# libraries and Python write them, in the error's name or in its text.
_PASSING = (
  "DEADLINE_EXCEEDED",
  "UNAVAILABLE",
  "ConnectionError",
  "DeadlineExceeded",
  "ServiceUnavailable",
  "Timeout",
  "TooManyRequests",
  "UnavailableError",
)


def is_remote(path: str | os.PathLike) -> bool:
  """True of gs://BUCKET/DIR and the like."""
  return "://" in os.fspath(path)


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


def make(path: str) -> str:
  """Creates a run's directory; returns its absolute path.

  Raises:
    UserError: It cannot be created.
  """
  directory = absolute(path)
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
  while error is not None:
    if isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
      return os.strerror(error.errno)
    for number in _DISK_ERRNOS:
      # TensorStore and TensorFlow put the system's message into their own.
      if os.strerror(number) in str(error):
        return os.strerror(number)
    error = error.__cause__ or error.__context__
  return None


def _lasting_reason(error: BaseException | None) -> str | None:
  """Returns why a bucket will refuse another try; None if it may not."""
  while error is not None:
    if type(error).__name__ in _LASTING:
      return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    error = error.__cause__ or error.__context__
  return None


def is_passing(error: BaseException | None, path: str | os.PathLike) -> bool:
  """Returns whether a read failed because of the network, not the content.

  Args:
    error: What reading raised; its causes count.
    path: What was read. A local path never fails because of the network.
  """
  while error is not None and is_remote(path):
    text = f"{type(error).__name__}: {error}"
    if any(word in text for word in _PASSING):
      return True
    error = error.__cause__ or error.__context__
  return False


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
  """Yields a temporary name to write to; renames it if the block succeeds."""
  unfinished = f"{os.fspath(path)}.unfinished"
  try:
    yield unfinished
    os.replace(unfinished, path)
  except OSError as error:
    if str(error.filename) not in ("None", unfinished):
      raise  # The error is about another file.
    raise UserError(f"Cannot write {path}: {error.strerror}.") from error
  finally:
    if os.path.exists(unfinished):
      os.remove(unfinished)
