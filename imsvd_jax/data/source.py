"""What a source of images offers to the pipeline.

A source is a frozen description of one split. It offers its records in one of
three ways, fastest first; the pipeline takes the first that is set:

  images:      every image decoded, of one size, in memory. The pipeline crops
               a whole batch at once, which is what small images need:
               TensorFlow spends more time in starting operations than in
               doing them.
  fetch:       one record by its index, as an encoded string or as pixels.
  stream:      records in an order that the source chooses, for files that can
               only be read forwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError

# Above this many bytes of decoded pixels a source computes or reads its images
# one by one instead of holding them.
MAX_BYTES_IN_MEMORY = 1 << 30

# Up to this side, a batch of images is cropped at once, by matrix products.
MAX_SMALL_SIDE = 64

_NAMES_SHOWN = 5  # Of classes, in a run's log.

ON_BAD_IMAGE = ("replace", "error")
INTERPOLATIONS = ("bicubic", "bilinear")


@dataclasses.dataclass(frozen=True)
class Stream:
  """Records of a source that reads its files forwards.

  Attributes:
    train: (key, first_record, process_index, process_count) -> endless dataset
      of {"serialized", "index", "epoch"}, this process's part.
    evaluate: (first, last) -> dataset of {"serialized", "index"}, in order.
    parse: serialized -> {"image": string scalar or uint8 [height, width,
      channels], "label": int32, if there are labels (see `Source.labels`)}.
  """

  train: Callable[[tf.Tensor, int, int, int], tf.data.Dataset]
  evaluate: Callable[[int, int], tf.data.Dataset]
  parse: Callable[[tf.Tensor], dict[str, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    name: What to call it in messages ("digits", "tfds:cifar10").
    num_examples: Number of records.
    num_classes: Number of classes; 0 when there are no labels.
    label_names: A name for every class; may be empty.
    channels: Channels of every image after decoding.
    interpolation: "bicubic" or "bilinear", for every resize.
    on_bad_image: "replace" or "error", for a record that cannot be decoded.
    images: uint8 [num_examples, height, width, channels], or None.
    labels: int32 [num_examples], or None when unlabelled or only in the stream.
      With `multi_label` [num_examples, num_classes]: 1 where the image has the
      class, 0 where it has not, -1 where that does not count.
    multi_label: Whether an image may have several classes.
    fetch: (index, int64 scalar) -> string scalar, or uint8 [height, width,
      channels]; runs inside tf.data. None if not available.
    stream: Records in order, if they cannot be taken by index.
    describe: index -> a name for a message, such as the path of a file.
    stamp: () -> what tells these data from others of that name and size, where
      they are not in memory: versions, or sizes and times of files.
    factors: float32 [num_examples, len(factor_names)]: what the images were
      drawn from, or None.
    factor_names: Names of the columns of `factors`.
    named: What `describe` calls the records that the log has named already as
      unreadable; parts of a source share it.
    factor_values: By name of a column of class numbers, the classes' names.
    remarks: What the log of a run should say of the data, without a full stop.
  """

  name: str
  num_examples: int
  num_classes: int = 0
  label_names: tuple[str, ...] = ()
  channels: int = 3
  interpolation: str = "bicubic"
  on_bad_image: str = "replace"
  images: np.ndarray | None = None
  labels: np.ndarray | None = None
  multi_label: bool = False
  fetch: Callable[[tf.Tensor], tf.Tensor] | None = None
  stream: Stream | None = None
  describe: Callable[[int], str] = lambda index: f"record {index}"
  stamp: Callable[[], str] = lambda: ""
  factors: np.ndarray | None = None
  factor_names: tuple[str, ...] = ()
  named: set[str] = dataclasses.field(default_factory=set, compare=False)
  factor_values: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  remarks: tuple[str, ...] = ()

  def __post_init__(self):
    if self.num_examples < 1:
      raise UserError(
        f"Data source {self.name!r} is empty: found 0 images, expected at"
        " least 1; check data.path, the split and data.num_examples."
      )
    for key, known in (
      ("interpolation", INTERPOLATIONS),
      ("on_bad_image", ON_BAD_IMAGE),
    ):
      if getattr(self, key) not in known:
        raise UserError(
          f"data.{key} is {getattr(self, key)!r}; expected one of"
          f" {', '.join(map(repr, known))}."
        )

  @property
  def small_images(self) -> bool:
    """Whether a whole batch can be cropped at once."""
    if self.images is None:
      return False
    return max(self.images.shape[1:3]) <= MAX_SMALL_SIDE

  def summary(self) -> str:
    """Returns one line for people: how many images, what else is to say."""
    classes = "no labels"
    if self.num_classes:
      names = list(self.label_names[:_NAMES_SHOWN])
      names += ["..."] * (self.num_classes > len(names))
      classes = f"{self.num_classes} classes ({', '.join(names)})"
    images = f"{self.num_examples} images, {classes}"
    return f"{self.name}: {'; '.join([images, *self.remarks])}"

  def fingerprint(self) -> str:
    """Returns a digest that another version of the data would not have."""
    digest = hashlib.sha256(f"{self.name} {self.num_examples} ".encode())
    digest.update(self.stamp().encode())
    for array in (self.images, self.labels):
      if array is not None:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def reader(self) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """Returns a function of a record {"index" or "serialized"} to its image."""
    if self.stream is not None:
      return lambda record: self.stream.parse(record["serialized"])["image"]
    if self.images is not None:
      pixels = tf.constant(self.images)
      return lambda record: pixels[record["index"]]
    return lambda record: self.fetch(record["index"])


def split_number(split: str) -> int:
  """Returns a number for the name of a split, the same in every run."""
  return int.from_bytes(split.encode(), "little") % 2**63


def require_num_examples(settings: Any) -> int:
  """Returns data.num_examples for a source that makes as many as you want."""
  if settings.num_examples < 1:
    raise UserError(
      f"data.num_examples is {settings.num_examples}; source"
      f" {settings.name!r} makes its images and needs to know how many."
    )
  return settings.num_examples


def reject_num_examples(settings: Any) -> None:
  """Raises if data.num_examples is set for a source of fixed size."""
  if settings.num_examples:
    raise UserError(
      f"data.num_examples is {settings.num_examples}, but source"
      f" {settings.name!r} has a size of its own; expected 0."
    )


def check_encoded_channels(settings: Any) -> None:
  """Raises if image files cannot be decoded to data.channels."""
  if settings.channels not in (1, 3, 4):
    raise UserError(
      f"data.channels is {settings.channels}; image files are decoded to 1, 3"
      " or 4 channels (more need a TFDS data set of arrays)."
    )


@tf.autograph.experimental.do_not_convert
def hold_in_memory(source: Source, size: int) -> Source:
  """Returns the source with `images` filled in, if they fit.

  Args:
    source: A source whose `fetch` returns pixels [size, size, channels].
    size: Height and width of every image.
  """
  num_bytes = source.num_examples * size * size * source.channels
  if num_bytes > MAX_BYTES_IN_MEMORY:
    return source
  dataset = tf.data.Dataset.range(source.num_examples).map(source.fetch)
  images = next(dataset.batch(source.num_examples).as_numpy_iterator())
  return dataclasses.replace(source, images=images)
