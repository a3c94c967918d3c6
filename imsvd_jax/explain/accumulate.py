"""What is summed over the images, and over their views, batch by batch."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imsvd_jax.base.devices import AXIS, batch_sharded
from imsvd_jax.explain import sums as sums_lib
from imsvd_jax.explain.images import NO_IMAGE, Batch
from imsvd_jax.explain.subject import Encoding
from imsvd_jax.explain.sums import Sums

Encode = Callable[[Any, jax.Array], Encoding]

# Probabilities are ranked to 1.5e-5. Where a bin is certain (q = 1 - 1e-7),
# rounding noise would otherwise choose the images, differently for another
# batch size; of equal scores the lower index comes first.
SCORE_STEPS = 2.0**16


class FeatureSums(NamedTuple):
  """Sums of features [F]."""

  shift: jax.Array  # [F], subtracted from features before they are added.
  first: Sums  # Sums of [F].
  second: Sums | None  # Sums of [F, F], rows over devices; None: not asked for.


class CodeSums(NamedTuple):
  """Sums of the probabilities of M variables of b bins, D = M * b.

  Rows of D are padded to a multiple of the device count.
  """

  marginal: Sums  # Sums of [D].
  conditional_entropy: Sums  # Sums of [M].
  confidence: Sums  # Sums of [M].
  joint: Sums | None  # Sums of [D, D], rows over devices; None: not asked for.
  # [D, n], the n largest probabilities of each bin, rounded to 1 / SCORE_STEPS;
  # -1: none.
  top_scores: jax.Array
  top_indices: jax.Array  # [D, n] int32, their images.


class ImageSums(NamedTuple):
  """What is carried from batch to batch of images."""

  count: jax.Array  # [] int32, images so far.
  invalid: jax.Array  # [] int32, images with a value that is not finite.
  features: FeatureSums  # Of every encoder.
  code: CodeSums | None  # None for an encoder without discrete code.


class ViewSums(NamedTuple):
  """What is carried from batch to batch of two views."""

  count: jax.Array  # [] int32, images so far.
  agreement: Sums  # Sums of [M].
  soft_agreement: Sums  # Sums of [M].
  # Sums of [D, D], rows over devices; None: not asked for.
  cross_joint: Sums | None


class PerImage(NamedTuple):
  """What is read back for each image of a batch."""

  # [B, M] uint8 or uint16, the most probable bin; ties: the lowest.
  codes: jax.Array | None
  features: jax.Array  # [B, F] float32.


class Pass:
  """A pass over batches, compiled for one mesh.

  `add_batch` maps (variables, sums, pixels, indices, mask), each device's part
  of a batch, to (sums, what is read back per image). The sums start as `empty`.
  """

  def __init__(
    self,
    add_batch: Callable[..., tuple[Any, Any]],
    empty: Any,
    *,
    pixels: Literal["image", "views"],
    mesh: Mesh,
  ) -> None:
    self._pixels = pixels
    self._mesh = mesh
    self._empty = empty
    # The rows of matrices are spread over the devices.
    self._layout = jax.tree.map(
      lambda x: P(AXIS) if x.ndim == 2 else P(), empty
    )
    # check_vma=False: nothing here is differentiated, and the user's encode
    # need not be annotated.
    mapped = jax.shard_map(
      add_batch,
      mesh=mesh,
      in_specs=(P(), self._layout, P(AXIS), P(AXIS), P(AXIS)),
      out_specs=(self._layout, P(AXIS)),
      check_vma=False,
    )
    self._step = jax.jit(mapped, donate_argnums=1)

  def start(self) -> Any:
    """Returns the empty sums on the devices."""
    place = lambda x, spec: jax.device_put(x, NamedSharding(self._mesh, spec))
    return jax.tree.map(place, self._empty, self._layout)

  def step(self, variables: Any, sums: Any, batch: Batch) -> tuple[Any, Any]:
    """Adds a batch from `images.padded_batches` to sums, which it consumes."""
    indices = batch["index"].astype(np.int32)
    arrays = batch[self._pixels], indices, batch["mask"]
    placed = jax.device_put(arrays, batch_sharded(self._mesh))
    return self._step(variables, sums, *placed)


def image_pass(
  encode: Encode,
  shapes: Encoding,
  *,
  mesh: Mesh,
  num_top: int,
  joint: bool,
  covariance: bool,
) -> Pass:
  """Returns the pass over images: sums `ImageSums`, per image `PerImage`.

  `shapes` are those of what `encode` returns; `num_top` is the number of best
  images of each bin.
  """

  def add_batch(
    variables: Any,
    sums: ImageSums,
    images: jax.Array,
    indices: jax.Array,
    mask: jax.Array,
  ) -> tuple[ImageSums, PerImage]:
    encoding = encode(variables, images)
    features = encoding.features.astype(jnp.float32)
    finite = jnp.isfinite(features).all(-1)
    codes = code = None
    if encoding.probabilities is not None and sums.code is not None:
      q = encoding.probabilities.astype(jnp.float32)
      finite &= jnp.isfinite(q).all((-2, -1))
      dtype = jnp.uint8 if q.shape[-1] <= 256 else jnp.uint16
      codes = jnp.argmax(q, -1).astype(dtype)
      code = _add_code(sums.code, q, indices, mask)
    added = ImageSums(
      count=sums.count + _number(mask),
      invalid=sums.invalid + _number(mask & ~finite),
      features=_add_features(sums.features, features, mask, sums.count == 0),
      code=code,
    )
    return added, PerImage(codes, features)

  width = shapes.features.shape[1]
  features = FeatureSums(
    shift=np.zeros(width, np.float32),
    first=sums_lib.zeros(width),
    second=sums_lib.zeros_of_rows(width, mesh) if covariance else None,
  )
  code = None
  if shapes.probabilities is not None:
    code = _no_code(shapes.probabilities.shape[1:], num_top, joint, mesh)
  empty = ImageSums(np.int32(0), np.int32(0), features, code)
  return Pass(add_batch, empty, pixels="image", mesh=mesh)


def view_pass(
  encode: Encode,
  augment: Callable[[jax.Array, jax.Array], jax.Array],
  shape: tuple[int, int],
  *,
  mesh: Mesh,
  joint: bool,
) -> Pass:
  """Returns the pass over pairs of views, which sums `ViewSums`.

  `augment` is that of `images.TwoViews`, and `shape` is (M, b).
  """

  def add_batch(
    variables: Any,
    sums: ViewSums,
    views: jax.Array,
    indices: jax.Array,
    mask: jax.Array,
  ) -> tuple[ViewSums, None]:
    q1, q2 = (
      _probabilities(encode(variables, pixels))
      for pixels in augment(views, indices)
    )
    same = (jnp.argmax(q1, -1) == jnp.argmax(q2, -1)).astype(jnp.float32)
    cross_joint = sums.cross_joint
    if cross_joint is not None:
      cross_joint = sums_lib.add_product_of_devices(
        cross_joint, _flat(q1, mask), _flat(q2, mask)
      )
    add_rows = sums_lib.add_rows_of_devices
    return ViewSums(
      count=sums.count + _number(mask),
      agreement=add_rows(sums.agreement, mask, same),
      soft_agreement=add_rows(sums.soft_agreement, mask, (q1 * q2).sum(-1)),
      cross_joint=cross_joint,
    ), None

  num_variables, num_bins = shape
  empty = ViewSums(
    count=np.int32(0),
    agreement=sums_lib.zeros(num_variables),
    soft_agreement=sums_lib.zeros(num_variables),
    cross_joint=sums_lib.zeros_of_rows(num_variables * num_bins, mesh)
    if joint
    else None,
  )
  return Pass(add_batch, empty, pixels="views", mesh=mesh)


def _no_code(
  shape: tuple[int, int], num_top: int, joint: bool, mesh: Mesh
) -> CodeSums:
  num_variables, num_bins = shape
  dimension = num_variables * num_bins
  top = (sums_lib.padded_rows(dimension, mesh), num_top)
  return CodeSums(
    marginal=sums_lib.zeros(dimension),
    conditional_entropy=sums_lib.zeros(num_variables),
    confidence=sums_lib.zeros(num_variables),
    joint=sums_lib.zeros_of_rows(dimension, mesh) if joint else None,
    top_scores=np.full(top, -1, np.float32),
    top_indices=np.full(top, NO_IMAGE, np.int32),
  )


def _number(mask: jax.Array) -> jax.Array:
  """Returns how many are True on all devices."""
  return jax.lax.psum(mask.sum(dtype=jnp.int32), AXIS)


def _probabilities(encoding: Encoding) -> jax.Array:
  if encoding.probabilities is None:
    raise ValueError("Views are compared by a discrete code; there is none.")
  return encoding.probabilities.astype(jnp.float32)


def _flat(q: jax.Array, mask: jax.Array) -> jax.Array:
  """Returns [B, M, b] as [B, D], 0 where masked."""
  return jnp.where(mask[:, None], q.reshape(q.shape[0], -1), 0)


def _add_features(
  sums: FeatureSums, features: jax.Array, mask: jax.Array, is_first: jax.Array
) -> FeatureSums:
  # Squares of features far from zero would cancel in the covariance. Any
  # constant near the mean avoids that; it is the mean of the first batch.
  total = jax.lax.psum(jnp.where(mask[:, None], features, 0).sum(0), AXIS)
  mean = total / jnp.maximum(_number(mask), 1).astype(jnp.float32)
  shift = jnp.where(is_first, mean, sums.shift)
  centered = jnp.where(mask[:, None], features - shift, 0)
  second = sums.second
  if second is not None:
    second = sums_lib.add_product_of_devices(second, centered, centered)
  first = sums_lib.add_rows_of_devices(sums.first, mask, centered)
  return FeatureSums(shift, first, second)


def _add_code(
  sums: CodeSums, q: jax.Array, indices: jax.Array, mask: jax.Array
) -> CodeSums:
  flat = _flat(q, mask)
  log_q = jnp.log(jnp.where(q > 0, q, 1))
  joint = sums.joint
  if joint is not None:
    joint = sums_lib.add_product_of_devices(joint, flat, flat)
  rounded = jnp.round(flat * SCORE_STEPS) / SCORE_STEPS
  scores = sums_lib.gather(jnp.where(mask[:, None], rounded, -1))
  top_scores, top_indices = sums_lib.merge_top(
    sums.top_scores,
    sums.top_indices,
    sums_lib.own_columns(scores, sums.top_scores.shape[0]).T,
    sums_lib.gather(indices),
  )
  add_rows = sums_lib.add_rows_of_devices
  return CodeSums(
    marginal=add_rows(sums.marginal, mask, flat),
    conditional_entropy=add_rows(
      sums.conditional_entropy, mask, -(q * log_q).sum(-1)
    ),
    confidence=add_rows(sums.confidence, mask, q.max(-1)),
    joint=joint,
    top_scores=top_scores,
    top_indices=top_indices,
  )
