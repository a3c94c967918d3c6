"""Packs a data set into squares: each image is decoded and resized once.

Shards are written one after the other, each whole or not at all: a pack that
was stopped goes on where it was, and has the same bytes in the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from imsvd_jax.base import files
from imsvd_jax.base.console import Progress
from imsvd_jax.base.errors import UserError, counted, listing
from imsvd_jax.base.files import printable
from imsvd_jax.data import crops, decode, execution, faults, pack_files
from imsvd_jax.data import part as part_lib
from imsvd_jax.data.pack_options import PackOptions
from imsvd_jax.data.source import Source

logger = logging.getLogger(__name__)

SHARD_IMAGES = 2048  # Images that a kill costs at most.
_KERNEL = "bicubic"
_PREFETCH = 64  # Images.
_LOCK = "lock"
_UNFINISHED = re.compile(r".+\.\d+\.unfinished")


class _Split(NamedTuple):
  """A split that is packed, and the names of its parts."""

  part: str
  name: str
  source: Source
  labels: np.ndarray | None


def pack(
  folder: str, splits: Mapping[str, Source], options: PackOptions
) -> list[str]:
  """Packs the splits of a data set, or goes on.

  Args:
    folder: The pack; it is made if it is not there.
    splits: "train" and perhaps "eval".
    options: How squares are stored.

  Returns:
    What was done, line by line.

  Raises:
    UserError: The folder holds something else, or the data cannot be packed.
  """
  folder = os.path.expanduser(folder)
  for source in splits.values():
    _check(source, options)
  found = [
    _Split(part, name, source, _labels(source))
    for (name, source), part in zip(
      splits.items(), pack_files.PARTS, strict=False
    )
  ]
  manifest = {
    "format": pack_files.FORMAT,
    "encoding": options.format,
    "quality": options.quality if options.format == "jpeg" else None,
    "size": options.size,
    "channels": found[0].source.channels,
    "shard_images": SHARD_IMAGES,
    "data": {s.name: [s.source.name, s.source.fingerprint()] for s in found},
  }
  with _alone_in(folder):
    _start(folder, manifest)
    notes: list[str] = []
    packed = {s.part: _pack_split(folder, s, options, notes) for s in found}
    path = os.path.join(folder, pack_files.MANIFEST)
    pack_files.write_checked(path, {**manifest, "splits": packed})
  return notes


def _check(source: Source, options: PackOptions) -> None:
  """Raises UserError if the images cannot be stored as the options say."""
  if options.size > pack_files.MAX_SIZE:
    raise UserError(
      f"--size={options.size}; expected 1 to {pack_files.MAX_SIZE}."
    )
  if options.quality > 100:
    raise UserError(f"--quality={options.quality}; expected 1 to 100.")
  if source.value_range is not None:
    raise UserError(
      "A pack holds 8 bits per level, and data.value_range is for numbers of"
      " more; train on such images unpacked."
    )
  if source.channels > pack_files.MAX_CHANNELS:
    raise UserError(
      f"data.channels is {source.channels}; a pack holds up to"
      f" {pack_files.MAX_CHANNELS}."
    )
  if options.format == "jpeg" and source.channels not in (1, 3):
    raise UserError(
      f"JPEG has 1 or 3 channels, and data.channels is {source.channels}; use"
      " --format=raw."
    )
  if source.name.startswith("pack:"):
    raise UserError(
      f"{source.name} is a pack already; pack the images that it was made of."
    )


def _labels(source: Source) -> np.ndarray | None:
  return part_lib.labels_of(source) if source.num_classes else None


# --- The folder ---------------------------------------------------------------


@contextlib.contextmanager
def _alone_in(folder: str) -> Iterator[None]:
  """Makes the folder, and lets no other process write to it.

  Raises:
    UserError: Another one does, or the disk refuses.
  """
  if files.is_remote(folder):
    raise UserError(
      f"--output={printable(folder)}; a pack is read at random places: expected"
      " a folder on a disk of this machine."
    )
  files.check_directory(folder)
  try:
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, _LOCK), "ab") as lock:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise UserError(
          f"Another `imsvd pack` writes to {printable(folder)}; wait for its"
          " end."
        ) from error
      yield
  except OSError as error:
    raise UserError(
      f"Cannot write the pack {printable(folder)}: {error.strerror}. What is in"
      " it stays valid; the same command goes on."
    ) from error


def _start(folder: str, manifest: Mapping[str, Any]) -> None:
  """Notes what is packed, or checks that it is what was begun.

  Raises:
    UserError: The folder holds something else.
  """
  for name in filter(_UNFINISHED.fullmatch, os.listdir(folder)):
    os.remove(os.path.join(folder, name))
  path = os.path.join(folder, pack_files.MANIFEST)
  others = set(os.listdir(folder)) - {_LOCK}
  if not others:
    pack_files.write_checked(path, manifest)
    return
  if pack_files.MANIFEST not in others:
    raise UserError(
      f"{printable(folder)} is no pack and holds {printable(min(others))}; give"
      " --output a new or empty folder."
    )
  _, begun = pack_files.read_checked(path)
  for key, value in manifest.items():
    if begun.get(key) != value:
      raise UserError(
        f"{printable(folder)} is a pack of another kind: its {key} is"
        f" {printable(_brief(begun.get(key)))}, not {printable(_brief(value))};"
        " choose another --output."
      )


def _brief(value: Any) -> str:
  """Returns a value of the manifest as text; of data their names and marks."""
  if not isinstance(value, dict):
    return repr(value)
  return listing([f"{name} ({str(mark)[:8]})" for name, mark in value.values()])


# --- Shards -------------------------------------------------------------------


def _pack_split(
  folder: str, split: _Split, options: PackOptions, notes: list[str]
) -> dict[str, Any]:
  """Writes the shards that are not there; returns what pack.json says."""
  source = split.source
  count = -(-source.num_examples // SHARD_IMAGES)
  paths = [
    os.path.join(folder, pack_files.shard_name(split.part, number))
    for number in range(count)
  ]
  missing = [n for n, path in enumerate(paths) if not _is_whole(path)]
  progress = Progress(f"Packing {split.name}", source.num_examples)
  progress.add((count - len(missing)) * SHARD_IMAGES)
  for first, end in _runs(missing):
    rows = _rows(source, first * SHARD_IMAGES, end * SHARD_IMAGES, options)
    for path in paths[first:end]:
      shard = itertools.islice(rows, SHARD_IMAGES)
      _write_shard(path, shard, split, progress)
  lists = [pack_files.read_checked(f"{path}.json") for path in paths]
  images = sum(len(found["names"]) for _, found in lists)
  bad = [name for _, found in lists for name in found["bad"]]
  small = sum(min(s) < options.size for _, f in lists for s in f["sides"])
  if not images:
    raise UserError(
      f"None of the {source.num_examples} images of {source.name} can be read;"
      f" the first one: {bad[0]}."
    )
  size = sum(os.path.getsize(f"{path}.data") for path in paths)
  notes += _notes(split, images, size, small, bad)
  return {
    "name": split.name,
    "num_classes": source.num_classes,
    "multi_label": source.multi_label,
    "classes": list(source.label_names),
    "why_unlabeled": source.why_unlabeled,
    "shards": [digest for digest, _ in lists],
  }


def _notes(
  split: _Split, images: int, size: int, small: int, bad: Sequence[str]
) -> list[str]:
  """Returns what to say about a split."""
  notes = [f"{split.name}: {images} images, {size / images / 1e3:.1f} kB each."]
  if small:
    notes.append(
      f"{small} of them were enlarged: they have a side that is smaller than"
      " --size."
    )
  if bad:
    notes.append(
      f"Left out {counted(len(bad), 'unreadable image')}: {listing(bad)}"
    )
  return notes


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Yields first and end of the runs in increasing numbers."""
  groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
  for _, group in groups:
    run = [number for _, number in group]
    yield run[0], run[-1] + 1


def _is_whole(path: str) -> bool:
  """Returns whether a shard is there as it was written."""
  try:
    _, found = pack_files.read_checked(f"{path}.json")
    pack_files.check_size(path, found["ends"][-1] if found["ends"] else 0)
    return found["sha256"] == pack_files.file_digest(f"{path}.data")
  except (UserError, OSError, LookupError):
    return False


def _write_shard(
  path: str, rows: Iterator[dict[str, Any]], split: _Split, progress: Progress
) -> None:
  """Writes the data of a shard, then its list, which says that it is whole."""
  columns: dict[str, list[Any]] = {
    key: [] for key in ("names", "ends", "crc32", "sides", "labels", "bad")
  }
  digest, end, labels = hashlib.sha256(), 0, split.labels
  with (
    files.in_place_when_done(f"{path}.data") as unfinished,
    open(unfinished, "wb") as file,
  ):
    for row in rows:
      progress.add(1)
      index = int(row["index"])
      if not row["readable"]:
        columns["bad"].append(_report(split.source, index))
        continue
      content = row["content"]
      if isinstance(content, np.ndarray):
        content = content.tobytes()
      file.write(content)
      digest.update(content)
      end += len(content)
      columns["names"].append(split.source.relative_name(index))
      columns["ends"].append(end)
      columns["crc32"].append(zlib.crc32(content))
      columns["sides"].append(row["sides"].tolist())
      if labels is not None:
        columns["labels"].append(labels[index].tolist())
  content = {**columns, "sha256": digest.hexdigest()}
  pack_files.write_checked(f"{path}.json", content)


def _report(source: Source, index: int) -> str:
  """Names an unreadable image in the log, or stops; returns its name."""
  name = source.describe(index)
  reason = faults.why_bad(source, index)
  if source.on_bad_image == "error":
    raise UserError(
      f"Cannot read image {name}; repair or remove it, or set"
      f" data.on_bad_image='replace'. The reason: {reason}."
    )
  logger.warning("Cannot read image %s (%s); it is left out.", name, reason)
  return f"{source.relative_name(index)} ({reason})"


# --- Images -------------------------------------------------------------------


@tf.autograph.experimental.do_not_convert
def _rows(
  source: Source, first: int, end: int, options: PackOptions
) -> Iterator[dict[str, Any]]:
  """Yields images [first, end) in order, as `_packed` returns them."""
  end = min(end, source.num_examples)
  if source.stream is not None:
    records = source.stream.evaluate(first, end)
  else:
    records = tf.data.Dataset.range(first, end)
    records = records.map(lambda index: {"index": index})
  dataset = records.map(
    lambda record: _packed(source, record, options),
    num_parallel_calls=execution.num_threads(),
  )
  dataset = dataset.prefetch(_PREFETCH)
  dataset = dataset.with_options(execution.pipeline_options())
  yield from dataset.as_numpy_iterator()


def _packed(
  source: Source, record: dict[str, Any], options: PackOptions
) -> dict[str, Any]:
  """Returns an image as it is stored, its sides, and whether it is readable."""
  read, size, channels = source.reader(), options.size, source.channels

  def square(record: dict[str, Any]) -> dict[str, Any]:
    image = read(record)
    if image.dtype == tf.string:
      image = decode.decode_pixels(image, *source.decoding)
    image = tf.ensure_shape(image, (None, None, channels))
    levels = crops.antialiased(image[tf.newaxis], size, _KERNEL)
    content = crops.to_uint8(levels)[0]
    if options.format == "jpeg":
      content = tf.io.encode_jpeg(content, quality=options.quality)
    return {
      "content": content,
      "sides": tf.shape(image)[:2],
      "readable": tf.constant(True),
    }

  nothing = {
    "content": tf.constant("")
    if options.format == "jpeg"
    else tf.zeros([size, size, channels], tf.uint8),
    "sides": tf.zeros([2], tf.int32),
    "readable": tf.constant(False),
  }
  # A dataset within the dataset: only `ignore_errors` catches errors.
  attempt = tf.data.Dataset.from_tensors(record).map(square)
  attempt = attempt.ignore_errors(log_warning=False)
  attempt = attempt.concatenate(tf.data.Dataset.from_tensors(nothing))
  row = attempt.take(1).get_single_element()
  return row | {"index": record["index"]}
