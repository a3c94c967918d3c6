"""Features of images, preprocessed as in evaluation, written to a file.

The images are those of a folder, a pattern, a list or one file, in the order of
their names; of a file of arrays, where they have numbers for names; or of a
split of a data set, in its own order. Every `CHUNK_IMAGES` images the result is
kept beside the output, so that the same command goes on where it was stopped.
Features per patch may need more memory than there is: they are gathered in
files that are mapped into it.
"""

import contextlib
import dataclasses
import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax import data as data_lib
from imsvd_jax.base import hashing
from imsvd_jax.base.console import Progress, print_line
from imsvd_jax.base.errors import UserError, counted, listing
from imsvd_jax.base.files import check_output, in_place_when_done, printable
from imsvd_jax.data import named
from imsvd_jax.data.source import Source
from imsvd_jax.interop import tables_of_features
from imsvd_jax.runs import ownership
from imsvd_jax.runs.encoder import LoadedEncoder, data_to_read, load_encoder

CHUNK_IMAGES = 2048
DENSE_CHUNK_IMAGES = 256  # Of features per patch, which are much larger.

_ARRAYS = ("arrays=", "arrays:")
_LISTS = (".txt", ".lst", ".csv")
_PATTERN = "*?["

_Chunk = dict[str, np.ndarray]
_Outputs = Callable[[np.ndarray], _Chunk]  # Of images.


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """What was asked for, in order.

  Attributes:
    names: Of the images: paths relative to the folder, where they are files.
    columns: "features" float32 [N, F]; perhaps "codes" int32 [N, M] and
      "labels" int32 [N]. Per patch: "features" float16 [N, h, w, F] and, of
      discrete objectives, "codes" [N, h, w, M] in the smallest unsigned type.
    unreadable: Names of the images that are left out.
  """

  names: list[str]
  columns: dict[str, np.ndarray]
  unreadable: list[str]


def write_embeddings(
  output: str, workdir: str, data: str, **options: Any
) -> list[str]:
  """Writes the embeddings of images to a file, by its extension.

  The file is checked before the work begins.

  Args:
    output: .npz, .npy (with the names beside it, in .txt), .csv or .parquet.
    workdir: As of `embed`, and the others, too.
    data: The same.
    **options: The same.

  Returns:
    What was done, line by line.

  Raises:
    UserError: As from `embed`; or the file cannot be written.
  """
  output = check_output(output)
  write = tables_of_features.writer_of(
    output, dense=options.get("dense", False)
  )
  unfinished = f"{output}.parts"
  found = embed(workdir, data, keep_in=unfinished, **options)
  write(output, found.names, found.columns, found.unreadable)
  shutil.rmtree(unfinished, ignore_errors=True)
  count, *grid, width = found.columns["features"].shape
  patches = f" for each of {'x'.join(map(str, grid))} patches" * bool(grid)
  notes = [
    f"Wrote {output}: {counted(count, 'image')}, {width} features each"
    f"{patches}."
  ]
  if found.unreadable:
    shown = ", ".join(found.unreadable[:5])
    shown += " ..." * (len(found.unreadable) > 5)
    notes.append(
      f"Left out {counted(len(found.unreadable), 'unreadable image')}: {shown}"
    )
  return notes


def embed(
  workdir: str,
  data: str = "",
  *,
  split: str = "",
  codes: bool = False,
  dense: bool = False,
  step: int | str | None = None,
  use_target: bool = False,
  batch_size: int = 256,
  trust_workdir: bool = False,
  keep_in: str = "",
) -> Embeddings:
  """Embeds images.

  Args:
    workdir: Directory of a run, or a file of weights.
    data: A folder (or "folder:FOLDER" as other commands name data), a pattern
      such as "photos/*.jpg", a list of paths (.txt), one image, or
      "arrays:FILE"; with a split as `named.name_and_path` has it, the run's
      own data by default.
    split: "train", "eval", or what `data.train_split` may be.
    codes: Whether to return the most probable bin of each variable too.
    dense: Whether to return features per patch, before pooling, and of discrete
      objectives codes per patch; see `LoadedEncoder.feature_maps_and_codes`.
    step: Which checkpoint, or "best"; the newest good one by default.
    use_target: Take the EMA target network's weights.
    batch_size: Images that are embedded together.
    trust_workdir: Whether to read the data that a run names that is not signed.
    keep_in: Folder for what is done so far; none by default. Features per
      patch stay in it, mapped into memory.

  Raises:
    UserError: There is no image, none can be read, or the run has no codes.
  """
  encoder, source, _ = open_images(
    workdir,
    data,
    split=split,
    codes=codes,
    step=step,
    use_target=use_target,
    batch_size=batch_size,
    trust_workdir=trust_workdir,
  )
  return _embedded(
    encoder,
    source,
    _outputs_of(encoder, codes=codes, dense=dense),
    batch_size,
    keep_in,
    DENSE_CHUNK_IMAGES if dense else CHUNK_IMAGES,
  )


def open_images(
  workdir: str,
  data: str,
  *,
  split: str = "",
  codes: bool = False,
  step: int | str | None = None,
  use_target: bool = False,
  batch_size: int = 256,
  trust_workdir: bool = False,
) -> tuple[LoadedEncoder, Source, list[str] | None]:
  """Returns the encoder, the images, and their paths if they are files.

  Args and errors are those of `embed`; `codes` says whether they are needed.
  """
  # Found before the weights are loaded, which takes longer.
  files = None
  if data and (split or data.startswith(_ARRAYS)):
    named.check(data, () if split in ("", "train", "eval") else (split,))
  if not split and not data.startswith(_ARRAYS):
    with data_lib.tensorflow_needed("A folder"):
      files = _listed_files(data)
  sources: list[Source] = []

  def choose(config: ConfigDict) -> None:
    if files is None:
      sources.append(
        _source_of_split(config, workdir, data, split or "train", trust_workdir)
      )

  encoder = load_encoder(
    workdir,
    step,
    use_target=use_target,
    batch_size=batch_size,
    check=choose,
  )
  if codes:
    encoder.check_discrete()  # Before the first image is read.
  if files is not None:
    paths = [os.path.join(files[0], path) for path in files[1]]
    return encoder, _source_of_files(*files, encoder.config.data), paths
  source = sources[-1]
  if not split:
    source = dataclasses.replace(
      source, labels=None, num_classes=0, describe=str, root=""
    )
  return encoder, source, None


# --- Which images -------------------------------------------------------------


def find_images(
  folder: str, extensions: Sequence[str]
) -> tuple[list[str], int]:
  """Returns the paths of images below a folder, and the count of other files.

  Paths are relative to the folder, sorted, with "/". Links to folders are
  followed, once each; names that begin with a dot are skipped, and so are
  folders that systems create. `extensions` are in lower case. A pipe or a
  device is another file, whatever its name: reading it could wait for ever.
  """
  from imsvd_jax.data.sources.folder_listing import NOT_THE_USERS

  paths: list[str] = []
  entered: set[str] = set()
  others = 0
  for top, folders, files in os.walk(folder, followlinks=True):
    real = os.path.realpath(top)
    if real in entered:
      folders.clear()
      continue
    entered.add(real)
    folders[:] = [
      name
      for name in folders
      if not name.startswith(".") and name.lower() not in NOT_THE_USERS
    ]
    visible = [name for name in files if not name.startswith(".")]
    images = [
      name
      for name in visible
      if name.lower().endswith(tuple(extensions))
      and _ends(os.path.join(top, name))
    ]
    others += len(visible) - len(images)
    for name in images:
      path = os.path.relpath(os.path.join(top, name), folder)
      paths.append(path.replace(os.sep, "/"))
  return sorted(paths), others


def _ends(path: str) -> bool:
  """Returns whether reading a path ends, if only with an error."""
  return os.path.isfile(path) or not os.path.exists(path)


def _listed_files(data: str) -> tuple[str, list[str]]:
  """Returns a folder, and paths of images relative to it."""
  from imsvd_jax.data.image_files import EXTENSIONS

  kind = data.partition(":")[0]
  if kind in data_lib.SOURCES and kind != "folder" and not os.path.exists(data):
    raise UserError(
      f"--data={data} is a data set with splits; name one, such as"
      " --split=train."
    )
  path = os.path.expanduser(re.sub(r"\Afolder[:=]", "", data))
  if os.path.isdir(path):
    paths, others = find_images(path, EXTENSIONS)
    if not paths:
      raise UserError(
        f"No images under {printable(path)} ({others} other files); expected"
        f" files that end in {', '.join(EXTENSIONS)}."
      )
    return path, paths
  if os.path.isfile(path) and path.lower().endswith(EXTENSIONS):
    folder, name = os.path.split(path)
    return folder or ".", [name]
  if os.path.isfile(path) and path.lower().endswith(_LISTS):
    return _of_list(path)
  if not os.path.exists(path) and set(_PATTERN) & set(path):
    return _of_pattern(path, EXTENSIONS)
  what = "is a file" if os.path.exists(path) else "does not exist"
  raise UserError(
    f"--data={data}: {printable(path)} {what}; expected a folder of images, a"
    " pattern in quotes such as 'photos/*.jpg', a list of paths"
    f" ({', '.join(_LISTS)}) or an image."
  )


def _of_list(path: str) -> tuple[str, list[str]]:
  """Returns the paths in a file, one a line, relative to the file's folder."""
  folder = os.path.dirname(path) or "."
  with open(path, encoding="utf-8", errors="surrogateescape") as file:
    names = [line.rstrip("\n") for line in file]
  names = [name for name in names if name.strip()]
  absent = [n for n in names if not os.path.isfile(os.path.join(folder, n))]
  if absent or not names:
    shown = listing(list(map(printable, absent)), 3) or "it is empty"
    raise UserError(
      f"{printable(path)}: {len(absent)} of {len(names)} lines are no files"
      f" ({shown}); expected a path a line, relative to {printable(folder)}."
    )
  return folder, names


def _of_pattern(
  pattern: str, extensions: tuple[str, ...]
) -> tuple[str, list[str]]:
  found = [
    path
    for path in sorted(glob.glob(pattern, recursive=True))
    if path.lower().endswith(extensions) and _ends(path)
  ]
  if not found:
    raise UserError(f"No image has a path like {printable(pattern)}.")
  folder = os.path.commonpath(map(os.path.dirname, found)) or "."
  return folder, [os.path.relpath(path, folder) for path in found]


def _source_of_files(
  folder: str, paths: list[str], settings: ConfigDict
) -> Source:
  import tensorflow as tf

  from imsvd_jax.data import image_files
  from imsvd_jax.data import source as source_lib

  unread = image_files.missing_readers(paths)
  for remark in unread:
    print_line(f"{remark}.")
  files = [os.path.join(folder, path) for path in paths]
  table = tf.constant([os.fsencode(path) for path in files])
  return Source(
    name=f"folder:{printable(folder)}",
    root=printable(folder),
    num_examples=len(files),
    fetch=lambda index: tf.io.read_file(table[index]),
    describe=lambda index: printable(files[index]),
    stamp=lambda: repr([*map(_facts, files), *unread]),
    **source_lib.decoding_of(settings) | {"on_bad_image": "replace"},
  )


def _facts(path: str) -> tuple[str, int, int]:
  try:
    found = os.stat(path)
  except OSError:
    return path, -1, -1
  return path, found.st_size, found.st_mtime_ns


def _source_of_split(
  config: ConfigDict, workdir: str, data: str, split: str, trusted: bool
) -> Source:
  if not data:
    ownership.check_data(workdir, config, trusted=trusted)
  settings = data_to_read(config, data)
  if split not in ("train", "eval"):
    settings.eval_split = split
  source = data_lib.make_source(
    settings, "train" if split == "train" else "eval"
  )
  if source is None:
    raise UserError(f"{settings.name} has no split {split!r}.")
  return source


# --- The work -----------------------------------------------------------------


def _outputs_of(
  encoder: LoadedEncoder, *, codes: bool, dense: bool
) -> tuple[str, _Outputs]:
  """Returns what is computed, in words, and its function of images."""
  if not dense and not codes:
    return "False", lambda images: {"features": encoder.features(images)}
  if not dense:
    both = encoder.features_and_codes
    return "True", lambda images: dict(
      zip(("features", "codes"), both(images), strict=True)
    )

  def of_patches(images: np.ndarray) -> dict[str, np.ndarray]:
    if not encoder.discrete:
      return {"features": _half(encoder.feature_maps(images))}
    maps, bins = encoder.feature_maps_and_codes(images)
    return {"features": _half(maps), "codes": bins}

  return "dense", of_patches


def _half(maps: np.ndarray) -> np.ndarray:
  try:
    with np.errstate(over="raise"):
      return maps.astype(np.float16)
  except FloatingPointError as error:
    raise UserError(
      f"A feature of a patch is {np.abs(maps).max():.3g}; expected at most"
      " 65504, the largest number of float16. Normalize the images as in"
      " training, or use features of whole images, without --dense."
    ) from error


def _embedded(
  encoder: LoadedEncoder,
  source: Source,
  outputs: tuple[str, _Outputs],
  batch_size: int,
  keep_in: str,
  chunk_images: int,
) -> Embeddings:
  """Embeds a source chunk by chunk; takes what was kept of the same work."""
  what, compute = outputs
  key = ""
  if keep_in:
    weights = hashing.checksum(encoder.variables)
    key = f"{weights} {source.fingerprint()} {what} {chunk_images}"
  progress = Progress("Embedding", source.num_examples)
  batches_of = lambda some: _batches(
    encoder, some, compute, batch_size, progress
  )
  chunks = _chunks(source, batches_of, keep_in, key, chunk_images, progress)
  columns = _gathered(chunks, keep_in)
  if not columns:
    raise UserError(
      f"None of the {source.num_examples} images of {source.name} can be read."
    )
  readable = columns.pop("index")
  unreadable = np.setdiff1d(np.arange(source.num_examples), readable)
  name_of = lambda index: source.relative_name(int(index))
  order = ("features", "codes", "labels")
  return Embeddings(
    names=list(map(name_of, readable)),
    columns={name: columns[name] for name in order if name in columns},
    unreadable=list(map(name_of, unreadable)),
  )


def _chunks(
  source: Source,
  batches_of: Callable[[Source], Iterator[_Chunk]],
  keep_in: str,
  key: str,
  size: int,
  progress: Progress,
) -> Iterator[_Chunk]:
  """Yields chunks of `size` images with readable ones, kept or computed."""
  from imsvd_jax.data import part

  for first in range(0, source.num_examples, size):
    last = min(first + size, source.num_examples)
    path = os.path.join(keep_in, f"{first}.npz") if keep_in else ""
    chunk = _kept(path, key)
    if chunk is None:
      whole = last - first == source.num_examples
      some = source if whole else part.take(source, np.arange(first, last))
      chunk = _joined(batches_of(some), first)
      _keep(path, key, chunk)
    else:
      progress.add(last - first)
    if len(chunk["index"]):
      yield chunk


def _gathered(chunks: Iterator[_Chunk], folder: str) -> _Chunk:
  """Returns one array for each column; {} without a chunk.

  With a folder the arrays are files in it, mapped into memory.
  """
  if not folder:
    found = list(chunks)
    names = found[0] if found else ()
    return {name: np.concatenate([c[name] for c in found]) for name in names}
  count, chunk = 0, _Chunk()
  with contextlib.ExitStack() as stack:
    files: dict[str, BinaryIO] = {}
    for chunk in chunks:
      count += len(chunk["index"])
      for name, rows in chunk.items():
        if name not in files:
          path = os.path.join(folder, f"{name}.rows")
          files[name] = stack.enter_context(open(path, "wb"))
        files[name].write(np.ascontiguousarray(rows).data)
  return {
    name: np.memmap(
      os.path.join(folder, f"{name}.rows"),
      rows.dtype,
      "r",
      shape=(count, *rows.shape[1:]),
    )
    for name, rows in chunk.items()
  }


def _batches(
  encoder: LoadedEncoder,
  source: Source,
  compute: _Outputs,
  batch_size: int,
  progress: Progress,
) -> Iterator[_Chunk]:
  """Yields "index", "features" and so on of the readable images.

  The images are prepared exactly as for the evaluation of a run.
  """
  from imsvd_jax.data.evaluation_batches import eval_batches

  settings = encoder.config.data
  batches = eval_batches(
    source,
    batch_size=min(batch_size, source.num_examples),
    resize=settings.resize,
    crop=settings.crop,
  )
  for batch in batches:
    mask = batch["mask"]
    if mask.any():
      found = compute(batch["image"][mask]) | {"index": batch["index"][mask]}
      if "label" in batch:
        found["labels"] = batch["label"][mask]
      yield found
    progress.add(int((batch["index"] >= 0).sum()))  # -1 is padding.


def _joined(batches: Iterator[_Chunk], first: int) -> _Chunk:
  """Returns one batch, whose indices count from `first`."""
  rows = list(batches)
  if not rows:
    return {"index": np.zeros(0, np.int64)}
  joined = {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}
  return joined | {"index": joined["index"].astype(np.int64) + first}


def _kept(path: str, key: str) -> _Chunk | None:
  """Returns a chunk that an earlier, stopped command has kept."""
  if not path or not os.path.isfile(path):
    return None
  try:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
      if str(stored["key"]) != key:
        return None
      return {name: stored[name] for name in stored.files if name != "key"}
  except Exception as error:  # A damaged file is computed again.
    print_line(f"{path} is damaged ({error}); computing it again.")
    return None


def _keep(path: str, key: str, chunk: _Chunk) -> None:
  if not path:
    return
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with in_place_when_done(path) as unfinished, open(unfinished, "wb") as file:
    np.savez(file, allow_pickle=False, key=key, **chunk)
