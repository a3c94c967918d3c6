"""Time and memory of k-NN here, in faiss, in scikit-learn, and all at once.

Every contender classifies the same queries, in a process of its own, so that
its peak memory is its own. All must agree.
"""

import concurrent.futures
import importlib.util
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks.text import Findings
from imsvd_jax.evaluation import knn, protocols
from imsvd_jax.evaluation.features import Features
from imsvd_jax.search import nearest

TEMPERATURE = 0.07


class Problem(NamedTuple):
  """A bank and queries of one hundred overlapping classes."""

  bank: np.ndarray  # float32 [N, F]
  bank_labels: np.ndarray  # int [N]
  queries: np.ndarray  # float32 [Q, F]
  query_labels: np.ndarray  # int [Q]
  num_neighbors: int


class Measurement(NamedTuple):
  """What one contender took, including compilation."""

  contender: str
  top1: float
  seconds: float
  cpu_seconds: float
  peak_mebibytes: float  # above what the process held before


def make_problem(
  num_bank: int, num_queries: int, num_features: int, num_neighbors: int
) -> Problem:
  """Returns classes that overlap, so that accuracy is well below one."""
  generator = np.random.default_rng(0)
  shape = (num_bank + num_queries, num_features)
  labels = generator.integers(0, 100, shape[0])
  features = generator.standard_normal(shape, dtype=np.float32)
  features *= 0.3 * num_features**0.5
  centers = generator.standard_normal((100, num_features), np.float32)
  for start in range(0, len(labels), 1000):
    # In parts: a temporary's peak would hide what a contender needs.
    features[start : start + 1000] += centers[labels[start : start + 1000]]
  return Problem(
    features[:num_bank],
    labels[:num_bank],
    features[num_bank:],
    labels[num_bank:],
    num_neighbors,
  )


def streamed(problem: Problem) -> float:
  """Top-1 accuracy by `knn_ranks`."""
  (ranks,) = knn.knn_ranks(
    Features(problem.bank, problem.bank_labels),
    Features(problem.queries, problem.query_labels),
    protocols.Knn((problem.num_neighbors,), (TEMPERATURE,)),
  ).values()
  return float((ranks == 0).mean())


def _scikit_learn(
  problem: Problem, metric: str, cosine: Callable[[np.ndarray], np.ndarray]
) -> float:
  model = KNeighborsClassifier(
    problem.num_neighbors,
    algorithm="brute",
    metric=metric,
    weights=lambda distance: np.exp(cosine(distance) / TEMPERATURE),
    n_jobs=-1,
  )
  model.fit(problem.bank, problem.bank_labels)
  return model.score(problem.queries, problem.query_labels)


def _scikit_learn_euclidean(problem: Problem) -> float:
  """Top-1 accuracy by scikit-learn's fastest brute force.

  Unit vectors have |x - y|^2 = 2 - 2 cos, and scikit-learn has a kernel of its
  own for euclidean distances.
  """
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  problem = problem._replace(
    bank=unit(problem.bank), queries=unit(problem.queries)
  )
  return _scikit_learn(problem, "euclidean", lambda d: 1 - d**2 / 2)


def _faiss(problem: Problem) -> float:
  """Top-1 accuracy with the neighbors that faiss's flat index finds."""
  faiss = nearest.load_faiss()  # Optional, see `benchmark`.
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosines, indices = faiss.knn(
    unit(problem.queries),
    unit(problem.bank),
    problem.num_neighbors,
    metric=faiss.METRIC_INNER_PRODUCT,
  )
  ranks = knn.vote(
    cosines,
    problem.bank_labels[indices],
    problem.query_labels,
    np.full(1, TEMPERATURE, np.float32),
    num_neighbors=(problem.num_neighbors,),
    num_classes=100,
  )
  return float((np.asarray(ranks) == 0).mean())


def dense(problem: Problem) -> float:
  """Top-1 accuracy by the formula: the whole similarity matrix at once."""

  @jax.jit
  def predict(
    bank: jax.Array, bank_labels: jax.Array, queries: jax.Array
  ) -> jax.Array:
    unit = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit(queries) @ unit(bank).T
    nearest, indices = jax.lax.top_k(cosines, problem.num_neighbors)
    weights = jnp.exp(nearest / TEMPERATURE)
    votes = jnp.zeros((len(queries), 100))
    rows = jnp.arange(len(queries))[:, None]
    return votes.at[rows, bank_labels[indices]].add(weights).argmax(axis=1)

  found = predict(problem.bank, problem.bank_labels, problem.queries)
  return float((np.asarray(found) == problem.query_labels).mean())


CONTENDERS: dict[str, Callable[[Problem], float]] = {
  "streamed": streamed,
  "faiss": _faiss,
  "scikit-learn, cosine": lambda problem: _scikit_learn(
    problem, "cosine", lambda distance: 1 - distance
  ),
  "scikit-learn, euclidean": _scikit_learn_euclidean,
  "dense": dense,
}


def measure(contender: str, sizes: tuple[int, int, int, int]) -> Measurement:
  """Runs one contender in this process; `sizes` as for `make_problem`."""
  problem = make_problem(*sizes)
  jax.devices()  # Starting the runtime is not part of the race.
  before = _peak_mebibytes()
  start, cpu_start = time.monotonic(), time.process_time()
  top1 = CONTENDERS[contender](problem)
  return Measurement(
    contender,
    top1,
    time.monotonic() - start,
    time.process_time() - cpu_start,
    _peak_mebibytes() - before,
  )


def benchmark(bank: int, queries: int, features: int, k: int) -> Findings:
  """Measures every contender in a process of its own; see `make_problem`.

  faiss is left out where it is not installed.

  Raises:
    UserError: The bank has too few images.
  """
  if k > bank:
    raise UserError(
      f"--neighbors={k} of a bank of {bank} images; expected at most {bank}."
    )
  found: list[Measurement] = []
  for contender in CONTENDERS:
    if contender == "faiss" and importlib.util.find_spec("faiss") is None:
      continue
    console.print_line(f"Measuring {contender}.")
    with concurrent.futures.ProcessPoolExecutor(
      1, multiprocessing.get_context("spawn")
    ) as alone:
      sizes = (bank, queries, features, k)
      found.append(alone.submit(measure, contender, sizes).result())
  return Findings(table(found), [one._asdict() for one in found])


def table(measurements: Sequence[Measurement]) -> str:
  """Returns the measurements as lines of Markdown."""
  lines = [
    "| k-NN | top-1 | seconds | CPU seconds | peak memory, MiB |",
    "|---|---|---|---|---|",
  ]
  lines += [
    f"| {m.contender} | {m.top1:.4f} | {m.seconds:.1f} | {m.cpu_seconds:.1f} "
    f"| {m.peak_mebibytes:.0f} |"
    for m in measurements
  ]
  return "\n".join(lines)


def _peak_mebibytes() -> float:
  """Returns the most memory this process ever held."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / (2**20 if sys.platform == "darwin" else 2**10)
