"""The rows of an index on disk: features, codes and names, mapped into memory.

Each column is a file of fixed-size rows that only grows; `index.json` says how
many rows count. A build that is killed leaves bytes behind the last row, and
the next one cuts them off: no row is lost, and none is there twice. All files
are plain numbers and JSON: reading an index of a stranger runs no code, and
every size is checked before it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence

import numpy as np

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import is_remote, printable, write_whole
from imsvd_jax.formats import untrusted

MANIFEST = "index.json"
FORMAT = 1
DIGEST = 16  # Bytes of a hash.
_MAX_MANIFEST = 1 << 20
_UNFINISHED = re.compile(r"(index\.json|clusters\.npz)\.\d+\.unfinished")
# Names and thumbnails have any length: a column holds where each one ends.
_TEXTS = ("names", "thumbnails")
# Larger numbers are lies of a damaged or hostile file.
_LIMITS = {
  "format": (FORMAT, FORMAT),
  "count": (0, 1 << 40),
  "replaced": (0, 1 << 40),
  "num_features": (1, 1 << 16),
  "num_variables": (0, 1 << 14),
  "num_bins": (0, 1 << 16),
  "names": (0, 1 << 50),
  "thumbnails": (0, 1 << 50),
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """What the rows of an index are.

  Attributes:
    num_features: F.
    num_variables: M; 0 without codes.
    num_bins: b, of each variable.
    encoder: Checksum of the weights that made the features.
  """

  num_features: int
  num_variables: int
  num_bins: int
  encoder: str

  def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Returns the type and the shape of a row of each column."""
    code = np.dtype(np.uint8 if self.num_bins <= 256 else np.uint16)
    found = {
      "vectors": (np.dtype(np.float16), (self.num_features,)),
      "codes": (code, (self.num_variables,)),
    }
    digest = (np.dtype(np.uint8), (DIGEST,))
    found |= {name: digest for name in ("contents", "keys", "stamps")}
    return found | {f"{n}_end": (np.dtype(np.int64), ()) for n in _TEXTS}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows to append; see `Store` for the columns of the same name."""

  vectors: np.ndarray
  codes: np.ndarray
  contents: np.ndarray
  keys: np.ndarray
  stamps: np.ndarray
  names: Sequence[bytes]
  thumbnails: Sequence[bytes]
  replaced: int = 0


class Store:
  """An index, read.

  Attributes:
    layout: What the rows are.
    count: Number of rows, N.
    rows: int64, ascending: the rows that count. Images that changed have older
      rows, too.
    vectors: float16 [N, F], features of norm 1.
    codes: [N, M], the most probable bin of each variable.
    contents: uint8 [N, 16], hashes of the images' content.
    keys: uint8 [N, 16], hashes of what says which image it is.
    stamps: uint8 [N, 16], hashes that differ for another version of it.
  """

  def __init__(self, folder: str) -> None:
    """Opens an index.

    Raises:
      UserError: There is none, or it is damaged.
    """
    self.folder = folder
    found = read_manifest(folder)
    if found is None:
      raise UserError(
        f"{printable(folder)} is no index; make one with `imsvd search build"
        f" --index={printable(folder)} --workdir=RUN --data=IMAGES`."
      )
    self.layout, self.count = layout_of(found), found["count"]
    columns = {
      name: _mapped(folder, name, dtype, (self.count, *shape))
      for name, (dtype, shape) in self.layout.columns().items()
    }
    self.vectors, self.codes = columns["vectors"], columns["codes"]
    self.contents, self.keys = columns["contents"], columns["keys"]
    self.stamps = columns["stamps"]
    self._texts = {
      name: (columns[f"{name}_end"], _text(folder, name, found[name]))
      for name in _TEXTS
    }
    self._check()
    self.rows = np.arange(self.count)
    if found["replaced"]:
      self.rows = np.sort(list(newest(self.keys).values()))

  def name(self, row: int) -> str:
    """Returns the name of an image as one line of text."""
    return printable(os.fsdecode(self._item("names", row)))

  def thumbnail(self, row: int) -> bytes:
    """Returns a small JPEG of an image, as the index holds it."""
    return self._item("thumbnails", row)

  def find(self, name: str) -> int | None:
    """Returns the row of the image of this name, if there is one."""
    wanted = os.fsencode(printable(name))  # Names are stored like that.
    lengths = np.diff(self._texts["names"][0], prepend=0)
    for row in self.rows[lengths[self.rows] == len(wanted)]:
      if self._item("names", row) == wanted:
        return int(row)
    return None

  def check_codes(self) -> None:
    """Raises UserError if the images have no codes."""
    if not self.layout.num_variables:
      raise UserError(
        f"{printable(self.folder)} holds features without codes, of an"
        " objective that has none; build an index with a run of imsvd or music."
      )

  def _item(self, name: str, row: int) -> bytes:
    ends, content = self._texts[name]
    first = int(ends[row - 1]) if row else 0
    return bytes(content[first : int(ends[row])])

  def _check(self) -> None:
    """Raises UserError if what the columns say is impossible."""
    wrong = ""
    for name, (ends, content) in self._texts.items():
      steps = np.diff(ends, prepend=0)
      if self.count and (steps.min() < 0 or ends[-1] != len(content)):
        wrong = f"{name} do not end where they should"
    if self.codes.size and self.codes.max() >= self.layout.num_bins:
      wrong = f"a code is {self.codes.max()} of {self.layout.num_bins} bins"
    if wrong:
      raise damaged(self.folder, wrong)


def newest(keys: np.ndarray) -> dict[bytes, int]:
  """Returns the last row of each key."""
  return {bytes(key): row for row, key in enumerate(keys)}


def damaged(folder: str, reason: str) -> UserError:
  """Returns the error for an index that cannot be read."""
  return UserError(
    f"The index {printable(folder)} is damaged: {reason}. Delete the folder and"
    " build it again."
  )


def read_manifest(folder: str) -> dict | None:
  """Returns what index.json says; None if there is no such file.

  Raises:
    UserError: It is damaged.
  """
  path = os.path.join(folder, MANIFEST)
  if not os.path.exists(path):
    return None
  _check_regular(folder, MANIFEST)
  with open(path, "rb") as file:
    text = file.read(_MAX_MANIFEST + 1)
  try:
    found = untrusted.parse_json(text.decode())
  except ValueError as error:
    raise damaged(folder, f"{MANIFEST} is no JSON") from error
  if not isinstance(found, dict) or not isinstance(found.get("encoder"), str):
    raise damaged(folder, f"{MANIFEST} does not describe one")
  for key, (low, high) in _LIMITS.items():
    value = found.get(key)
    if type(value) is not int or not low <= value <= high:
      raise damaged(folder, f"{key} is {value!r} in {MANIFEST}")
  return found


def layout_of(manifest: dict) -> Layout:
  """Returns the layout in a manifest."""
  names = [field.name for field in dataclasses.fields(Layout)]
  return Layout(**{name: manifest[name] for name in names})


def _check_regular(folder: str, name: str) -> int:
  """Returns the size of a regular file: reading a pipe could wait for ever."""
  try:
    found = os.stat(os.path.join(folder, name))
  except OSError as error:
    raise damaged(folder, f"{name}: {error.strerror}") from error
  if not stat.S_ISREG(found.st_mode):
    raise damaged(folder, f"{name} is no regular file")
  return found.st_size


def _mapped(
  folder: str, name: str, dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
  size = _check_regular(folder, name)
  wanted = int(np.prod(shape, dtype=object)) * dtype.itemsize
  if size < wanted:
    raise damaged(folder, f"{name} has {size} bytes, not {wanted}")
  if not wanted:
    return np.zeros(shape, dtype)
  return np.memmap(os.path.join(folder, name), dtype, "r", shape=shape)


def _text(folder: str, name: str, size: int) -> np.ndarray:
  return _mapped(folder, name, np.dtype(np.uint8), (size,))


class Writer:
  """Appends rows to an index; `open_to_append` makes one."""

  def __init__(self, folder: str, layout: Layout) -> None:
    self._folder, self._layout = folder, layout
    found = read_manifest(folder)
    self._manifest = found or {
      "format": FORMAT,
      "count": 0,
      "replaced": 0,
      **dataclasses.asdict(layout),
      **dict.fromkeys(_TEXTS, 0),
    }
    if layout_of(self._manifest) != layout:
      raise UserError(
        f"{printable(folder)} was built with other weights"
        f" ({self._manifest['encoder'][:12]}, not {layout.encoder[:12]}); use"
        " another --index, or the --workdir and --step of the first build."
      )
    for name, size in self._sizes().items():
      path = os.path.join(folder, name)
      if found is not None and _check_regular(folder, name) < size:
        raise damaged(folder, f"{name} is shorter than {size} bytes")
      with open(path, "ab") as file:
        file.truncate(size)  # What a killed build left.
    self._write_manifest()

  def _sizes(self) -> dict[str, int]:
    """Returns the bytes of each file that count."""
    rows = {
      name: self._manifest["count"] * dtype.itemsize * int(np.prod(shape))
      for name, (dtype, shape) in self._layout.columns().items()
    }
    return rows | {name: self._manifest[name] for name in _TEXTS}

  def append(self, rows: Rows) -> None:
    """Appends rows; after it returns they are on disk."""
    manifest = dict(self._manifest)
    content: dict[str, bytes] = {}
    for name in _TEXTS:
      items = getattr(rows, name)
      ends = manifest[name] + np.cumsum([len(item) for item in items])
      content[name] = b"".join(items)
      content[f"{name}_end"] = ends.astype(np.int64).tobytes()
      manifest[name] += len(content[name])
    for name, (dtype, _) in self._layout.columns().items():
      if name not in content:
        content[name] = getattr(rows, name).astype(dtype).tobytes()
    for name, data in content.items():
      with open(os.path.join(self._folder, name), "ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    manifest["count"] += len(rows.names)
    manifest["replaced"] += rows.replaced
    self._manifest = manifest
    self._write_manifest()

  def _write_manifest(self) -> None:
    text = json.dumps(self._manifest, indent=1)
    write_whole(os.path.join(self._folder, MANIFEST), text.encode())


@contextlib.contextmanager
def open_to_append(folder: str, layout: Layout) -> Iterator[Writer]:
  """Yields a writer that no other process has at the same time.

  Raises:
    UserError: Another build is at work, the index is damaged or was made by
      other weights, or the disk refuses.
  """
  if is_remote(folder):
    raise UserError(
      f"The index {printable(folder)} would be mapped into memory; expected a"
      " folder on a disk of this machine."
    )
  try:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "ab") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise UserError(
          f"Another build writes to {printable(folder)}; wait for its end."
        ) from error
      _clean(folder)
      yield Writer(folder, layout)
  except OSError as error:
    raise UserError(
      f"Cannot write the index {printable(folder)}: {error.strerror}. What is"
      " in it stays valid; the same command continues."
    ) from error


def _clean(folder: str) -> None:
  """Removes unfinished files of killed builds.

  Raises:
    UserError: The folder holds something else than an index.
  """
  for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
    os.remove(os.path.join(folder, name))
  if os.path.exists(os.path.join(folder, MANIFEST)):
    return
  for name in os.listdir(folder):
    path = os.path.join(folder, name)
    # A build that was stopped at once leaves empty files.
    if not os.path.isfile(path) or os.path.getsize(path):
      raise UserError(
        f"{printable(folder)} is no index and holds {printable(name)};"
        " give --index a new or empty folder."
      )
