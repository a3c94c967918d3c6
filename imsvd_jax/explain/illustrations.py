"""The second pass: thumbnails and attribution of the images that are shown.

Which images are shown is known only after the analysis. This pass decodes the
data set again, keeps a thumbnail of each shown image and attributes the best
images of each bin while they go by, so that no image is held in full.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices, files
from imsvd_jax.base.errors import UserError, counted
from imsvd_jax.explain import attribution, patch_codes
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.explain_options import ExplainOptions
from imsvd_jax.explain.images import Batches, as_shown, some_of
from imsvd_jax.explain.subject import Subject

SHEET_SIDE = 8  # Thumbnails along a side: small sheets decode as needed.
PER_SHEET = SHEET_SIDE**2
_RESIZE_BATCH = 64
# Images and maps of one call, rounded up to the devices. Of few images each is
# wanted for many bins, and goes through the backbone once for all of them;
# integrated gradients have to go through it for each.
_ROOM = {"integrated": (64, 64), "default": (16, 128)}
# Integrated gradients by default: so many of each bin, on a CPU fewer.
_INTEGRATED = 2
_MAX_PIXELS_ON_CPU = 512 * 64 * 64
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
  """Runs one attribution over the images that go by.

  A batch of the data set holds few images that are wanted, or some that are
  wanted for many bins. They wait until the room of a call is full, so that only
  the last call is padded much.
  """

  def __init__(
    self,
    subject: Subject,
    compiled: Callable[..., jax.Array],
    best: np.ndarray,
    *,
    room: tuple[int, int],
    mesh: Mesh,
    done: Callable[[int], None],
    size: tuple[int, int] | None = None,
  ) -> None:
    """Takes the images [M, b, k] to attribute.

    Args:
      subject: What is explained.
      compiled: See `attribution.attribute`.
      best: Indices of images, -1 for none.
      room: Most images and targets of a call.
      mesh: The devices.
      done: Called with the number of maps made since the last call.
      size: Of the maps to store; None: as they are.
    """
    self.subject = subject
    self.compiled = compiled
    self.shape = best.shape
    self.size = size
    self.mesh = mesh
    self.done = done
    flat = best.reshape(-1)
    self.order = np.argsort(flat, kind="stable")
    self.sorted = flat[self.order]
    self.count = int((flat >= 0).sum())
    images, targets = (n + -n % mesh.size for n in room)
    self.room = images, targets
    self.maps: np.ndarray | None = None
    self._images: list[np.ndarray] = []
    self._rows: list[int] = []  # Of each waiting target, its image among these.
    self._targets: list[int] = []

  def add(self, images: np.ndarray, indices: np.ndarray) -> None:
    """Takes a batch of images, without padding."""
    first = np.searchsorted(self.sorted, indices, "left").tolist()
    last = np.searchsorted(self.sorted, indices, "right").tolist()
    for image, start, stop in zip(images, first, last, strict=True):
      while start < stop:
        if len(self._images) == self.room[0]:
          self._attribute()
        count = min(stop - start, self.room[1] - len(self._targets))
        self._rows += [len(self._images)] * count
        self._images.append(image)
        self._targets += self.order[start : start + count].tolist()
        start += count
        if len(self._targets) == self.room[1]:
          self._attribute()

  def _attribute(self) -> None:
    variables, bins, _ = np.unravel_index(self._targets, self.shape)
    maps = attribution.attribute(
      self.compiled,
      self.subject,
      np.stack(self._images),
      np.stack([self._rows, variables, bins], axis=1),
      room=self.room,
      mesh=self.mesh,
    )
    maps = np.maximum(maps, 0)
    if self.size is not None:
      maps = attribution.resize_maps(maps, self.size)
    levels = np.rint(attribution.unit_maps(maps) * 255).astype(np.uint8)
    if self.maps is None:
      self.maps = np.zeros((len(self.order), *levels.shape[1:]), np.uint8)
    self.maps[self._targets] = levels
    self.done(len(self._targets))
    self._images, self._rows, self._targets = [], [], []

  def result(self) -> np.ndarray | None:
    """Returns [M, b, k, h, w] uint8, or None without targets."""
    if len(self._targets):
      self._attribute()
    if self.maps is None:
      return None
    return self.maps.reshape(*self.shape, *self.maps.shape[1:])


def _collectors(
  subject: Subject,
  analysis: Analysis,
  options: ExplainOptions,
  integrated: int,
  **common: Any,
) -> dict[str, _MapCollector]:
  """Returns the wanted and possible ones of the maps of `Illustrations`."""
  if analysis.code is None:
    return {}
  best = analysis.code.top_indices
  many = options.grad_cam_per_bin
  made: dict[str, Callable[..., jax.Array]] = {}
  if many != 0 and subject.patch_codes is not None:
    made["patches"] = patch_codes.make_members(subject)
  if many != 0 and subject.attention is not None:
    made["attention"] = patch_codes.make_attention(subject)
  if None not in (subject.feature_maps, subject.bin_log_probabilities):
    if many != 0:
      made["grad_cam"] = attribution.make_grad_cam(subject)
    if integrated:
      made["integrated"] = attribution.make_integrated_gradients(subject)
  fine = (_FINE_SIZE, _FINE_SIZE)
  return {
    name: _MapCollector(
      subject,
      compiled,
      best[..., : integrated if name == "integrated" else many],
      room=_ROOM.get(name, _ROOM["default"]),
      size=fine if name == "integrated" else None,
      **common,
    )
    for name, compiled in made.items()
  }


def _num_integrated(
  options: ExplainOptions,
  analysis: Analysis,
  num_pixels: int,
  mesh: Mesh,
  report: Callable[[str], None],
) -> int:
  """Returns how many images of each bin get integrated gradients."""
  if options.integrated_per_bin is not None:
    return options.integrated_per_bin
  if analysis.code is None or mesh.devices.flat[0].platform != "cpu":
    return _INTEGRATED
  affordable = _MAX_PIXELS_ON_CPU // (analysis.code.usage.size * num_pixels)
  if affordable >= _INTEGRATED:
    return _INTEGRATED
  few = (
    f"Integrated gradients of {counted(affordable, 'image')} of each bin"
    if affordable
    else "No integrated gradients"
  )
  report(
    f"{few}, because this is a CPU; --integrated_per_bin={_INTEGRATED} makes"
    " more."
  )
  return affordable


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
  batches = iter(batches)
  first = next(batches)
  height, width = first["image"].shape[1:3]
  integrated = _num_integrated(options, analysis, height * width, mesh, report)
  meter = console.Progress("pictures", None, unit="pictures", report=report)
  collectors = _collectors(
    subject, analysis, options, integrated, mesh=mesh, done=meter.add
  )
  num_maps = sum(collector.count for collector in collectors.values())
  meter.expect(analysis.num_images + num_maps)
  kept: dict[int, np.ndarray] = {}
  shrink = _shrinker(size)
  for batch in itertools.chain([first], batches):
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
