"""Codes of single patches, and how well they cover an object.

A patch's code is the projector's output for the features of that position
alone, while the projector was trained, and its batch norms took their
statistics, on features pooled over an image. So the code of a patch says which
bin an image would have that looked like this patch everywhere.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base import console, devices
from imsvd_jax.explain.analysis import Patches
from imsvd_jax.explain.images import Batches, padded_batches
from imsvd_jax.explain.subject import Subject


def make_members(subject: Subject) -> Callable[..., jax.Array]:
  """Compiles which patches of an image are in a bin.

  Returns:
    (model variables, images [U, H, W, C], rows [B], variables [B], bins [B]) ->
    [B, h, w] float32, 1 where the most probable bin of a patch of image rows[i]
    is bin i.
  """
  codes = subject.patch_codes
  assert codes is not None

  @jax.jit
  def members(
    weights: Any,
    images: jax.Array,
    rows: jax.Array,
    variables: jax.Array,
    bins: jax.Array,
  ) -> jax.Array:
    found = jnp.moveaxis(codes(weights, images), 3, 1)  # [U, M, h, w]
    chosen = found[rows, variables]
    return (chosen == bins[:, None, None]).astype(jnp.float32)

  return members


def make_attention(subject: Subject) -> Callable[..., jax.Array]:
  """Compiles the attention of images, whatever the variable and the bin.

  Returns:
    A function as of `make_members`, -> [B, h, w].
  """
  attention = subject.attention
  assert attention is not None
  return jax.jit(
    lambda weights, images, rows, *_: attention(weights, images)[rows]
  )


def pixels_in_patches(
  objects: np.ndarray, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the pixels of an object in each patch, and of each patch.

  Args:
    objects: [B, H, W], 1 on the object, 0 elsewhere, or between.
    grid: (h, w), patches along each side, at most (H, W).

  Returns:
    [B, h * w] and [h * w], where a pixel is in the patch that holds its center.
  """
  rows, columns = (
    np.ceil(np.arange(n) * side / n - 0.5).astype(int)
    for n, side in zip(grid, objects.shape[1:], strict=True)
  )
  add = lambda x: np.add.reduceat(np.add.reduceat(x, rows, 1), columns, 2)
  flat = lambda x: add(x.astype(np.float32)).reshape(len(x), -1)
  return flat(objects), flat(np.ones_like(objects[:1]))[0]


def overlaps(
  bins: jax.Array, inside: jax.Array, areas: jax.Array, num_bins: int
) -> jax.Array:
  """Returns IoU [B, M, b] of the patches in each bin with the object.

  Args:
    bins: int [B, h, w, M], the code of each patch.
    inside: [B, h * w], pixels of the object in each patch.
    areas: [h * w], pixels of each patch.
    num_bins: b.
  """
  member = jax.nn.one_hot(bins.reshape(*inside.shape, -1), num_bins)
  both = jnp.einsum("bpmd,bp->bmd", member, inside)
  covered = jnp.einsum("bpmd,p->bmd", member, areas)
  return both / (covered + inside.sum(1)[:, None, None] - both)


def limits(inside: np.ndarray, areas: np.ndarray) -> np.ndarray:
  """Returns [B, 2], IoU of all patches, and of the best choice of patches.

  The best choice takes the patches that the object fills most, so many that
  the IoU is largest. Arguments as of `overlaps`.
  """
  order = np.argsort(-inside / areas, axis=1)
  both = np.cumsum(np.take_along_axis(inside, order, 1), 1)
  iou = both / (np.cumsum(areas[order], 1) + both[:, -1:] - both)
  return np.stack([iou[:, -1], iou.max(1)], 1)


def measure(
  subject: Subject,
  batches: Batches,
  shape: tuple[int, int],
  *,
  count: int,
  mesh: Mesh,
  what: str,
  report: Callable[[str], None] = console.print_line,
) -> Patches:
  """Compares patch codes of (M, b) = `shape` with the masks of objects.

  Args:
    subject: Has patch codes.
    batches: As of `Images.masked`.
    shape: (M, b).
    count: Images.
    mesh: Devices.
    what: What the progress is called.
    report: Takes lines of progress.
  """
  codes = subject.patch_codes
  assert codes is not None
  codes_of = jax.jit(codes)
  iou_of = jax.jit(overlaps, static_argnums=3)
  weights = jax.device_put(subject.variables, devices.replicated(mesh))
  sums, edges, seen = np.zeros((2, *shape)), np.zeros((2, 2)), np.zeros(2)
  meter = console.Progress(what, count, report=report)
  for batch in padded_batches(batches, mesh.size):
    images = jax.device_put(batch["image"], devices.batch_sharded(mesh))
    bins = codes_of(weights, images)
    objects = batch["object"].mean(-1) / 255
    inside, areas = pixels_in_patches(objects, bins.shape[1:3])
    iou = np.asarray(iou_of(bins, inside, areas, shape[1]), np.float64)
    for half in range(2):
      # An object may be outside of the part that is seen.
      rows = (batch["index"] % 2 == half) & batch["mask"]
      rows &= inside.sum(1) > 0
      sums[half] += iou[rows].sum(0)
      edges[half] += limits(inside[rows], areas).sum(0)
      seen[half] += rows.sum()
    meter.add(int(batch["mask"].sum()))
  meter.finish()
  seen = np.maximum(seen, 1)
  return Patches(sums / seen[:, None, None], edges / seen[:, None])


def best(iou: np.ndarray) -> tuple[int, int, float]:
  """Returns variable and bin of the best IoU of one half, and the other's.

  The choice is that of the first half of `Patches.patch_iou`.
  """
  m, d = np.unravel_index(int(iou[0].argmax()), iou[0].shape)
  return int(m), int(d), float(iou[1, m, d])


def lines(patches: Patches) -> list[str]:
  """Returns the comparison as text."""
  m, d, iou = best(patches.patch_iou)
  everything, most = patches.patch_limits[1]
  beside = f"all patches {everything:.2f}, the best choice of them {most:.2f}"
  if patches.patch_iou_untrained is not None:
    random = best(patches.patch_iou_untrained)[2]
    beside = f"random weights {random:.2f}, {beside}"
  return [
    "Mean IoU of the patches in one bin with the object; the bin is chosen on"
    " one half of the images and measured on the other",
    f"  v{m}, bin {d}  {iou:.2f}  ({beside})",
  ]
