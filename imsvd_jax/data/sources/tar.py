"""Images in .tar files, in WebDataset's layout.

    path/train-000.tar    0001.jpg  0001.cls  0002.jpg  0002.cls ...
    path/train-001.tar    ...
    path/test-000.tar     ...

The files of an example are those whose names are equal up to the first dot: an
image, and perhaps its label as text in .cls, or under "label", "cls" or "class"
in .json. A split is the shards whose names begin with its name, or a pattern
such as "train-0*.tar".

The headers of all shards are read at the start; each image is then read at its
place in its shard. So the order, the split by processes and a start at a late
step are those of single files. The shards may be in a bucket.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import printable
from imsvd_jax.data import (
  execution,  # noqa: F401  # Before TensorFlow starts.
  image_files,
  label_tables,
)
from imsvd_jax.data import source as source_lib

logger = logging.getLogger(__name__)

_LABEL_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 1 << 20


class _Example(NamedTuple):
  """An image, where it is, and its label."""

  name: str
  shard: int
  start: int
  size: int
  label: str | None


def make(settings: ConfigDict, split: str) -> source_lib.Source:
  """Returns the images of the shards of a split.

  Raises:
    UserError: There are no shards, no images in them, or labels of only some.
  """
  source_lib.reject_num_examples(settings)
  shards = _shards(settings, split)
  examples = _examples(shards)
  if not examples:
    raise UserError(
      f"No images in the {len(shards)} shards of {split!r} under"
      f" {printable(settings.path)!r}; expected members that end in"
      f" {', '.join(image_files.EXTENSIONS)}."
    )
  names = _class_names(settings, split, examples)
  number = {name: i for i, name in enumerate(names)}
  labels = [number.get(example.label or "", -1) for example in examples]
  places = [(e.shard, e.start, e.size) for e in examples]
  return source_lib.Source(
    name=f"tar:{printable(settings.path)} {split}",
    num_examples=len(examples),
    num_classes=len(names),
    label_names=tuple(names),
    labels=np.array(labels, np.int32) if names else None,
    fetch=_reader(shards, np.array(places, np.int64)),
    describe=lambda index: printable(
      f"{shards[examples[index].shard]}:{examples[index].name}"
    ),
    root=printable(os.path.expanduser(settings.path)),
    stamp=lambda: _stamp(shards),
    remarks=(f"{len(shards)} shards",),
    **source_lib.decoding_of(settings),
  )


def split_names(settings: ConfigDict) -> list[str]:
  """Returns the first words of the names of the shards."""
  path = os.path.join(os.path.expanduser(settings.path), "*.tar")
  names = map(os.path.basename, sorted(tf.io.gfile.glob(path)))
  words = (re.match(r"[^\W\d_]+", name) for name in names)
  return list(dict.fromkeys(word[0] for word in words if word))


def _shards(settings: ConfigDict, split: str) -> list[str]:
  if not settings.path:
    raise UserError(
      "data.path is empty; source 'tar' expects the directory of .tar files."
    )
  pattern = split if split.endswith(".tar") else f"{split}*.tar"
  path = os.path.join(os.path.expanduser(settings.path), pattern)
  shards = sorted(tf.io.gfile.glob(path))
  if not shards:
    raise UserError(
      f"No shards: found no file {path}; expected .tar files whose names begin"
      f" with the name of the split, {split!r}."
    )
  return shards


@functools.cache  # Train is asked for the classes of test.
def _examples_of(shard: str) -> tuple[tuple[str, int, int, str | None], ...]:
  """Returns (name, start, size, label) of the images of a shard, in order."""
  images: dict[str, tuple[str, int, int]] = {}
  labels: dict[str, str] = {}
  with tf.io.gfile.GFile(shard, "rb") as file:
    for name, start, size in _members(shard, file):
      folder, base = os.path.split(name)
      stem, _, extension = base.partition(".")
      key, extension = f"{folder}/{stem}", f".{extension.lower()}"
      if extension.endswith(image_files.EXTENSIONS):
        images.setdefault(key, (name, start, size))
      elif extension in (".cls", ".json") and size <= _MAX_LABEL_BYTES:
        label = _label(extension, _content(file, start, size))
        if label is not None:
          labels[key] = label
  return tuple((*image, labels.get(key)) for key, image in images.items())


def _members(
  shard: str, file: tf.io.gfile.GFile
) -> Iterator[tuple[str, int, int]]:
  """Yields (name, start, size) of the files of a shard."""
  try:
    with tarfile.open(fileobj=file, mode="r:") as archive:
      for member in archive:
        if member.isreg() and not os.path.basename(member.name).startswith("."):
          yield member.name, member.offset_data, member.size
  except (tarfile.ReadError, tf.errors.OpError) as error:
    logger.warning(
      "%s is damaged, or compressed (%s); the images before that are used.",
      printable(shard),
      error,
    )


def _content(file: tf.io.gfile.GFile, start: int, size: int) -> bytes:
  """Reads a member, and returns to where the file was; b"" if it is cut."""
  position = file.tell()
  try:
    file.seek(start)
    return file.read(size)
  except tf.errors.OutOfRangeError:
    return b""
  finally:
    file.seek(position)


def _label(extension: str, content: bytes) -> str | None:
  text = content.decode("utf-8", "backslashreplace").strip()
  if extension == ".cls":
    return text or None
  try:
    found = json.loads(text)
  except ValueError:
    return None
  if not isinstance(found, dict):
    return None
  return next((str(found[k]) for k in _LABEL_KEYS if k in found), None)


def _examples(shards: list[str]) -> list[_Example]:
  return [
    _Example(name, number, start, size, label)
    for number, shard in enumerate(shards)
    for name, start, size, label in _examples_of(shard)
  ]


def _class_names(
  settings: ConfigDict, split: str, examples: list[_Example]
) -> list[str]:
  """Returns the classes of train, which number the labels of every split."""
  own = {e.label for e in examples if e.label is not None}
  if not own or split == settings.train_split:
    return sorted(own, key=label_tables.natural)
  train = _examples(_shards(settings, settings.train_split))
  known = {e.label for e in train if e.label is not None}
  if known and own - known:
    raise UserError(
      f"Split {split!r} of {printable(settings.path)!r} has the class"
      f" {min(own - known)!r}, which {settings.train_split!r} does not have."
    )
  return sorted(known or own, key=label_tables.natural)


def _reader(shards: list[str], places: np.ndarray) -> source_lib.Fetch:
  """Returns a function from an index to the contents of the image."""

  def read(index: np.ndarray) -> bytes:
    shard, start, size = places[int(index)]
    with tf.io.gfile.GFile(shards[shard], "rb") as file:
      file.seek(int(start))
      return file.read(int(size))

  def fetch(index: tf.Tensor) -> tf.Tensor:
    content = tf.numpy_function(read, [index], tf.string, stateful=False)
    return tf.ensure_shape(content, [])

  return fetch


def _stamp(shards: list[str]) -> str:
  """Returns a digest of the names, sizes and times of the shards."""
  digest = hashlib.sha256()
  for shard in shards:
    found = tf.io.gfile.stat(shard)
    facts = f"{os.path.basename(shard)} {found.length} {found.mtime_nsec}\n"
    digest.update(os.fsencode(facts))
  return digest.hexdigest()
