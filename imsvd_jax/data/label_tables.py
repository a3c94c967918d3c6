"""Labels of a folder's images from a table: `data.labels`.

A CSV or Parquet file of two columns, the file and its label, with or without a
head of names ("file" or "path", "label" or "class"); other columns are ignored
if there is a head. Files are named by their path relative to `data.path`, or to
the split's folder.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError, listing
from imsvd_jax.base.files import printable
from imsvd_jax.data.sources.folder_splits import Part, root_of

# Of the column of files, and of labels.
_HEADS = (
  ("file", "path", "filename", "file_name", "image", "image_path"),
  ("label", "class", "target", "category"),
)


def labels_of(
  settings: ConfigDict, part: Part
) -> tuple[list[str], np.ndarray, str]:
  """Returns names of classes, labels int32 [N] (-1: none) and "".

  Raises:
    UserError: The table cannot be read, or names none of the images.
  """
  table = _read(settings.labels)
  names = sorted(set(table.values()), key=natural)
  number = {name: i for i, name in enumerate(names)}
  inside = os.path.relpath(part.top, root_of(settings.path))
  labels = []
  for file in part.found.files:
    keys = (_key(os.path.join(inside, file)), _key(file))
    label = next((table[key] for key in keys if key in table), None)
    labels.append(-1 if label is None else number[label])
  if max(labels) < 0:
    example = printable(part.found.files[0])
    raise UserError(
      f"data.labels={settings.labels!r} names none of the"
      f" {len(labels)} images under {printable(part.top)!r}; expected paths"
      f" such as {example!r}, found {listing(list(table), 2)}."
    )
  return names, np.array(labels, np.int32), ""


def _key(file: str) -> str:
  return unicodedata.normalize("NFC", os.path.normpath(file))


def natural(name: str) -> tuple[int, float, str]:
  """Returns a key that sorts numbers by value, before other names."""
  try:
    return 0, float(name), name
  except ValueError:
    return 1, 0.0, name


def _read(path: str) -> dict[str, str]:
  """Returns {file: label}."""
  path = os.path.expanduser(path)
  try:
    rows = _parquet(path) if path.endswith(".parquet") else _csv(path)
  except (OSError, ValueError, csv.Error) as error:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    raise UserError(f"Cannot read data.labels={path!r}: {reason}.") from error
  if not rows:
    raise UserError(f"data.labels={path!r} has no rows.")
  head = [str(cell).strip().lower() for cell in rows[0]]
  named = [
    c for names in _HEADS for c, cell in enumerate(head) if cell in names
  ]
  has_head = len(named) == 2
  first, second = named if has_head else (0, 1)
  if not has_head and len(head) != 2:
    raise UserError(
      f"data.labels={path!r} has {len(head)} columns, {', '.join(head)};"
      " expected 'file' and 'label' in its head, or two columns."
    )
  return {
    _key(str(row[first])): str(row[second])
    for row in rows[has_head:]
    if len(row) == len(head)
  }


def _csv(path: str) -> list[list[Any]]:
  with open(path, newline="", encoding="utf-8-sig") as file:
    text = file.read()
  try:
    dialect: Any = csv.Sniffer().sniff(text[:4096], delimiters=",;\t")
  except csv.Error:
    dialect = csv.excel
  return [row for row in csv.reader(text.splitlines(), dialect) if row]


def _parquet(path: str) -> list[list[Any]]:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(
      f"data.labels={path!r} needs the package pyarrow: pip install pyarrow."
    ) from error
  table = parquet.read_table(path)
  columns = table.to_pydict().values()
  return [table.column_names, *map(list, zip(*columns, strict=True))]
