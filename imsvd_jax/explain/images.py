"""The data set that a subject is asked about, and its batches."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from imsvd_jax.base import hashing
from imsvd_jax.base.errors import UserError

Batch = Mapping[str, np.ndarray]
Batches = Iterable[Batch]

# The index of padding, larger than that of any image.
NO_IMAGE = np.int32(np.iinfo(np.int32).max)
# What other arrays of a batch are padded with is 0.
_PADDING = {"index": NO_IMAGE, "label": -1}


@dataclasses.dataclass(frozen=True)
class TwoViews:
  """Where the two augmented views of every image come from.

  Attributes:
    crops: Returns batches of NumPy arrays, each image once: "views" uint8
      [B, 2, S, S, C], "index" [B] and optionally "mask" [B].
    augment: (views uint8 [B, 2, S, S, C], index int32 [B]) -> float32
      [2, B, S, S, C], pixels in 0..255; pure and traceable by jax. An image's
      views must not depend on the other images of its batch.
  """

  crops: Callable[[], Batches]
  augment: Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Drawing:
  """How images are drawn from factors.

  Attributes:
    draw: Rows of factors -> images, prepared as in `Images.batches`.
    factors: float32 [n, columns], of some images.
    names: Of the factor of each column; a color's columns share one.
  """

  draw: Callable[[np.ndarray], np.ndarray]
  factors: np.ndarray
  names: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Images:
  """A data set.

  Attributes:
    batches: Returns the data set from its start, as batches of NumPy arrays:
      "image" uint8 [B, H, W, C], "index" [B], optionally "label" [B] (-1:
      unlabeled) and "mask" [B] (False: padding); each image once.
    count: How many images will come, for the time left; None: unknown.
    some: Returns batches of n images from everywhere in the data set, with
      their indices in it; by
      default one more pass over `batches` that keeps n of them.
    masked: Returns batches as `some`, with "object" uint8 [B, H, W, C], 255 on
      the object of the image and 0 elsewhere; None where that is not known.
    views: Two augmented views of every image, for agreement.
    factors: Known values by name, each indexed by image index (a sequence of
      length > largest index, or a mapping); see `factors.make_factor`.
    drawing: Where the images were drawn from factors: how, and the factors.
    label_names: Names of the classes.
    names: Image index -> what to call the image, such as its path.
    links: Image index -> a link from the explorer's page to its file, "" if it
      is in none of its own.
  """

  batches: Callable[[], Batches]
  count: int | None = None
  some: Callable[[int], Batches] | None = None
  masked: Callable[[int], Batches] | None = None
  views: TwoViews | None = None
  factors: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  drawing: Drawing | None = None
  label_names: Sequence[str] | None = None
  names: Callable[[int], str] | None = None
  links: Callable[[int], str] | None = None


def _padded(batch: Batch, batch_size: int) -> dict[str, np.ndarray]:
  """Pads a batch with masked images, sorts it by index and adds its mask."""
  index = np.asarray(batch["index"], np.int64)
  mask = np.asarray(batch.get("mask", np.ones(len(index), bool)), bool)
  known = index[mask]
  if known.size and not 0 <= known.min() <= known.max() < NO_IMAGE:
    raise UserError(
      f"Image indices must be in 0..2^31-2; found {known.min()}..{known.max()}."
    )
  arrays = {**batch, "mask": mask, "index": np.where(mask, index, NO_IMAGE)}
  order = np.argsort(arrays["index"], kind="stable")
  pad = batch_size - len(index)
  return {
    name: np.pad(
      np.asarray(array)[order],
      [(0, pad)] + [(0, 0)] * (np.ndim(array) - 1),
      constant_values=_PADDING.get(name, 0),
    )
    for name, array in arrays.items()
  }


def padded_batches(
  batches: Batches, multiple: int
) -> Iterator[dict[str, np.ndarray]]:
  """Pads every batch to the first one's size, rounded up to `multiple`.

  The batches are sorted by image index and always have a "mask".

  Raises:
    UserError: An index is not in 0..2^31-2.
  """
  size = 0
  for batch in batches:
    count = len(batch["index"])
    # A batch larger than the first one compiles once more.
    wanted = max(size, count + -count % multiple)
    size = size or wanted
    yield _padded(batch, wanted)


def as_shown(images: np.ndarray) -> np.ndarray:
  """Returns pixels [..., C] as uint8 of one or three channels, for pictures.

  Of four channels the last one is left out; of any other number the mean is
  taken.
  """
  channels = images.shape[-1]
  if channels == 4:
    images = images[..., :3]
  elif channels not in (1, 3):
    images = images.mean(axis=-1, keepdims=True)
  if images.dtype == np.uint8:
    return images
  return np.clip(np.rint(images), 0, 255).astype(np.uint8)


def some_of(indices: np.ndarray, count: int) -> np.ndarray:
  """Returns at most `count` of the indices, ascending, chosen by their hash.

  Not the first ones, because a data set may be sorted by class.
  """
  hashes = hashing.mix(np.asarray(indices).astype(np.uint64))
  order = np.argsort(hashes, kind="stable")
  return np.sort(np.asarray(indices)[order[:count]])


def only(batches: Batches, chosen: np.ndarray) -> Iterator[Batch]:
  """Yields the images of chosen indices, in batches of the first one's size."""
  size = 0
  images: list[np.ndarray] = []
  indices: list[int] = []
  for batch in batches:
    size = size or len(batch["image"])
    keep = np.isin(batch["index"], chosen)
    if "mask" in batch:
      keep &= batch["mask"]
    images.extend(batch["image"][keep])
    indices.extend(batch["index"][keep])
    while len(images) >= size:
      yield _batch(images[:size], indices[:size])
      images, indices = images[size:], indices[size:]
  if images:
    yield _batch(images, indices)


def _batch(images: list[np.ndarray], indices: list[int]) -> Batch:
  return {"image": np.stack(images), "index": np.array(indices)}
