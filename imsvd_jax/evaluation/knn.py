"""Weighted k-nearest-neighbor classification, streamed in blocks.

The vote for class c on a query x is the sum of exp(cos(x, y) / T) over those
of its k nearest bank images y that have class c; nearest is by cosine.

The similarity matrix is never built: blocks of the bank visit the devices,
which hold the queries and the best k so far of each. Device memory is that of
the queries, one bank block and one tile, and does not grow with the bank.

Ties are broken by rule, so that results do not depend on blocks or devices: of
equally near neighbors the one earlier in the bank is taken; of classes with
equal votes the lower number comes first; a class without a neighbor is never
predicted, so fewer than five classes may be in the top five. A zero feature
has cosine 0 with everything.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from imsvd_jax.base import console
from imsvd_jax.base import devices as devices_lib
from imsvd_jax.base.devices import AXIS, pad_rows
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import input_checks, protocols, scores
from imsvd_jax.evaluation.features import Features, in_blocks
from imsvd_jax.evaluation.inputs import Evaluator, Inputs

# Cosines float32 and bank indices int32 of the best k, nearest first.
Best = tuple[jax.Array, jax.Array]


def run(inputs: Inputs, protocol: protocols.Knn) -> Iterator[tuple[str, float]]:
  """Yields the headline and "k20_T0.07/top1" and the like per (k, T)."""
  train, test = inputs.need("train", "test")
  ranks = knn_ranks(train, test, protocol)
  results = {pair: scores.accuracy(values) for pair, values in ranks.items()}
  first = next(iter(results.values()))
  yield from scores.headline(first, max(r.top1 for r in results.values()))
  for (k, temperature), result in results.items():
    yield f"k{k}_T{temperature:g}/top1", result.top1
    yield f"k{k}_T{temperature:g}/top5", result.top5


def knn_ranks(
  train: Features, test: Features, protocol: protocols.Knn
) -> dict[tuple[int, float], np.ndarray]:
  """Returns the place of each test image's own class in the vote, per (k, T).

  The N images of `train`, the bank, vote on the Q of `test`; features are
  L2-normalized here.

  Returns:
    int32 [Q] per pair: 0 for a right prediction; the number of classes where
    no neighbor has the image's class.

  Raises:
    UserError: Features, labels or k are unusable.
  """
  bank, bank_labels, queries, query_labels, num_classes = (
    input_checks.check_splits(train, test)
  )
  _check_bank(protocol, len(bank))
  neighbor_counts = sorted(set(protocol.num_neighbors))
  similarities, indices = nearest_neighbors(
    bank, queries, num_neighbors=neighbor_counts[-1]
  )
  ranks_of = functools.partial(
    vote,
    temperatures=np.asarray(protocol.temperatures, np.float32),
    num_neighbors=tuple(neighbor_counts),
    num_classes=num_classes,
  )
  labels = bank_labels[indices]
  ranks = in_blocks(ranks_of, 1024, similarities, labels, query_labels)
  return {
    (k, temperature): ranks[neighbor_counts.index(k), j]  # Of [K, T, Q].
    for k in protocol.num_neighbors
    for j, temperature in enumerate(protocol.temperatures)
  }


def nearest_neighbors(
  bank: np.ndarray,
  queries: np.ndarray,
  *,
  num_neighbors: int,
  bank_block: int = 4096,
  query_block: int = 512,
  devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the nearest bank images of each query by cosine, nearest first.

  Args:
    bank: Features [N, F], finite.
    queries: Features [Q, F], finite.
    num_neighbors: k, at most N.
    bank_block: How many bank images visit the devices at once.
    query_block: How many queries a device compares with them at once.
    devices: Where to compute; this process's devices unless given.

  Returns:
    Cosines float32 [Q, k] and bank indices int32 [Q, k].
  """
  mesh = devices_lib.make_mesh(list(devices or jax.local_devices()))
  num_queries, bank_block = len(queries), min(bank_block, len(bank))
  query_block = min(query_block, -(-num_queries // mesh.size))
  tiles = _tiled(_normalized(queries), query_block, mesh)  # [tiles, q, F]
  shape = (*tiles.shape[:2], num_neighbors)
  nothing = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32)
  best = jax.device_put(nothing, tiles.sharding)
  meter = console.Progress("k-NN", len(bank))
  for start in range(0, len(bank), bank_block):
    block = _normalized(bank[start : start + bank_block])
    count = len(block)
    block = pad_rows(block, bank_block)
    block = jax.device_put(block, devices_lib.replicated(mesh))
    best = merge_block(best, tiles, block, start, count, mesh=mesh)
    # One block ahead is enough; without waiting the whole bank would queue up.
    jax.block_until_ready(best)
    meter.add(count)
  similarities, indices = (
    np.asarray(part).reshape(-1, num_neighbors)[:num_queries] for part in best
  )
  return similarities, indices


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def merge_block(
  best: Best,
  tiles: jax.Array,
  block: jax.Array,
  start: jax.Array,
  count: jax.Array,
  *,
  mesh: Mesh,
) -> Best:
  """Updates the best k of every query with one block of the bank.

  Args:
    best: So far, both [tiles, q, k].
    tiles: Normalized queries [tiles, q, F], the tiles sharded over devices.
    block: Normalized bank images [n, F], padded.
    start: Bank index of the block's first image.
    count: How many images of the block are not padding.
    mesh: One axis, over which the tiles are sharded.
  """

  def merge_tile(tile: tuple[jax.Array, jax.Array, jax.Array]) -> Best:
    similarities, indices, queries = tile
    tile_similarities = jnp.matmul(
      queries, block.T, precision=jax.lax.Precision.HIGHEST
    )  # [q, n]
    column = jnp.arange(block.shape[0], dtype=jnp.int32)
    tile_similarities = jnp.where(column < count, tile_similarities, -jnp.inf)
    # Earlier images stand first, and top_k prefers the first of equals. It is
    # also quicker so: on a CPU it starts from the best and finds few better,
    # where a top_k of each block and a merge take half as long again.
    candidates = jnp.concatenate([similarities, tile_similarities], axis=1)
    similarities, places = jax.lax.top_k(candidates, similarities.shape[1])
    columns = jnp.broadcast_to(start + column, tile_similarities.shape)
    candidates = jnp.concatenate([indices, columns], axis=1)
    return similarities, jnp.take_along_axis(candidates, places, axis=1)

  def merge_shard(best: Best, tiles: jax.Array) -> Best:
    return jax.lax.map(merge_tile, (*best, tiles))

  return jax.shard_map(
    merge_shard, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS)
  )(best, tiles)


def _check_bank(protocol: protocols.Knn, bank_size: int) -> None:
  """Raises UserError unless every k fits the bank."""
  k = max(protocol.num_neighbors)
  if k > bank_size:
    raise UserError(
      f"k-NN with k = {k} over a bank of {bank_size} images; expected "
      f"1 <= k <= {bank_size}: choose a smaller k or a larger bank."
    )


def _normalized(features: np.ndarray) -> np.ndarray:
  """Returns rows of length one; zero rows stay zero."""
  # In float64, where no square of a float32 overflows; NumPy converts a few
  # rows at a time, so that no float64 copy of all is made.
  norms = np.sqrt(np.einsum("nf,nf->n", features, features, dtype=np.float64))
  norms = np.where(norms > 0, norms, 1)[:, None]
  return np.divide(
    features, norms, out=np.empty_like(features), casting="same_kind"
  )


def _tiled(queries: np.ndarray, query_block: int, mesh: Mesh) -> jax.Array:
  """Pads queries [Q, F] into tiles [tiles, query_block, F] over the mesh."""
  count = len(queries) + -len(queries) % (query_block * mesh.size)
  tiles = pad_rows(queries, count).reshape(-1, query_block, queries.shape[1])
  return jax.device_put(tiles, devices_lib.batch_sharded(mesh))


@functools.partial(jax.jit, static_argnames=("num_neighbors", "num_classes"))
def vote(
  similarities: jax.Array,
  neighbor_labels: jax.Array,
  query_labels: jax.Array,
  temperatures: jax.Array,
  *,
  num_neighbors: tuple[int, ...],
  num_classes: int,
) -> jax.Array:
  """Lets the neighbors vote, nearest first, and ranks the true classes.

  Args:
    similarities: Cosines [Q, k], descending.
    neighbor_labels: int32 [Q, k].
    query_labels: int32 [Q].
    temperatures: float32 [T].
    num_neighbors: Values of k, ascending, the last at most the array's.
    num_classes: C.

  Returns:
    int32 [K, T, Q]: the place of the query's class; C where it has no vote.
  """
  rows = jnp.arange(query_labels.shape[0])
  # A common factor per query changes no order and cannot overflow.
  advantage = similarities - similarities[:, :1]
  weights = jnp.exp(advantage / temperatures[:, None, None])  # [T, Q, k]

  # Adding one neighbor at a time fixes the order of summation, so that equal
  # votes are equal on every device; it also gives each smaller k on the way.
  def add_neighbor(
    j: jax.Array, state: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    votes, voted = state
    label = neighbor_labels[:, j]
    return (
      votes.at[:, rows, label].add(weights[:, :, j]),
      voted.at[rows, label].set(True),
    )

  shape = (query_labels.shape[0], num_classes)
  state = (
    jnp.zeros((temperatures.shape[0], *shape), jnp.float32),
    jnp.zeros(shape, bool),
  )
  ranks, done = [], 0
  for k in num_neighbors:
    state = jax.lax.fori_loop(done, k, add_neighbor, state)
    votes, voted = state
    ranks.append(_vote_ranks(votes, voted, query_labels))
    done = k
  return jnp.stack(ranks)


def _vote_ranks(
  votes: jax.Array, voted: jax.Array, query_labels: jax.Array
) -> jax.Array:
  """Ranks the true class [T, Q] from votes [T, Q, C] and voted [Q, C]."""
  rows, num_classes = jnp.arange(query_labels.shape[0]), voted.shape[1]
  own = votes[:, rows, query_labels][..., None]
  lower = jnp.arange(num_classes) < query_labels[:, None]  # [Q, C]
  ahead = (votes > own) | ((votes == own) & voted & lower)
  ranks = ahead.sum(axis=-1, dtype=jnp.int32)
  return jnp.where(voted[rows, query_labels], ranks, num_classes)


EVALUATOR = Evaluator(run, needs=("train", "test"), check=_check_bank)
