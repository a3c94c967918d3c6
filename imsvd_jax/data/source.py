"""A source of images: the interface between data sets and the pipeline.

A source is a frozen description of one split. It offers its records in one or
more of three ways:

  images:      all images in memory, decoded and of one size. JAX crops a whole
               batch of them at once, in training on the devices.
  fetch:       one record by its index, as an encoded string or as pixels.
  stream:      records in an order that the source chooses, for files that can
               only be read sequentially.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.config import ADDED_KEYS
from imsvd_jax.base.errors import UserError
from imsvd_jax.data.squares import Squares

if TYPE_CHECKING:  # Sources of arrays do without it.
  import tensorflow as tf

# Decoded pixels that a source keeps in memory at most; with more it computes or
# reads its images one by one.
MAX_BYTES_IN_MEMORY = 1 << 30

# Pixels of an image file beyond which it is not decoded: PIL's own limit.
MAX_PIXELS: int = ADDED_KEYS["data.max_pixels"]

_NAMES_SHOWN = 5  # Class names in the log of a run.

_CHOICES = {
  "interpolation": ("bicubic", "bilinear"),
  "train_interpolation": ("", "bicubic", "bilinear"),
  "on_bad_image": ("replace", "error"),
}


# The values that become black and white; "auto": those of the numbers' type.
ValueRange = tuple[float, float] | Literal["auto"] | None


# See `Source.fetch`.
Fetch = Callable[["tf.Tensor"], "tf.Tensor"]


# data.background, where the colors under transparent pixels are shown.
ALPHA_DROPPED = -1


class Decoding(NamedTuple):
  """How image files become pixels, see `Source`."""

  channels: int = 3
  max_pixels: int = MAX_PIXELS
  value_range: ValueRange = None
  exif: bool = False
  background: int = ALPHA_DROPPED


@dataclasses.dataclass(frozen=True)
class Stream:
  """Records of a source that reads its files sequentially.

  Attributes:
    train: (key, skip, process_index, process_count) -> this process's part, an
      endless dataset of {"serialized", "index", "epoch"}, less its first `skip`
      records.
    evaluate: (first, last) -> dataset of {"serialized", "index"}, in order.
    parse: serialized -> {"image": string scalar, or pixels as of
      `Source.fetch`, "label": int32, if there are labels (see
      `Source.labels`)}.
  """

  train: Callable[[tf.Tensor, int, int, int], tf.data.Dataset]
  evaluate: Callable[[int, int], tf.data.Dataset]
  parse: Callable[[tf.Tensor], dict[str, tf.Tensor]]


@dataclasses.dataclass(frozen=True)
class Source:
  """One split of a data set.

  Attributes:
    name: Name of the source in messages ("digits", "tfds:cifar10").
    num_examples: Number of records.
    num_classes: Number of classes; 0 if there are no labels.
    label_names: A name for every class; may be empty.
    channels: Channels of every image after decoding.
    interpolation: "bicubic" or "bilinear", for evaluation.
    train_interpolation: The same for training views; "": as `interpolation`.
    antialias: Whether training views that shrink are antialiased. Images in
      memory, and those of evaluation, always are.
    on_bad_image: "replace" or "error", for a record that cannot be decoded.
    max_pixels: An encoded image with more of them counts as one that cannot.
    value_range: The values that become 0 and 255, for numbers that are not of 8
      bits; "auto": those of their type. None: all images have 8 bits. With a
      range, pixels are float32 levels of 0 to 255, which are not rounded.
    exif: Whether image files are turned as their EXIF orientation says.
    background: Level of gray, 0 to 255, that is behind transparent pixels of
      image files; ALPHA_DROPPED shows the colors that are stored under them.
      Images of four channels keep their alpha.
    images: uint8 [num_examples, height, width, channels], or None. Squares of
      a pack stand in for them.
    labels: int32 [num_examples]; None if there are none, or only in the stream.
      With `multi_label` [num_examples, num_classes]: 1 if the image has the
      class, 0 if it does not, -1 if the class is to be ignored.
    multi_label: Whether an image may have several classes.
    fetch: (index, int64 scalar) -> string scalar, or pixels [height, width,
      channels], uint8 or, with a value range, float32; runs inside tf.data.
      None if not available.
    stream: Records in order, if they cannot be read by index.
    describe: index -> a name for messages, such as the path of a file.
    root: Directory that the paths of `describe` lie in; "" if they are none.
    stamp: () -> text that differs for other data of the same name and size:
      versions, or sizes and times of files. Empty for images in memory.
    factors: float32 [num_examples, len(factor_names)], the generative factors
      of the images, or None.
    factor_names: Names of the columns of `factors`.
    masks: factors [n, ...] of n images -> uint8 [n, H, W, channels] of the size
      of the images, 255 on the object and 0 elsewhere. None if not known.
    draw: Rows of factors -> uint8 images, of the size of `images`; or None.
    named: Names of the unreadable records that are in the log already; parts of
      a source share the set.
    factor_values: Class names of each column that holds class numbers, by the
      name of the column.
    remarks: Facts about the data for the log, without a full stop.
    why_unlabeled: Why there are no labels, where that may surprise.
  """

  name: str
  num_examples: int
  num_classes: int = 0
  label_names: tuple[str, ...] = ()
  channels: int = 3
  interpolation: str = "bicubic"
  train_interpolation: str = ""
  antialias: bool = False
  on_bad_image: str = "replace"
  max_pixels: int = MAX_PIXELS
  value_range: ValueRange = None
  exif: bool = False
  background: int = ALPHA_DROPPED
  images: np.ndarray | Squares | None = None
  labels: np.ndarray | None = None
  multi_label: bool = False
  fetch: Fetch | None = None
  stream: Stream | None = None
  describe: Callable[[int], str] = lambda index: f"record {index}"
  root: str = ""
  stamp: Callable[[], str] = lambda: ""
  factors: np.ndarray | None = None
  factor_names: tuple[str, ...] = ()
  masks: Callable[[np.ndarray], np.ndarray] | None = None
  draw: Callable[[np.ndarray], np.ndarray] | None = None
  named: set[str] = dataclasses.field(default_factory=set, compare=False)
  factor_values: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  remarks: tuple[str, ...] = ()
  why_unlabeled: str = ""

  def __post_init__(self) -> None:
    if self.num_examples < 1:
      raise UserError(
        f"Data source {self.name!r} is empty: found 0 images, expected at"
        " least 1; check data.path, the split and data.num_examples."
      )
    for key, known in _CHOICES.items():
      if getattr(self, key) not in known:
        raise UserError(
          f"data.{key} is {getattr(self, key)!r}; expected one of"
          f" {', '.join(map(repr, known))}."
        )

  @property
  def train_kernel(self) -> str:
    """The interpolation of training views."""
    return self.train_interpolation or self.interpolation

  @property
  def decoding(self) -> Decoding:
    """How image files become pixels."""
    return Decoding(
      self.channels,
      self.max_pixels,
      self.value_range,
      self.exif,
      self.background,
    )

  @property
  def pixel_type(self) -> type[np.generic]:
    """The type of the pixels of views."""
    return np.uint8 if self.value_range is None else np.float32

  def summary(self) -> str:
    """Returns one line for the log: images, classes and remarks."""
    classes = "unlabeled"
    if self.why_unlabeled:
      classes = f"unlabeled: {self.why_unlabeled}"
    if self.num_classes:
      names = list(self.label_names[:_NAMES_SHOWN])
      names += ["..."] * (self.num_classes > len(names))
      classes = f"{self.num_classes} classes ({', '.join(names)})"
    plural = "" if self.num_examples == 1 else "s"
    images = f"{self.num_examples} image{plural}, {classes}"
    return f"{self.name}: {'; '.join([images, *self.remarks])}"

  def relative_name(self, index: int) -> str:
    """Returns `describe(index)`, a path relative to the root."""
    return self.describe(index).removeprefix(os.path.join(self.root, ""))

  def fingerprint(self) -> str:
    """Returns a digest that differs for another version of the data."""
    digest = hashlib.sha256(f"{self.name} {self.num_examples} ".encode())
    digest.update(self.stamp().encode())
    for array in (self.images, self.labels):
      if isinstance(array, np.ndarray):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def reader(self) -> Callable[[dict[str, tf.Tensor]], tf.Tensor]:
    """Returns a function from a record {"index" or "serialized"} to its image.

    Raises:
      ValueError: The source offers no records.
    """
    stream, fetch = self.stream, self.fetch
    if stream is not None:
      return lambda record: stream.parse(record["serialized"])["image"]
    if isinstance(self.images, np.ndarray):
      import tensorflow as tf

      pixels = tf.constant(self.images)
      return lambda record: pixels[record["index"]]
    if fetch is not None:
      return lambda record: fetch(record["index"])
    raise ValueError(f"Source {self.name!r} has no images, fetch or stream.")


def split_number(split: str) -> int:
  """Returns a number made from the name of a split: the seed of its images."""
  return int.from_bytes(split.encode(), "little") % 2**63


def require_num_examples(settings: ConfigDict) -> int:
  """Returns data.num_examples for a source that generates its images."""
  if settings.num_examples < 1:
    raise UserError(
      f"data.num_examples is {settings.num_examples}; source"
      f" {settings.name!r} generates its images; expected their number, at"
      " least 1."
    )
  return settings.num_examples


def reject_num_examples(settings: ConfigDict) -> None:
  """Raises if data.num_examples is set for a source of fixed size."""
  if settings.num_examples:
    raise UserError(
      f"data.num_examples is {settings.num_examples}, but source"
      f" {settings.name!r} has a fixed size; expected 0."
    )


def setting(settings: ConfigDict, name: str) -> Any:
  """Returns a key of config.data that recipes of earlier versions lack."""
  return getattr(settings, name, ADDED_KEYS[f"data.{name}"])


def decoding_of(settings: ConfigDict) -> dict[str, Any]:
  """Returns how config.data has image files decoded, for `Source`."""
  return {
    "channels": settings.channels,
    "interpolation": settings.interpolation,
    "on_bad_image": settings.on_bad_image,
    "max_pixels": setting(settings, "max_pixels"),
    "value_range": value_range_of(settings),
    "exif": setting(settings, "exif"),
    "background": _background_of(settings),
  }


def _background_of(settings: ConfigDict) -> int:
  """Returns data.background.

  Raises:
    UserError: It is neither a level nor ALPHA_DROPPED.
  """
  level = setting(settings, "background")
  if not isinstance(level, int) or not ALPHA_DROPPED <= level <= 255:
    raise UserError(
      f"data.background is {level!r}; expected a level from 0 (black) to 255"
      f" (white), or {ALPHA_DROPPED} for colors without their transparency."
    )
  return level


def value_range_of(settings: ConfigDict) -> ValueRange:
  """Returns data.value_range, which a command line gives as text.

  Raises:
    UserError: It is none of "", "auto", and two numbers.
  """
  given = setting(settings, "value_range")
  if not given:
    return None
  if given == "auto":
    return "auto"
  try:
    if isinstance(given, str):
      given = given.strip("()[] ").split(",")
    low, high = map(float, given)
    if low < high < float("inf") and low > -float("inf"):
      return low, high
  except (TypeError, ValueError):
    pass
  raise UserError(
    f"data.value_range is {given!r}; expected 'auto' or the values of black and"
    " white, such as 0,4095 or -1,1."
  )


def check_encoded_channels(settings: ConfigDict) -> None:
  """Raises if image files cannot be decoded to data.channels."""
  if settings.channels not in (1, 3, 4):
    raise UserError(
      f"data.channels is {settings.channels}; expected 1, 3 or 4 for image"
      " files (other numbers need a TFDS data set of arrays, or a folder of"
      " TIFF or .npy files)."
    )


def computed(
  function: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...]
) -> Callable[[tf.Tensor], tf.Tensor]:
  """Returns a `Source.fetch` of images that NumPy makes from their index."""

  def fetch(index: tf.Tensor) -> tf.Tensor:
    import tensorflow as tf

    image = tf.numpy_function(function, [index], tf.uint8, stateful=False)
    return tf.ensure_shape(image, shape)

  return fetch


def fits_in_memory(num_examples: int, num_levels: int) -> bool:
  """Returns whether a source may hold decoded images of so many levels."""
  return num_examples * num_levels <= MAX_BYTES_IN_MEMORY
