"""Where a run's files are: a directory of this machine, or one in a bucket.

Objects in a bucket are written whole or not at all. Nothing can be appended to
them, and what has been closed is there to stay.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from etils import epath

from imsvd_jax.base.errors import UserError

# What no other try can mend, by the names of the errors of TensorFlow, Google's
# libraries and Python. Any other may be the network's, and is worth one.
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


# What a network or a busy service is at fault for, as TensorFlow, TensorStore,
# Google's libraries and Python name it, in the error's name or in its text.
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
    UserError: Nothing here reads this kind of path.
  """
  if not is_remote(path):
    return epath.Path(path).expanduser().absolute()
  try:
    return epath.Path(path)
  except KeyError:
    raise UserError(
      f"{os.fspath(path)} is of no known kind; expected a directory, or"
      " gs://BUCKET/DIR."
    ) from None


def make(path: str) -> str:
  """Creates a run's directory; returns its absolute path.

  Raises:
    UserError: It cannot be created.
  """
  directory = absolute(path)
  if os.fspath(directory).startswith("gs://") and not _has_cloud_storage():
    raise UserError(
      f"Checkpoints in {directory} need google-cloud-storage, which Orbax asks"
      " about the bucket: pip install 'imsvd_jax[gcs]'."
    )
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except Exception as error:
    reason = _reason_to_give_up(error, directory)
    if reason is None:
      raise
    raise UserError(
      f"Cannot create the workdir {directory}: {reason}."
      " Choose another with --workdir."
    ) from error
  return os.fspath(directory)


def lasting_reason(error: BaseException | None) -> str | None:
  """Returns why a remote path will refuse another try too; None if it may not.

  Args:
    error: What reading or writing it raised; its causes count.
  """
  while error is not None:
    if type(error).__name__ in _LASTING:
      return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    error = error.__cause__ or error.__context__
  return None


def is_passing(error: BaseException | None, path: str | os.PathLike) -> bool:
  """Whether a remote path may be read again later, its content being whole.

  Args:
    error: What reading it raised; its causes count.
    path: What was read; a local one has no network to blame.
  """
  while error is not None and is_remote(path):
    text = f"{type(error).__name__}: {error}"
    if any(word in text for word in _PASSING):
      return True
    error = error.__cause__ or error.__context__
  return False


def _reason_to_give_up(error: Exception, path: epath.Path) -> str | None:
  if is_remote(path):
    return lasting_reason(error)
  return error.strerror if isinstance(error, OSError) else None


def _has_cloud_storage() -> bool:
  try:
    return importlib.util.find_spec("google.cloud.storage") is not None
  except ModuleNotFoundError:
    return False  # Nor "google.cloud".


def check_output(path: str) -> str:
  """Returns the path, with ~ expanded, if a file can be written there.

  Raises:
    UserError: It cannot; better known before the work than after.
  """
  path = os.path.expanduser(path)
  folder = os.path.dirname(path) or "."
  if not os.path.isdir(folder):
    raise UserError(f"The folder {folder} does not exist; create it.")
  if os.path.isdir(path):
    raise UserError(f"{path} is a folder; give the name of a file.")
  if os.path.exists(path) and not os.path.isfile(path):
    raise UserError(
      f"{path} is no regular file and would be replaced by one; choose another"
      " --output."
    )
  if not os.access(folder, os.W_OK):
    raise UserError(f"May not write into {folder}; choose another --output.")
  return path


def check_directory(path: str | os.PathLike[str]) -> None:
  """Checks that a directory is there, or can be made, to write files into.

  Raises:
    UserError: It cannot; better known before the work than after.
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
  """Gives another name to write to; renames it when the block succeeds."""
  unfinished = f"{os.fspath(path)}.unfinished"
  try:
    yield unfinished
    os.replace(unfinished, path)
  except OSError as error:
    if str(error.filename) not in ("None", unfinished):
      raise  # Of another file.
    raise UserError(f"Cannot write {path}: {error.strerror}.") from error
  finally:
    if os.path.exists(unfinished):
      os.remove(unfinished)
