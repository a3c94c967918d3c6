"""Numbers without labels against direct formulas and known answers."""

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import collapse, protocols
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.inputs import Inputs


def entropy(p):
  p = np.asarray(p, np.float64).ravel()
  return -sum(x * np.log(x) for x in p if x > 0)


@pytest.mark.parametrize("shape", [(200, 10), (8, 30)])
def test_rank_me_equals_the_direct_formula(shape):
  features = np.random.default_rng(0).normal(size=shape)
  features *= np.logspace(0, -2, shape[1])
  singular = np.linalg.svd(features, compute_uv=False)
  p = singular / singular.sum() + 1e-7
  expected = np.exp(-(p * np.log(p)).sum())
  assert collapse.rank_me(features) == pytest.approx(expected, rel=1e-5)


def test_rank_me_counts_the_dimensions_in_use():
  features = np.tile(np.eye(4), (10, 2))  # rank 4 of 8, all alike
  assert collapse.rank_me(features) == pytest.approx(4, rel=1e-4)
  assert collapse.rank_me(np.ones((10, 8))) == pytest.approx(1, rel=1e-4)
  assert collapse.rank_me(np.zeros((10, 8))) == 0


@pytest.fixture(scope="module")
def views():
  """90 images, 4 views of each, in 6 dimensions; views differ in two."""
  generator = np.random.default_rng(1)
  means = generator.normal(size=(90, 1, 6)) * [1, 2, 1, 3, 0.01, 1]
  noise = generator.normal(size=(90, 4, 6)) * [0.1, 0.1, 0.1, 0.1, 1, 1]
  return (means + noise).astype(np.float32)


def lidar_by_definition(views):
  z = views.astype(np.float64)
  num_images, num_views, size = z.shape
  means = z.mean(axis=1)
  between = np.zeros((size, size))
  within = 1e-4 * np.eye(size)
  for x in range(num_images):
    d = means[x] - means.mean(axis=0)
    between += np.outer(d, d) / num_images
    for v in range(num_views):
      d = z[x, v] - means[x]
      within += np.outer(d, d) / (num_images * num_views)
  values, vectors = np.linalg.eigh(within)
  root = vectors @ np.diag(values**-0.5) @ vectors.T
  eigenvalues = np.linalg.eigvalsh(root @ between @ root)
  p = eigenvalues / eigenvalues.sum() + 1e-7
  return np.exp(-(p * np.log(p)).sum())


def test_lidar_equals_the_direct_formula(views):
  expected = lidar_by_definition(views)
  assert collapse.lidar(views) == pytest.approx(expected, rel=1e-6)


def test_lidar_sees_what_rank_me_does_not(views):
  # Two of six dimensions vary between views as much as between images.
  assert collapse.lidar(views) < 4
  # Views of different images are no groups: what tells images apart is lost.
  mixed = views.reshape(4, 90, 6).transpose(1, 0, 2)
  assert collapse.lidar(mixed) != pytest.approx(collapse.lidar(views), rel=0.05)


def test_lidar_of_fewer_images_than_dimensions():
  views = np.random.default_rng(2).normal(size=(5, 3, 12))
  assert 1 < collapse.lidar(views) <= 4.001  # five means span four dimensions


@pytest.mark.parametrize("shape", [(5, 3, 16), (12, 2, 25), (8, 2, 15)])
def test_lidar_of_fewer_views_than_dimensions(shape):
  generator = np.random.default_rng(7)
  scales = generator.uniform(0.1, 3, size=shape[2])
  views = scales * generator.normal(size=(shape[0], 1, shape[2]))
  views = (views + 0.3 * generator.normal(size=shape)).astype(np.float32)
  expected = lidar_by_definition(views)
  assert collapse.lidar(views) == pytest.approx(expected, rel=1e-4)


def test_alignment_and_uniformity_equal_their_definitions(views):
  first, second = views[:, 0], views[:, 1]
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  x, y = unit(first.astype(np.float64)), unit(second.astype(np.float64))
  expected = np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)])
  assert collapse.alignment(first, second) == pytest.approx(expected, rel=1e-5)
  pairs = [
    np.exp(-2 * np.sum((x[i] - x[j]) ** 2))
    for i in range(90)
    for j in range(90)
    if i != j
  ]
  expected = np.log(np.mean(pairs))
  assert collapse.uniformity(first) == pytest.approx(expected, rel=1e-5)
  many = np.random.default_rng(0).normal(size=(1500, 3))  # more than a block
  x = unit(many)
  distance = np.sum((x[:, None] - x[None]) ** 2, axis=-1)
  kernel = np.exp(-2 * distance)[~np.eye(1500, dtype=bool)]
  expected = np.log(kernel.mean())
  assert collapse.uniformity(many) == pytest.approx(expected, rel=1e-4)
  assert collapse.uniformity(np.ones((5, 3))) == pytest.approx(0, abs=1e-6)
  # A network that has died gives every image zeros: equal, not orthogonal.
  assert collapse.uniformity(np.zeros((5, 3))) == 0
  one_died = np.array([[0.0, 0.0], [2.0, 0.0]])
  assert collapse.uniformity(one_died) == pytest.approx(-2)


def test_miller_madow_by_hand():
  # p = (3/4, 1/4, 0): two cells occur, so (2 - 1) / (2 * 4) is added.
  found = collapse.miller_madow_entropy(np.array([[3, 1, 0], [0, 4, 0]]))
  assert found == pytest.approx([entropy([0.75, 0.25]) + 1 / 8, 0])


def test_mutual_information_equals_a_loop_over_pairs():
  generator = np.random.default_rng(3)
  bins = generator.integers(0, 4, size=(100, 5))
  bins[:, 3] = (bins[:, 0] + (generator.random(100) < 0.2)) % 4
  found = collapse.mutual_information(bins, 4)
  corrected = lambda n: entropy(n / n.sum()) + ((n > 0).sum() - 1) / 200
  for i in range(5):
    for j in range(5):
      joint = np.zeros((4, 4))
      for a, b in zip(bins[:, i], bins[:, j], strict=True):
        joint[a, b] += 1
      own, other = (corrected(joint.sum(axis=axis)) for axis in (1, 0))
      expected = own if i == j else own + other - corrected(joint)
      assert found[i, j] == pytest.approx(expected)


def test_the_correction_removes_the_floor_of_independent_variables():
  bins = np.random.default_rng(4).integers(0, 8, size=(2000, 30))
  pairs = ~np.eye(30, dtype=bool)
  corrected = collapse.mutual_information(bins, 8)[pairs].mean()
  floor = (8 - 1) ** 2 / (2 * 2000)  # 0.0123 nats, the plug-in's
  assert abs(corrected) < 0.05 * floor


def one_hot(bins, num_bins):
  return np.eye(num_bins, dtype=np.float32)[bins]


def test_codes_that_use_everything():
  bins = np.stack(np.divmod(np.arange(16), 4), axis=1)  # 4 x 4 factorial
  bins = np.tile(bins, (25, 1))
  codes = one_hot(np.stack([bins, bins], axis=1), 4)
  found = collapse.code_statistics(codes)
  summary = found.summary()
  assert summary["soft_entropy_mean"] == pytest.approx(np.log(4))
  assert summary["entropy_mean"] == pytest.approx(np.log(4) + 3 / 800)
  assert summary["entropy_limit"] == pytest.approx(np.log(4))
  assert summary["dead_bins"] == summary["saturated_bins"] == 0
  assert summary["agreement"] == summary["soft_agreement"] == 1
  assert summary["kappa"] == summary["confidence"] == 1
  # Plug-in information is 0 here; 3 + 3 - 15 cells over 2 N are taken off.
  assert summary["mutual_information_mean"] == pytest.approx(-9 / 800)


def test_codes_that_collapsed():
  bins = np.zeros((50, 2, 3), int)
  bins[:, :, 1] = 2
  bins[0, :, 1] = 1  # 98% in one bin
  found = collapse.code_statistics(one_hot(bins, 4))
  np.testing.assert_array_equal(found.dead_bins().sum(axis=1), [3, 2, 3])
  expected = np.zeros((3, 4), bool)
  expected[[0, 1, 2], [0, 2, 0]] = True
  np.testing.assert_array_equal(found.saturated_bins(), expected)
  assert found.entropies[0] == 0
  assert found.kappa == pytest.approx(1)


def test_two_variables_that_say_the_same_share_all_their_information():
  bins = np.random.default_rng(5).integers(0, 3, size=(3000, 1, 1))
  found = collapse.code_statistics(one_hot(np.repeat(bins, 2, axis=2), 3))
  assert found.agreement is None
  assert "agreement" not in found.summary()
  expected = found.entropies[0]
  assert found.mutual_information[0, 1] == pytest.approx(expected, abs=1e-3)
  assert abs(found.shuffled_information) < 5e-3


def test_agreement_and_kappa_by_hand():
  first = np.array([0, 0, 1, 1])[:, None]
  second = np.array([0, 1, 1, 1])[:, None]
  q = one_hot(np.stack([first, second], axis=1), 2) * 0.8 + 0.1
  found = collapse.code_statistics(q)
  assert found.agreement == 0.75
  # Chance: 1/2 * 1/4 + 1/2 * 3/4 = 1/2.
  assert found.kappa == pytest.approx(0.5)
  # Equal bins give .9 * .9 + .1 * .1 = .82, others 2 * .09 = .18.
  assert found.soft_agreement == pytest.approx((3 * 0.82 + 0.18) / 4)
  assert found.confidence == pytest.approx(0.9)


def test_run_yields_what_its_inputs_allow(views):
  protocol = protocols.Collapse(max_images=50)
  features = Features(views[:, 0], None)
  names = dict(collapse.run(Inputs(sample=features), protocol))
  assert list(names) == ["rank_me/features"]
  codes = one_hot(np.random.default_rng(6).integers(0, 3, (90, 2, 4)), 3)
  everything = Inputs(
    sample=features, embeddings=views[:, :2], view_groups=views, codes=codes
  )
  found = dict(collapse.run(everything, protocol))
  assert found["lidar"] == pytest.approx(collapse.lidar(views))
  assert {"alignment", "uniformity", "codes/kappa"} < set(found)
  entropies = [found[f"codes/variable/{m}/entropy"] for m in range(4)]
  assert found["codes/entropy_mean"] == pytest.approx(np.mean(entropies))
  assert all(isinstance(value, float) for value in found.values())


@pytest.mark.parametrize(
  ("function", "argument", "message"),
  [
    (collapse.lidar, np.ones((4, 1, 3)), "two views"),
    (collapse.lidar, np.ones((4, 3)), r"expected \[N, V, D\]"),
    (collapse.rank_me, np.full((4, 3), np.nan), "4 of 4 embedding features"),
    (collapse.uniformity, np.ones((1, 3)), "two or more"),
    (collapse.code_statistics, np.ones((4, 2, 3)), r"\[N, V, M, b\]"),
    (collapse.code_statistics, np.ones((4, 2, 3, 5)), "do not sum to 1"),
    (lambda inputs: list(collapse.run(inputs, None)), Inputs(), "needs sample"),
  ],
)
def test_a_mistake_is_one_clear_line(function, argument, message):
  with pytest.raises(UserError, match=message):
    function(argument)
