"""k-NN against its definition, scikit-learn, and the definition of ties."""

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import knn, scores
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.protocols import Knn

NUM_CLASSES = 7


@pytest.fixture(scope="module")
def clusters():
  """A bank of 301 and 83 queries around class centres, far from separable."""
  generator = np.random.default_rng(0)
  centres = generator.normal(size=(NUM_CLASSES, 12))
  labels = np.arange(384) % NUM_CLASSES
  features = centres[labels] + 1.3 * generator.normal(size=(384, 12))
  features = features.astype(np.float32)
  return [
    Features(features[r], labels[r]) for r in (slice(301), slice(301, 384))
  ]


def definition(bank, bank_labels, queries, k, temperature):
  """The vote for every class, float64 [Q, C], written from the formula."""
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosines = unit(queries.astype(np.float64)) @ unit(bank.astype(np.float64)).T
  votes = np.zeros((len(queries), NUM_CLASSES))
  for i, row in enumerate(cosines):
    for j in np.argsort(-row, kind="stable")[:k]:
      votes[i, bank_labels[j]] += np.exp(row[j] / temperature)
  return votes


def accuracies(train, test, protocol):
  ranks = knn.knn_ranks(train, test, protocol)
  return {pair: scores.accuracy(values) for pair, values in ranks.items()}


@pytest.fixture(scope="module")
def results(clusters):
  return accuracies(*clusters, Knn((20, 1, 5), (0.07, 0.5)))


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_the_definition(clusters, results, k, temperature):
  bank, test = clusters
  votes = definition(*bank, test.features, k, temperature)
  own = votes[np.arange(len(votes)), test.labels]
  place = (votes > own[:, None]).sum(axis=1)
  place[own == 0] = NUM_CLASSES
  found = results[k, temperature]
  assert found.top1 == (place == 0).mean()
  assert found.top5 == (place < 5).mean()
  assert found.interval[0] < found.top1 < found.interval[1]


def test_settings_keep_their_order(results):
  assert [k for k, _ in results] == [20, 20, 1, 1, 5, 5]


def test_equals_scikit_learn(clusters, results):
  bank, test = clusters
  model = KNeighborsClassifier(
    20,
    metric="cosine",
    algorithm="brute",
    weights=lambda distance: np.exp((1 - distance) / 0.07),
  )
  score = model.fit(*bank).score(*test)
  assert results[20, 0.07].top1 == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
  ("bank_block", "query_block", "num_devices"),
  [(1000, 1000, 1), (301, 11, 8), (20, 7, 3)],
)
def test_neither_blocks_nor_devices_matter(
  clusters, bank_block, query_block, num_devices
):
  bank, queries = (part.features for part in clusters)
  similarities, indices = knn.nearest_neighbors(
    bank,
    queries,
    num_neighbors=20,
    bank_block=bank_block,
    query_block=query_block,
    devices=jax.devices()[:num_devices],
  )
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  cosines = unit(queries) @ unit(bank).T
  np.testing.assert_array_equal(
    indices, np.argsort(-cosines, axis=1, kind="stable")[:, :20]
  )
  np.testing.assert_allclose(
    similarities, np.take_along_axis(cosines, indices, axis=1), atol=1e-6
  )


def test_equally_near_neighbors_come_in_the_order_of_the_bank():
  bank = np.tile(np.eye(3, dtype=np.float32), (5, 1))  # 15 images, 3 places
  queries = np.eye(3, dtype=np.float32)
  _, indices = knn.nearest_neighbors(
    bank, queries, num_neighbors=7, bank_block=4
  )
  others = [[1, 2], [0, 2], [0, 1]]
  for query in range(3):
    assert indices[query].tolist() == [*range(query, 15, 3), *others[query]]


@pytest.mark.parametrize(
  ("bank", "labels", "query_labels", "protocol", "expected"),
  [
    # Every cosine is 1: of equal votes the lower class is first.
    ([[1, 1]] * 4, [5, 2, 5, 2], [5, 2], Knn((4,), (0.07,)), [1, 0]),
    # exp(1 / T) is beyond float32.
    ([[1, 0], [1, 0.2], [1, 0.3]], [1, 0, 0], [1], Knn((3,), (1e-3,)), [0]),
    # exp(-1 / T) is zero in float32: a vote that underflows is still a vote,
    # behind class 2, but before class 0, which has no neighbor.
    ([[1, 0], [0, 1], [-1, 0]], [2, 1, 0], [1], Knn((2,), (1e-3,)), [1]),
  ],
)
def test_votes_by_hand(bank, labels, query_labels, protocol, expected):
  bank = Features(np.array(bank, np.float32), np.array(labels))
  queries = np.repeat(bank.features[:1], len(query_labels), axis=0)
  test = Features(queries, np.array(query_labels))
  (ranks,) = knn.knn_ranks(bank, test, protocol).values()
  assert ranks.tolist() == expected


def test_a_class_without_a_neighbor_is_not_in_the_top_five():
  bank = np.eye(6, dtype=np.float32)
  test = Features(bank[:1], np.array([3]))
  protocol = Knn((1,), (0.07,))
  (found,) = accuracies(Features(bank, np.arange(6)), test, protocol).values()
  assert found.top5 == 0


def test_padding_of_a_block_is_no_neighbor():
  bank = -np.array([[1, 0], [1, 0.1], [1, 0.2], [1, 0.3], [1, 0.4]], np.float32)
  # Every cosine is negative; the three zeros that fill the block have 0.
  similarities, indices = knn.nearest_neighbors(
    bank, -bank[:1], num_neighbors=5, bank_block=4
  )
  assert indices.tolist() == [[4, 3, 2, 1, 0]]
  assert (similarities < -0.9).all()


def compiled_bytes(num_tiles):
  mesh = devices.make_mesh(jax.devices()[:1])
  shape = jax.ShapeDtypeStruct
  best = tuple(shape((num_tiles, 16, 8), t) for t in (np.float32, np.int32))
  tiles = shape((num_tiles, 16, 32), np.float32)
  block = shape((128, 32), np.float32)
  lowered = knn.merge_block.lower(best, tiles, block, 0, 128, mesh=mesh)
  return lowered.compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_bank_times_queries(monkeypatch, clusters):
  # With the queries: the tiles are visited one after the other.
  few, many = compiled_bytes(2), compiled_bytes(64)
  assert many - few < 62 * 16 * 8 * 8 + 4096  # no more than the best k
  assert many < 16 * 64 * 128 * 4  # the similarities with one block
  # With the bank: only blocks of it ever reach the devices.
  blocks = []
  merge = knn.merge_block

  def spy(best, tiles, block, *args, **kwargs):
    blocks.append(block.shape)
    return merge(best, tiles, block, *args, **kwargs)

  monkeypatch.setattr(knn, "merge_block", spy)
  bank, queries = (part.features for part in clusters)
  knn.nearest_neighbors(
    bank, queries, num_neighbors=20, bank_block=64, query_block=4
  )
  assert blocks == [(64, 12)] * 5


@pytest.mark.parametrize(
  ("part", "change", "message"),
  [
    (0, {"labels": None}, "train images have no labels"),
    (1, {"labels": np.full(83, -1)}, "83 of 83 test images have no label"),
    (1, {"labels": np.full(83, 9)}, "never occur in train (9)"),
    (1, {"features": np.zeros((83, 5))}, "12 values and test features 5"),
    (1, {"features": np.zeros((0, 12))}, r"shape (0, 12)"),
    (1, {"labels": np.zeros(82, int)}, "expected 83 integers"),
    (
      0,
      {"features": np.full((301, 12), np.nan)},
      "301 of 301 train features hold NaN",
    ),
    (0, {}, "k = 302 over a bank of 301"),
  ],
)
def test_a_mistake_is_one_clear_line(clusters, part, change, message):
  splits = list(clusters)
  splits[part] = splits[part]._replace(**change)
  with pytest.raises(UserError) as error:
    knn.knn_ranks(*splits, Knn((20, 302), (0.07,)))
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_large_finite_features_are_not_taken_for_infinite(clusters):
  bank, test = clusters
  # The sum of the features overflows; none of them does.
  huge = bank._replace(features=bank.features * np.float32(3e37))
  protocol = Knn((20,), (0.07,))
  assert accuracies(huge, test, protocol) == accuracies(bank, test, protocol)
