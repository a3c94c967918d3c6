"""Writes named rows of features by the extension of the file."""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import in_place_when_done

# (path, names, columns, names of what was left out) -> None
Writer = Callable[
  [str, Sequence[str], Mapping[str, np.ndarray], Sequence[str]], None
]


def writer_of(path: str, *, dense: bool = False) -> Writer:
  """Returns what writes a file of this extension; .npz if it has none.

  Args:
    path: Of the file.
    dense: Whether rows have more than one axis.

  Raises:
    UserError: The extension is unknown, needs a package that is not there, or
      has no place for such rows.
  """
  extension = os.path.splitext(path)[1].lower()
  if extension and extension not in _WRITERS:
    raise UserError(
      f"--output={path} ends in {extension!r}; expected one of"
      f" {', '.join(_WRITERS)}."
    )
  if dense and extension == ".csv":
    raise UserError(
      f"--output={path} has no place for features per patch; expected .npz,"
      " .npy or .parquet with --dense."
    )
  if extension == ".parquet":
    _pyarrow(path)
  return _WRITERS[extension or ".npz"]


def _npz(
  path: str,
  names: Sequence[str],
  columns: Mapping[str, np.ndarray],
  unreadable: Sequence[str],
) -> None:
  with (
    in_place_when_done(path) as unfinished,
    open(unfinished, "wb") as file,  # Given a name, NumPy would append ".npz".
  ):
    np.savez(
      file,
      allow_pickle=False,
      paths=np.array(names),
      unreadable=np.array(unreadable, np.str_),
      **columns,
    )


def _npy(
  path: str,
  names: Sequence[str],
  columns: Mapping[str, np.ndarray],
  unreadable: Sequence[str],
) -> None:
  """Writes the features; beside them the names, and the other columns."""
  del unreadable
  stem = os.path.splitext(path)[0]
  with (
    in_place_when_done(f"{stem}.txt") as unfinished,
    open(unfinished, "w", encoding="utf-8") as file,
  ):
    file.writelines(f"{name}\n" for name in names)
  for name, column in columns.items():
    own = path if name == "features" else f"{stem}.{name}.npy"
    with (
      in_place_when_done(own) as unfinished,
      open(unfinished, "wb") as binary,
    ):
      np.save(binary, column, allow_pickle=False)


def _csv(
  path: str,
  names: Sequence[str],
  columns: Mapping[str, np.ndarray],
  unreadable: Sequence[str],
) -> None:
  """Writes a column for the names, and one for each number."""
  del unreadable
  rows = [column.reshape(len(names), -1) for column in columns.values()]
  with (
    in_place_when_done(path) as unfinished,
    open(unfinished, "w", encoding="utf-8", newline="") as file,
  ):
    writer = csv.writer(file)
    writer.writerow(["path", *_heads(columns)])
    for i, name in enumerate(names):
      # Shortest texts that are read back as the same numbers.
      writer.writerow([name, *(str(x) for row in rows for x in row[i])])


def _heads(columns: Mapping[str, np.ndarray]) -> Iterator[str]:
  for name, column in columns.items():
    head = name.removesuffix("s")
    if column.ndim == 1:
      yield head
    else:
      yield from (f"{head}_{k}" for k in range(column.shape[1]))


def _parquet(
  path: str,
  names: Sequence[str],
  columns: Mapping[str, np.ndarray],
  unreadable: Sequence[str],
) -> None:
  """Writes a column of names, and one of numbers or lists for each array."""
  del unreadable
  pyarrow = _pyarrow(path)
  from pyarrow import parquet

  arrays = {"path": pyarrow.array(list(names))}
  for name, column in columns.items():
    values = pyarrow.array(column.reshape(-1))
    for size in reversed(column.shape[1:]):
      values = pyarrow.FixedSizeListArray.from_arrays(values, size)
    arrays[name] = values
  with in_place_when_done(path) as unfinished:
    parquet.write_table(pyarrow.table(arrays), unfinished)


def _pyarrow(path: str) -> Any:
  try:
    import pyarrow
  except ImportError as error:
    raise UserError(
      f"--output={path} needs the package pyarrow: pip install pyarrow."
    ) from error
  return pyarrow


_WRITERS: dict[str, Writer] = {
  ".npz": _npz,
  ".npy": _npy,
  ".csv": _csv,
  ".parquet": _parquet,
}
