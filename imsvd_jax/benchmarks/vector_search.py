"""Time, memory and recall of the index of `imsvd search` on drawn vectors."""

import os
import tempfile
import time
from typing import Any

import numpy as np

from imsvd_jax.benchmarks.text import Findings
from imsvd_jax.search import nearest
from imsvd_jax.search.store import DIGEST, Layout, Rows, Store, open_to_append

_NUM_NEIGHBORS = 10
_NUM_QUERIES = 200
_DIMENSION = 32  # Of what the vectors are functions of.
_PROBES = (16, 32, 64, 128, 256)
_CHUNK = 20_000


def benchmark(num_vectors: int, num_features: int) -> Findings:
  """Builds an index and searches it with one thread.

  Args:
    num_vectors: N.
    num_features: F.

  Returns:
    Seconds of the build, bytes of a row, and for each number of clusters that a
    query looks into the time of a query (of the processor) and recall@10.
  """
  with tempfile.TemporaryDirectory() as folder:
    start = time.monotonic()
    _fill(folder, num_vectors, num_features)
    filled = time.monotonic()
    store = Store(folder)
    nearest.write_clusters(store)
    seconds = {
      "rows": filled - start,
      "clusters": time.monotonic() - filled,
    }
    size = sum(
      os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder)
    )
    nearest.load_faiss().omp_set_num_threads(1)
    queries = _vectors(_NUM_QUERIES, num_features, seed=1 << 40)
    wanted = _exact(store, queries)
    rows = [_measured(store, queries, wanted, n) for n in _PROBES]
  numbers = {
    "vectors": num_vectors,
    "features": num_features,
    "build_seconds": seconds,
    "bytes_per_row": size / num_vectors,
    "searches": rows,
  }
  return Findings(_table(numbers), numbers)


def _vectors(count: int, num_features: int, seed: int) -> np.ndarray:
  """Returns vectors of norm 1: a random network of 32 random numbers.

  Features of real images lie near such surfaces; independent numbers would have
  no neighbors to find.
  """
  fixed = np.random.default_rng(0)
  hidden = fixed.standard_normal((_DIMENSION, 256), np.float32)
  last = fixed.standard_normal((256, num_features), np.float32)
  drawn = np.random.default_rng(seed).standard_normal(
    (count, _DIMENSION), np.float32
  )
  found = np.maximum(drawn @ hidden, 0) @ last
  found -= found.mean(axis=1, keepdims=True)
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def _fill(folder: str, num_vectors: int, num_features: int) -> None:
  layout = Layout(num_features, 0, 0, "drawn")
  with open_to_append(folder, layout) as writer:
    for start in range(0, num_vectors, _CHUNK):
      count = min(_CHUNK, num_vectors - start)
      digests: np.ndarray = np.zeros((count, DIGEST), np.uint8)
      writer.append(
        Rows(
          vectors=_vectors(count, num_features, seed=start),
          codes=np.zeros((count, 0), np.uint8),
          contents=digests,
          keys=digests,
          stamps=digests,
          names=[b""] * count,
          thumbnails=[b""] * count,
        )
      )


def _exact(store: Store, queries: np.ndarray) -> np.ndarray:
  """Returns the true neighbors int64 [Q, k] of what the index holds."""
  best = np.full((len(queries), _NUM_NEIGHBORS), -np.inf, np.float32)
  rows: np.ndarray = np.full(best.shape, -1, np.int64)
  for start in range(0, store.count, _CHUNK):
    part = store.vectors[start : start + _CHUNK].astype(np.float32)
    cosines = np.concatenate([best, queries @ part.T], axis=1)
    new = np.arange(start, start + len(part))
    both = np.concatenate([rows, np.tile(new, (len(queries), 1))], axis=1)
    order = np.argpartition(-cosines, _NUM_NEIGHBORS)[:, :_NUM_NEIGHBORS]
    best = np.take_along_axis(cosines, order, 1)
    rows = np.take_along_axis(both, order, 1)
  return rows


def _measured(
  store: Store, queries: np.ndarray, wanted: np.ndarray, num_probes: int
) -> dict[str, Any]:
  start = time.monotonic()
  index = nearest.Nearest(store, num_probes)
  opened = time.monotonic() - start
  index.search(queries[:1], _NUM_NEIGHBORS)
  start = time.thread_time()
  # One by one: a person asks one question.
  found = [index.search(q[None], _NUM_NEIGHBORS)[1][0] for q in queries]
  seconds = (time.thread_time() - start) / len(queries)
  hits = [
    len(set(one) & set(true)) for one, true in zip(found, wanted, strict=True)
  ]
  return {
    "clusters_looked_into": num_probes,
    "open_seconds": opened,
    "query_milliseconds": 1000 * seconds,
    "recall": float(np.mean(hits)) / _NUM_NEIGHBORS,
  }


def _table(numbers: dict[str, Any]) -> str:
  build = numbers["build_seconds"]
  lines = [
    f"{numbers['vectors']} vectors of {numbers['features']} numbers: written in"
    f" {build['rows']:.0f} s, clustered in {build['clusters']:.0f} s,"
    f" {numbers['bytes_per_row']:.0f} bytes each.",
    "",
    "| clusters looked into | opens in s | ms per query | recall@10 |",
    "|---|---|---|---|",
  ]
  lines += [
    f"| {row['clusters_looked_into']} | {row['open_seconds']:.1f}"
    f" | {row['query_milliseconds']:.2f} | {row['recall']:.3f} |"
    for row in numbers["searches"]
  ]
  return "\n".join(lines)
