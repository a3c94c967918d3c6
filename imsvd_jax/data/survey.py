"""Everything about the images of a source that one pass over them can tell."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import decode, execution, faults, image_files
from imsvd_jax.data.source import Source

_PREFETCH = 64  # Images.


@dataclasses.dataclass
class Survey:
  """What was found.

  Attributes:
    num_images: All, also those that cannot be read.
    kinds: Count of images by format and mode, such as "JPEG RGB".
    sides: int32 [n, 2], height and width of the readable images.
    bad: Names of unreadable images by the reason.
    names_of: Names of all images by the digest of their content.
    flat: Names of images of one color only.
    class_counts: Images by class; empty without labels.
    mean: Of each channel, in units of the range of values, each image counting
      alike.
    std: The same.
    least: The smallest level of each channel, in the same units.
    most: The largest.
  """

  num_images: int = 0
  kinds: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )
  sides: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, 2), np.int32)
  )
  bad: dict[str, list[str]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  names_of: dict[bytes, list[str]] = dataclasses.field(
    default_factory=lambda: collections.defaultdict(list)
  )
  flat: list[str] = dataclasses.field(default_factory=list)
  class_counts: dict[str, int] = dataclasses.field(default_factory=dict)
  mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  std: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  least: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  most: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))

  @property
  def duplicates(self) -> list[list[str]]:
    """Names of images of the same content."""
    return [names for names in self.names_of.values() if len(names) > 1]

  def shared_with(self, other: Survey) -> list[tuple[str, str]]:
    """Returns pairs of names of images that both have."""
    both = self.names_of.keys() & other.names_of.keys()
    pairs = [(self.names_of[d][0], other.names_of[d][0]) for d in both]
    return sorted(pairs)


@tf.autograph.experimental.do_not_convert
def survey(source: Source, done: Callable[[int], None]) -> Survey:
  """Reads a source once.

  Args:
    source: Its images, and labels.
    done: Called with the number of images that were read since the last call.

  Raises:
    UserError: No image can be read.
  """
  found = Survey(num_images=source.num_examples)
  counts: collections.Counter[int] = collections.Counter()
  sides, moments, extremes = [], [], []
  dataset = _records(source).map(
    lambda record: _measured(source, record),
    num_parallel_calls=execution.num_threads(),
  )
  dataset = dataset.prefetch(_PREFETCH)
  dataset = dataset.with_options(execution.pipeline_options())
  for row in dataset.as_numpy_iterator():
    index = int(row["index"])
    name = source.relative_name(index)
    if source.num_classes and not source.multi_label:
      counts[int(row["label"])] += 1
    if row["readable"]:
      found.kinds[_kind(row["content"])] += 1
      sides.append(row["sides"])
      moments.append(row["moments"])
      extremes.append(row["extremes"])
      if np.array_equal(*row["extremes"]):
        found.flat.append(name)
      found.names_of[_digest(row["content"])].append(name)
    else:
      found.bad[faults.why_bad(source, index)].append(name)
    done(1)
  if not sides:
    reason = next(iter(found.bad))
    raise UserError(
      f"None of the {source.num_examples} images of {source.name} can be read;"
      f" the first one: {reason}."
    )
  found.sides = np.stack(sides)
  found.class_counts = _by_name(source, counts)
  first, second = np.mean(moments, axis=0) / [[255], [255**2]]
  found.mean = first
  found.std = np.sqrt(np.maximum(second - first**2, 0))
  found.least = np.min([e[0] for e in extremes], axis=0) / 255
  found.most = np.max([e[1] for e in extremes], axis=0) / 255
  return found


def _records(source: Source) -> tf.data.Dataset:
  if source.stream is not None:
    return source.stream.evaluate(0, source.num_examples)
  indices = tf.data.Dataset.range(source.num_examples)
  return indices.map(lambda index: {"index": index})


def _measured(source: Source, record: dict[str, Any]) -> dict[str, Any]:
  """Returns what is measured of an image, and whether it can be read."""
  read, channels = source.reader(), source.channels

  def measure(record: dict[str, Any]) -> dict[str, Any]:
    content = read(record)
    image = content
    if image.dtype == tf.string:
      image = decode.decode_pixels(image, *source.decoding)
    image = tf.ensure_shape(image, (None, None, channels))
    levels = tf.cast(image, tf.float64)
    mean = tf.reduce_mean(levels, axis=[0, 1])
    square = tf.reduce_mean(levels**2, axis=[0, 1])
    ends = (tf.reduce_min(levels, [0, 1]), tf.reduce_max(levels, [0, 1]))
    if content.dtype != tf.string:
      content = tf.io.serialize_tensor(content)
    return {
      "content": content,
      "sides": tf.shape(image)[:2],
      "moments": tf.stack([mean, square]),
      "extremes": tf.stack(ends),
      "readable": tf.constant(True),
    }

  nothing = {
    "content": tf.constant(""),
    "sides": tf.zeros([2], tf.int32),
    "moments": tf.zeros([2, channels], tf.float64),
    "extremes": tf.zeros([2, channels], tf.float64),
    "readable": tf.constant(False),
  }
  # A dataset within the dataset: only `ignore_errors` catches errors.
  attempt = tf.data.Dataset.from_tensors(record).map(measure)
  attempt = attempt.ignore_errors(log_warning=False)
  attempt = attempt.concatenate(tf.data.Dataset.from_tensors(nothing))
  row = attempt.take(1).get_single_element()
  return row | {"index": record["index"], "label": _label(source, record)}


def _label(source: Source, record: dict[str, Any]) -> tf.Tensor:
  if not source.num_classes or source.multi_label:
    return tf.constant(-1)
  if source.labels is None and source.stream is not None:
    return source.stream.parse(record["serialized"])["label"]
  return tf.constant(source.labels, tf.int32)[record["index"]]


def _by_name(
  source: Source, counts: collections.Counter[int]
) -> dict[str, int]:
  names = source.label_names or tuple(map(str, range(source.num_classes)))
  found = {name: counts[i] for i, name in enumerate(names)}
  if not source.num_classes or source.multi_label:
    return {}
  return found | ({"no label": counts[-1]} if counts[-1] else {})


def _digest(content: bytes) -> bytes:
  return hashlib.blake2b(content, digest_size=16).digest()


def _kind(content: bytes) -> str:
  """Returns the format and mode of a file by its header."""
  if content.startswith(b"\x93NUMPY"):
    return "NumPy"
  try:
    with image_files.pillow().open(io.BytesIO(content)) as image:
      return f"{image.format} {image.mode}"
  except (OSError, ValueError, SyntaxError):
    is_tiff = content[:2] in (b"II", b"MM")
    return "TIFF of many bits or channels" if is_tiff else "array"
