"""The second pass: thumbnails and attribution of the images that are shown.

Which images are shown is known only after the analysis. This pass decodes the
data set again, keeps a thumbnail of each shown image and attributes the best
images of each bin while they go by, so that no image is held in full.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices, files
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import attribution, patch_codes
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.explain_options import ExplainOptions
from imsvd_jax.explain.images import Batches, as_shown, some_of
from imsvd_jax.explain.subject import Subject

SHEET_SIDE = 8  # Thumbnails along a side: small sheets decode as needed.
PER_SHEET = SHEET_SIDE**2
_RESIZE_BATCH = 64
_ATTRIBUTION_BATCH = 64  # Targets of one call, rounded up to the devices.
_FINE_SIZE = 32  # Side of the stored maps of integrated gradients.


@dataclasses.dataclass(frozen=True)
class Illustrations:
  """Pictures of what the analysis found."""

  # [T] int64, ascending, the images that have a thumbnail; the thumbnail's slot
  # is the place in this array.
  indices: np.ndarray
  thumbnail_size: int  # Side in pixels.
  # [M, b, k, h, w] uint8, maps scaled to 0..255 for the k best images of each
  # bin, or None.
  grad_cam: np.ndarray | None = None
  # [M, b, k', g, g] uint8, finer maps, or None.
  integrated: np.ndarray | None = None
  # [M, b, k, h, w] uint8, 255 for the patches in the bin, or None.
  patches: np.ndarray | None = None
  # [M, b, k, h, w] uint8, of a transformer, or None.
  attention: np.ndarray | None = None
  # Whole images by index, for figures.
  kept: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)

  def maps(self) -> dict[str, np.ndarray]:
    """Returns the maps that there are, by the title of their column."""
    found = {
      "Grad-CAM": self.grad_cam,
      "attention": self.attention,
      "integrated gradients": self.integrated,
      "patches in the bin": self.patches,
    }
    return {name: maps for name, maps in found.items() if maps is not None}


def shown_images(analysis: Analysis, max_images: int) -> np.ndarray:
  """Returns the images to show: all, or every top image and a uniform sample.

  Returns:
    Ascending indices. They are more than `max_images` only if the bins' best
    images alone are more.
  """
  if analysis.num_images <= max_images:
    return analysis.indices
  best = np.empty(0, np.int64)
  if analysis.code is not None:
    top = analysis.code.top_indices
    best = np.unique(top[top >= 0])
  others = np.setdiff1d(analysis.indices, best, assume_unique=True)
  room = max(max_images - len(best), 0)
  return np.sort(np.concatenate([best, some_of(others, room)]))


def sheet_extension(thumbnail_size: int) -> str:
  """Returns "png" or "jpg"; JPEG smears the few pixels of a small image."""
  return "png" if thumbnail_size <= 32 else "jpg"


class SheetWriter:
  """Collects thumbnails in any order and writes each sheet when it is full."""

  def __init__(
    self, directory: pathlib.Path, indices: np.ndarray, thumbnail_size: int
  ) -> None:
    self.directory = directory
    self.indices = indices
    self.size = thumbnail_size
    self.extension = sheet_extension(thumbnail_size)
    self._open: dict[int, np.ndarray] = {}
    self._left = np.bincount(np.arange(len(indices)) // PER_SHEET)
    directory.mkdir(parents=True, exist_ok=True)

  def slots(self, indices: np.ndarray) -> np.ndarray:
    """Returns [k], the slot of each image, -1 when it is not shown."""
    place = np.searchsorted(self.indices, indices)
    place = np.minimum(place, len(self.indices) - 1)
    return np.where(self.indices[place] == indices, place, -1)

  def add(self, slots: np.ndarray, thumbnails: np.ndarray) -> None:
    """Takes uint8 [k, size, size, 3]."""
    for slot, thumbnail in zip(slots, thumbnails, strict=True):
      number, place = divmod(int(slot), PER_SHEET)
      if number not in self._open:
        side = SHEET_SIDE * self.size
        self._open[number] = np.zeros((side, side, 3), np.uint8)
      row, column = divmod(place, SHEET_SIDE)
      top, left = row * self.size, column * self.size
      sheet = self._open[number]
      sheet[top : top + self.size, left : left + self.size] = thumbnail
      self._left[number] -= 1
      if not self._left[number]:
        self._write(number)

  def _write(self, number: int) -> None:
    options = (
      {} if self.extension == "png" else {"quality": 90, "subsampling": 0}
    )
    path = self.directory / f"{number}.{self.extension}"
    with files.in_place_when_done(path) as unfinished:
      matplotlib.image.imsave(
        unfinished,
        self._open.pop(number),
        format=self.extension,
        pil_kwargs=options,
      )

  def close(self) -> None:
    """Raises UserError unless every image came."""
    left = self._left.sum()
    if left:
      raise UserError(
        f"{left} of {len(self.indices)} images of the analysis did not "
        "come again in the second pass; give the same data set to both."
      )


def _shrinker(size: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function: images [n, H, W, C] -> uint8 [n, size, size, 3]."""

  @jax.jit
  def thumbnails(images: jax.Array) -> jax.Array:
    images = images.astype(jnp.float32)
    shape = (images.shape[0], size, size, images.shape[3])
    small = jax.image.resize(images, shape, "linear", antialias=True)
    small = jnp.clip(jnp.round(small), 0, 255).astype(jnp.uint8)
    return jnp.broadcast_to(small, (*shape[:3], 3))

  def shrink(images: np.ndarray) -> np.ndarray:
    parts = [np.zeros((0, size, size, 3), np.uint8)]
    # One compiled shape for any number of images.
    for start in range(0, len(images), _RESIZE_BATCH):
      part = images[start : start + _RESIZE_BATCH]
      whole = devices.pad_rows(part, _RESIZE_BATCH)
      parts.append(np.asarray(thumbnails(whole))[: len(part)])
    return np.concatenate(parts)

  return shrink


class _MapCollector:
  """Runs one attribution over the targets that go by.

  A batch of the data set holds few images that are wanted, or some that are
  wanted many times. Targets wait until there is a whole batch of them, so that
  only the last batch is padded.
  """

  def __init__(
    self,
    subject: Subject,
    compiled: Callable[..., jax.Array],
    best: np.ndarray,
    *,
    mesh: Mesh,
    size: tuple[int, int] | None = None,
  ) -> None:
    """Takes the images [M, b, k] to attribute, and the size to store."""
    self.subject = subject
    self.compiled = compiled
    self.shape = best.shape
    self.size = size
    self.mesh = mesh
    flat = best.reshape(-1)
    self.order = np.argsort(flat, kind="stable")
    self.sorted = flat[self.order]
    wanted = min(_ATTRIBUTION_BATCH, len(flat))
    self.batch_size = wanted + -wanted % mesh.size
    self.maps: np.ndarray | None = None
    self._images: list[np.ndarray] = []
    self._targets = np.empty(0, np.int64)

  def _targets_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (row in `indices`, flat target) of each target among them."""
    first = np.searchsorted(self.sorted, indices, "left").tolist()
    last = np.searchsorted(self.sorted, indices, "right").tolist()
    spans = [range(a, b) for a, b in zip(first, last, strict=True)]
    rows = [row for row, span in enumerate(spans) for _ in span]
    targets = [place for span in spans for place in span]
    return np.array(rows, np.int64), self.order[np.array(targets, np.int64)]

  def add(self, images: np.ndarray, indices: np.ndarray) -> None:
    """Takes a batch of images, without padding."""
    rows, targets = self._targets_of(indices)
    start = 0
    while start < len(rows):
      room = self.batch_size - len(self._targets)
      part = slice(start, start + room)
      self._images.append(images[rows[part]])
      self._targets = np.concatenate([self._targets, targets[part]])
      start += room
      if len(self._targets) == self.batch_size:
        self._attribute()

  def _attribute(self) -> None:
    variables, bins, _ = np.unravel_index(self._targets, self.shape)
    maps = attribution.attribute(
      self.compiled,
      self.subject,
      np.concatenate(self._images),
      variables,
      bins,
      batch_size=self.batch_size,
      mesh=self.mesh,
    )
    maps = np.maximum(maps, 0)
    if self.size is not None:
      maps = attribution.resize_maps(maps, self.size)
    levels = np.rint(attribution.unit_maps(maps) * 255).astype(np.uint8)
    if self.maps is None:
      self.maps = np.zeros((len(self.order), *levels.shape[1:]), np.uint8)
    self.maps[self._targets] = levels
    self._images, self._targets = [], np.empty(0, np.int64)

  def result(self) -> np.ndarray | None:
    """Returns [M, b, k, h, w] uint8, or None without targets."""
    if len(self._targets):
      self._attribute()
    if self.maps is None:
      return None
    return self.maps.reshape(*self.shape, *self.maps.shape[1:])


def _collectors(
  subject: Subject, analysis: Analysis, options: ExplainOptions, mesh: Mesh
) -> dict[str, _MapCollector]:
  """Returns the wanted and possible ones of the maps of `Illustrations`."""
  if analysis.code is None:
    return {}
  best = analysis.code.top_indices
  many, few = options.grad_cam_per_bin, options.integrated_per_bin
  made: dict[str, Callable[..., jax.Array]] = {}
  if many != 0 and subject.patch_codes is not None:
    made["patches"] = patch_codes.make_members(subject)
  if many != 0 and subject.attention is not None:
    made["attention"] = patch_codes.make_attention(subject)
  if None not in (subject.feature_maps, subject.bin_log_probabilities):
    if many != 0:
      made["grad_cam"] = attribution.make_grad_cam(subject)
    if few:
      made["integrated"] = attribution.make_integrated_gradients(subject)
  fine = (_FINE_SIZE, _FINE_SIZE)
  return {
    name: _MapCollector(
      subject,
      compiled,
      best[..., : few if name == "integrated" else many],
      mesh=mesh,
      size=fine if name == "integrated" else None,
    )
    for name, compiled in made.items()
  }


def illustrate(
  subject: Subject,
  batches: Batches,
  analysis: Analysis,
  directory: str | pathlib.Path,
  options: ExplainOptions,
  *,
  mesh: Mesh,
  keep: Sequence[int] = (),
  report: Callable[[str], None] = console.print_line,
) -> Illustrations:
  """Streams over the data set once more and writes sprite sheets.

  Args:
    batches: The data set of the analysis, once more; any batch size.
    directory: Where `0.jpg`, `1.jpg`, ... of 8 x 8 thumbnails go.
    options: How many images to show, and to attribute.
    keep: Indices of images to keep whole, for figures.
  """
  size = options.thumbnail_size
  indices = shown_images(analysis, options.max_images)
  writer = SheetWriter(pathlib.Path(directory), indices, size)
  collectors = _collectors(subject, analysis, options, mesh)
  kept: dict[int, np.ndarray] = {}
  shrink = _shrinker(size)
  meter = console.Progress("pictures", analysis.num_images, report=report)
  for batch in batches:
    mask = np.asarray(batch.get("mask", np.ones(len(batch["image"]), bool)))
    index = np.asarray(batch["index"], np.int64)[mask]
    images = np.asarray(batch["image"])[mask]
    slots = writer.slots(index)
    shown = slots >= 0
    writer.add(slots[shown], shrink(as_shown(images[shown])))
    for collector in collectors.values():
      collector.add(images, index)
    for i in np.flatnonzero(np.isin(index, keep)):
      kept[int(index[i])] = as_shown(images[i]).copy()
    meter.add(len(index))
  writer.close()
  maps = {name: collector.result() for name, collector in collectors.items()}
  meter.finish()
  return Illustrations(indices, size, kept=kept, **maps)
