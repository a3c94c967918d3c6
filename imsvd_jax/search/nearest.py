"""Nearest neighbors by features, with faiss.

faiss gets arrays and never a file: its reader trusts what it reads, and an
index may come from a stranger. Small indices are searched exactly. Large ones
are cut into clusters, which `build` computes, and a query looks into some.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import in_place_when_done, printable
from imsvd_jax.explain.images import some_of
from imsvd_jax.formats import untrusted
from imsvd_jax.search.store import Store, damaged

EXACT_ROWS = 20_000
NUM_PROBES = 128  # Clusters that a query looks into.
_CLUSTERS = "clusters.npz"
_POINTS_PER_CLUSTER = 40  # That k-means sees.
_GROWTH = 4  # New clusters for an index that is so many times larger.
_CHUNK = 16_384


def load_faiss() -> Any:
  """Returns the module faiss.

  Raises:
    UserError: It is not installed.
  """
  try:
    import faiss
  except ImportError as error:
    raise UserError(
      'imsvd search needs the package faiss: pip install "imsvd_jax[search]".'
    ) from error
  return faiss


class Nearest:
  """Finds the rows whose features are most like given ones."""

  def __init__(self, store: Store, num_probes: int = NUM_PROBES) -> None:
    """Reads the vectors of an index into memory.

    Raises:
      UserError: The index is damaged, or faiss is missing.
    """
    if not len(store.rows):
      raise UserError(
        f"The index {printable(store.folder)} has no images; the build was"
        " stopped before the first ones. Build it again."
      )
    self._rows = store.rows
    clusters = read_clusters(store)
    if len(store.rows) <= EXACT_ROWS or clusters is None:
      self._index = _exact(store)
    else:
      self._index = _clustered(store, *clusters, num_probes)

  def search(
    self, vectors: np.ndarray, count: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns cosines float32 [Q, k] and rows int64 [Q, k], the best first.

    Args:
      vectors: float32 [Q, F], of norm 1.
      count: k; where there are fewer, rows are -1.
    """
    queries = np.ascontiguousarray(vectors, np.float32)
    cosines, places = self._index.search(queries, count)
    return cosines, np.where(places < 0, -1, self._rows[places])


def _exact(store: Store) -> Any:
  faiss = load_faiss()
  index = faiss.IndexScalarQuantizer(
    store.layout.num_features,
    faiss.ScalarQuantizer.QT_fp16,
    faiss.METRIC_INNER_PRODUCT,
  )
  for start in range(0, len(store.rows), _CHUNK):
    rows = store.rows[start : start + _CHUNK]
    index.add(store.vectors[rows].astype(np.float32))
  return index


def _clustered(
  store: Store, centers: np.ndarray, assigned: np.ndarray, num_probes: int
) -> Any:
  faiss = load_faiss()
  num_features, metric = store.layout.num_features, faiss.METRIC_INNER_PRODUCT
  quantizer = faiss.IndexFlat(num_features, metric)
  quantizer.add(centers)
  half = faiss.ScalarQuantizer.QT_fp16
  index = faiss.IndexIVFScalarQuantizer(
    quantizer, num_features, len(centers), half, metric, False
  )
  index.own_fields = False
  index.referenced_objects = [quantizer]  # Kept as long as the index.
  order = np.argsort(assigned, kind="stable")
  firsts = np.searchsorted(assigned[order], np.arange(len(centers) + 1))
  for cluster in range(len(centers)):
    places = order[firsts[cluster] : firsts[cluster + 1]].astype(np.int64)
    # The rows are what faiss would store: nothing is encoded again.
    codes = np.ascontiguousarray(store.vectors[store.rows[places]])
    if len(places):
      index.invlists.add_entries(
        cluster,
        len(places),
        faiss.swig_ptr(places),
        faiss.swig_ptr(codes.view(np.uint8)),
      )
  index.is_trained, index.ntotal = True, len(store.rows)
  index.nprobe = min(num_probes, len(centers))
  return index


# --- Clusters -----------------------------------------------------------------


def read_clusters(store: Store) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns the centers float32 [K, F] and the cluster int32 of each row.

  None if there are none, or they are those of other rows: a build was stopped.

  Raises:
    UserError: The file is damaged.
  """
  found = _read(store)
  if found is None or len(found[1]) != len(store.rows):
    return None
  return found


def _read(store: Store) -> tuple[np.ndarray, np.ndarray] | None:
  path = os.path.join(store.folder, _CLUSTERS)
  if not os.path.isfile(path):
    return None
  with untrusted.reading(path, "file of clusters"):
    untrusted.check_archive(path)
    with np.load(path, allow_pickle=False) as file:
      centers, assigned = file["centers"], file["assigned"]
  good = (
    centers.dtype == np.float32
    and centers.ndim == 2
    and centers.shape[1] == store.layout.num_features
    and len(centers)
    and np.isfinite(centers).all()
    and assigned.dtype == np.int32
    and assigned.ndim == 1
    and len(assigned)
    and 0 <= assigned.min() <= assigned.max() < len(centers)
  )
  if not good:
    raise damaged(store.folder, f"{_CLUSTERS} does not fit")
  return centers, assigned


def write_clusters(store: Store) -> None:
  """Computes the clusters of an index; for a larger one adds the new rows."""
  count = len(store.rows)
  if count <= EXACT_ROWS or read_clusters(store) is not None:
    return
  known = _read(store)
  if known is None or count > _GROWTH * len(known[1]):
    centers = _centers(store)
  else:
    centers = known[0]
  assigned = _assigned(store, centers)
  path = os.path.join(store.folder, _CLUSTERS)
  with in_place_when_done(path) as unfinished, open(unfinished, "wb") as file:
    np.savez(file, centers=centers, assigned=assigned)


def _centers(store: Store) -> np.ndarray:
  faiss = load_faiss()
  num_clusters = int(2 * len(store.rows) ** 0.5)
  chosen = some_of(store.rows, _POINTS_PER_CLUSTER * num_clusters)
  console.print_line(f"Computing {num_clusters} clusters of {len(chosen)} rows")
  means = faiss.Kmeans(
    store.layout.num_features, num_clusters, niter=8, spherical=True, seed=0
  )
  means.train(store.vectors[chosen].astype(np.float32))
  return means.centroids


def _assigned(store: Store, centers: np.ndarray) -> np.ndarray:
  faiss = load_faiss()
  quantizer = faiss.IndexFlatIP(store.layout.num_features)
  quantizer.add(centers)
  progress = console.Progress("Clusters", len(store.rows), unit="rows")
  found = np.empty(len(store.rows), np.int32)
  for start in range(0, len(found), _CHUNK):
    rows = store.rows[start : start + _CHUNK]
    vectors = store.vectors[rows].astype(np.float32)
    found[start : start + _CHUNK] = quantizer.search(vectors, 1)[1][:, 0]
    progress.add(len(rows))
  return found
