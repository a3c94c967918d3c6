"""Sums over a data set, on the devices, that keep their digits.

A float32 sum over a million images loses three to four digits. Every sum here
is a pair (total, error): the rounding error of each addition is computed
exactly (Knuth's two-sum) and carried along, which doubles the precision for
the price of a second array. Products of a batch are formed in short chunks at
the highest matmul precision for the same reason.

Matrices have their rows spread over the devices: with P devices each keeps
1/P of the D x D joint matrix and of the top-n lists, so that nothing of size
D^2 crosses the network and nothing of that size is held twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imsvd_jax.explain.subject import Encoding

AXIS = "data"
# Rows of one matmul. Measured on CPU: a product over 256 rows errs by 1e-6
# relative in its worst cell, one over 64 rows by half of that.
CHUNK = 64
# Probabilities are ranked to 1.5e-5. Where a bin is certain (q = 1 - 1e-7),
# rounding noise would otherwise choose the images, differently on another
# batch size; equal scores go by the lower index.
SCORE_STEPS = 2.0**16
NO_IMAGE = np.int32(np.iinfo(np.int32).max)


class Sums(NamedTuple):
  """A compensated sum; its value is total + error."""

  total: jax.Array
  error: jax.Array

  def value(self) -> np.ndarray:
    """The sum as float64, on the host."""
    total = np.asarray(self.total, np.float64)
    return total + np.asarray(self.error, np.float64)


class State(NamedTuple):
  """What is carried from batch to batch.

  D = M * b; rows of D and F are padded to a multiple of the device count.

  Attributes:
    count: [] int32, images so far.
    invalid: [] int32, images with a value that is not finite.
    vectors: Sums of [D] or [M], replicated.
    matrices: Sums of [D, D] or [F, F], rows over devices.
    top_scores: [D, n], the n largest probabilities of each bin, rounded to
      1 / SCORE_STEPS; -1: none.
    top_indices: [D, n] int32, their images.
    feature_shift: [F], subtracted from features before they are squared.
  """

  count: jax.Array
  invalid: jax.Array
  vectors: dict[str, Sums]
  matrices: dict[str, Sums]
  top_scores: jax.Array
  top_indices: jax.Array
  feature_shift: jax.Array


class PerImage(NamedTuple):
  """What is read back for each image of a batch.

  Attributes:
    codes: [B, M] uint8 or uint16, the most probable bin; ties: the lowest.
    features: [B, F] float32.
  """

  codes: jax.Array | None
  features: jax.Array


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-dimensional mesh over `devices` (all of this process's)."""
  devices = list(devices or jax.local_devices())
  return jax.make_mesh(
    (len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices
  )


def add(sums: Sums, update: jax.Array) -> Sums:
  """Adds `update` and the exact rounding error of doing so."""
  total = sums.total + update
  back = total - sums.total
  error = (sums.total - (total - back)) + (update - back)
  return Sums(total, sums.error + error)


def add_product(sums: Sums, left: jax.Array, right: jax.Array) -> Sums:
  """Adds left^T right for [B, r] and [B, D], a few rows at a time."""
  batch = left.shape[0]
  pad = -batch % CHUNK
  left, right = (jnp.pad(x, ((0, pad), (0, 0))) for x in (left, right))
  chunks = (batch + pad) // CHUNK

  def body(sums, rows):
    return add(
      sums, jnp.matmul(rows[0].T, rows[1], precision=jax.lax.Precision.HIGHEST)
    ), None

  rows = tuple(x.reshape(chunks, CHUNK, -1) for x in (left, right))
  return jax.lax.scan(body, sums, rows)[0]


def merge_top(
  scores: jax.Array,
  indices: jax.Array,
  columns: jax.Array,
  column_indices: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Merges a batch into lists of the n best: high score, then low index.

  Args:
    scores: [r, n] so far.
    indices: [r, n] so far.
    columns: [r, B] scores of the batch, -1 where masked.
    column_indices: [B] int32, ascending (top_k then breaks ties as we do).

  Returns:
    The new (scores, indices).
  """
  num_top = scores.shape[1]
  best, place = jax.lax.top_k(columns, min(num_top, columns.shape[1]))
  best_indices = jnp.where(best < 0, NO_IMAGE, column_indices[place])
  keys = (
    -jnp.concatenate([scores, best], 1),
    jnp.concatenate([indices, best_indices], 1),
  )
  negative, merged = jax.lax.sort(keys, dimension=1, num_keys=2)
  return -negative[:, :num_top], merged[:, :num_top]


def _pairs(rows: int, columns: int | None = None) -> Sums:
  shape = (rows,) if columns is None else (rows, columns)
  return Sums(np.zeros(shape, np.float32), np.zeros(shape, np.float32))


class Accumulator:
  """Compiles and runs the pass for one encoder on one mesh."""

  def __init__(
    self,
    encode: Callable[[Any, jax.Array], Encoding],
    *,
    mesh: Mesh,
    num_top: int,
    joint: bool,
    covariance: bool,
    views: tuple[Callable, Callable] | None = None,
    key: jax.Array | None = None,
  ):
    self.encode = encode
    self.mesh = mesh
    self.num_top = num_top
    self.joint = joint
    self.covariance = covariance
    self.views = views
    self.key = jax.random.key(0) if key is None else key
    self._step = None

  def shapes(self, variables: Any, images: np.ndarray) -> Encoding:
    """The shapes of what `encode` returns, without computing it."""
    return jax.eval_shape(
      self.encode,
      variables,
      jax.ShapeDtypeStruct(images.shape, images.dtype),
    )

  def init(self, encoding: Encoding) -> State:
    """Zero sums for an encoder whose outputs have the given shapes."""
    devices = self.mesh.devices.size
    num_features = encoding.features.shape[1]
    vectors, matrices, dimension = {}, {}, 0
    if encoding.probabilities is not None:
      _, num_variables, num_bins = encoding.probabilities.shape
      dimension = num_variables * num_bins
      vectors |= {"marginal": _pairs(dimension)}
      vectors |= {"conditional_entropy": _pairs(num_variables)}
      vectors |= {"confidence": _pairs(num_variables)}
      rows = dimension + -dimension % devices
      if self.joint:
        matrices["joint"] = _pairs(rows, dimension)
      if self.views:
        vectors |= {"agreement": _pairs(num_variables)}
        vectors |= {"soft_agreement": _pairs(num_variables)}
        if self.joint:
          matrices["cross_joint"] = _pairs(rows, dimension)
    if self.covariance:
      rows = num_features + -num_features % devices
      matrices["feature_moment"] = _pairs(rows, num_features)
    vectors["feature"] = _pairs(num_features)
    top = (dimension + -dimension % devices, self.num_top)
    state = State(
      count=np.int32(0),
      invalid=np.int32(0),
      vectors=vectors,
      matrices=matrices,
      top_scores=np.full(top, -1, np.float32),
      top_indices=np.full(top, NO_IMAGE, np.int32),
      feature_shift=np.zeros(num_features, np.float32),
    )
    specs = self._specs(state)
    self._compile(specs)
    return jax.tree.map(
      lambda x, s: jax.device_put(x, NamedSharding(self.mesh, s)), state, specs
    )

  def _specs(self, state: State) -> State:
    replicated = lambda tree: jax.tree.map(lambda _: P(), tree)
    rows = lambda tree: jax.tree.map(lambda _: P(AXIS), tree)
    return State(
      count=P(),
      invalid=P(),
      vectors=replicated(state.vectors),
      matrices=rows(state.matrices),
      top_scores=P(AXIS),
      top_indices=P(AXIS),
      feature_shift=P(),
    )

  def _compile(self, specs: State) -> None:
    # check_vma=False: nothing here is differentiated, and the user's encode
    # need not be annotated.
    mapped = jax.shard_map(
      self._local_step,
      mesh=self.mesh,
      in_specs=(P(), specs, P(), P(AXIS), P(AXIS), P(AXIS)),
      out_specs=(specs, P(AXIS)),
      check_vma=False,
    )
    self._step = jax.jit(mapped, donate_argnums=1)

  def place(self, tree: Any) -> Any:
    """Copies weights to every device once, before the first step."""
    return jax.device_put(tree, NamedSharding(self.mesh, P()))

  def step(
    self,
    variables: Any,
    state: State,
    images: np.ndarray,
    indices: np.ndarray,
    mask: np.ndarray,
  ) -> tuple[State, PerImage]:
    """Adds one batch, whose indices ascend and whose size P divides."""
    sharded = NamedSharding(self.mesh, P(AXIS))
    batch = jax.device_put((images, indices.astype(np.int32), mask), sharded)
    return self._step(variables, state, self.key, *batch)

  def _local_step(self, variables, state, key, images, indices, mask):
    """One device's part: its images, and its rows of every matrix."""
    encoding = self.encode(variables, images)
    features = encoding.features.astype(jnp.float32)
    state = state._replace(
      count=state.count + jax.lax.psum(mask.sum(dtype=jnp.int32), AXIS)
    )
    state = self._add_features(state, features, mask)
    finite = jnp.isfinite(features).all(-1)
    codes = None
    if encoding.probabilities is not None:
      q = encoding.probabilities.astype(jnp.float32)
      finite &= jnp.isfinite(q).all((-2, -1))
      codes = self._codes(q)
      state = self._add_probabilities(state, q, indices, mask)
      if self.views:
        state = self._add_views(state, variables, key, images, indices, mask)
    invalid = jax.lax.psum((mask & ~finite).sum(dtype=jnp.int32), AXIS)
    state = state._replace(invalid=state.invalid + invalid)
    return state, PerImage(codes, features)

  def _codes(self, q):
    dtype = jnp.uint8 if q.shape[-1] <= 256 else jnp.uint16
    return jnp.argmax(q, -1).astype(dtype)

  def _own_rows(self, gathered, rows):
    """This device's `rows` of the columns of [B, D], padded with zeros."""
    devices = self.mesh.devices.size
    padded = jnp.pad(
      gathered, ((0, 0), (0, rows * devices - gathered.shape[1]))
    )
    start = jax.lax.axis_index(AXIS) * rows
    return jax.lax.dynamic_slice_in_dim(padded, start, rows, axis=1)

  def _add_gram(self, state, name, left, right):
    """Adds left^T right, both gathered over the devices, to a matrix."""
    left, right = (
      jax.lax.all_gather(x, AXIS, tiled=True) for x in (left, right)
    )
    sums = state.matrices[name]
    own = self._own_rows(left, sums.total.shape[0])
    return state._replace(
      matrices=state.matrices | {name: add_product(sums, own, right)}
    )

  def _add_vectors(self, state, mask, **values):
    """Adds each [B, k] over the images of all devices."""
    vectors = dict(state.vectors)
    for name, value in values.items():
      masked = jnp.where(mask[:, None], value, 0)
      vectors[name] = add(vectors[name], jax.lax.psum(masked.sum(0), AXIS))
    return state._replace(vectors=vectors)

  def _add_features(self, state, features, mask):
    # Squares of features far from zero would cancel in the covariance; any
    # constant near the mean does, so the first batch's mean is taken.
    total = jax.lax.psum(jnp.where(mask[:, None], features, 0).sum(0), AXIS)
    images = jax.lax.psum(mask.sum(dtype=jnp.int32), AXIS)
    first = state.count == images
    mean = total / jnp.maximum(images, 1).astype(jnp.float32)
    shift = jnp.where(first, mean, state.feature_shift)
    state = state._replace(feature_shift=shift)
    centred = jnp.where(mask[:, None], features - shift, 0)
    state = self._add_vectors(state, mask, feature=centred)
    if self.covariance:
      state = self._add_gram(state, "feature_moment", centred, centred)
    return state

  def _add_probabilities(self, state, q, indices, mask):
    flat = jnp.where(mask[:, None], q.reshape(q.shape[0], -1), 0)
    log_q = jnp.log(jnp.where(q > 0, q, 1))
    state = self._add_vectors(
      state,
      mask,
      marginal=flat,
      conditional_entropy=-(q * log_q).sum(-1),
      confidence=q.max(-1),
    )
    if self.joint:
      state = self._add_gram(state, "joint", flat, flat)
    rounded = jnp.round(flat * SCORE_STEPS) / SCORE_STEPS
    scores = jnp.where(mask[:, None], rounded, -1)
    gathered, indices = (
      jax.lax.all_gather(x, AXIS, tiled=True) for x in (scores, indices)
    )
    own = self._own_rows(gathered, state.top_scores.shape[0])
    scores, indices = merge_top(
      state.top_scores, state.top_indices, own.T, indices
    )
    return state._replace(top_scores=scores, top_indices=indices)

  def _add_views(self, state, variables, key, images, indices, mask):
    q1, q2 = (
      self.encode(
        variables, view(view_keys(key, indices, number), images)
      ).probabilities.astype(jnp.float32)
      for number, view in enumerate(self.views)
    )
    agreement = (jnp.argmax(q1, -1) == jnp.argmax(q2, -1)).astype(jnp.float32)
    state = self._add_vectors(
      state, mask, agreement=agreement, soft_agreement=(q1 * q2).sum(-1)
    )
    if not self.joint:
      return state
    flat = (
      jnp.where(mask[:, None], q.reshape(q.shape[0], -1), 0) for q in (q1, q2)
    )
    return self._add_gram(state, "cross_joint", *flat)


def view_keys(key: jax.Array, indices: jax.Array, number: int) -> jax.Array:
  """One key per image: a function of the key, the index and the view."""
  fold = lambda i: jax.random.fold_in(jax.random.fold_in(key, i), number)
  return jax.vmap(fold)(indices)
