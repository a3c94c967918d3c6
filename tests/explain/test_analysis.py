import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from imsvd_jax.base import devices as devices_lib
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, measurement, probes, scan
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.captions import Caption, Captions
from imsvd_jax.explain.explain_options import ExplainOptions
from imsvd_jax.explain.images import Images, padded_batches
from imsvd_jax.explain.interventions import Interventions, Selectivity
from imsvd_jax.explain.subject import Encoding, Subject
from tests.explain.shapes_subject import two_views
from tests.explain.table_subject import (
  probabilities,
  table_batches,
  table_subject,
)

M, B, N, TOP = 5, 4, 203, 6
OPTIONS = ExplainOptions(num_top=TOP, max_flip_images=0)


def mirror(keys, images):
  return images[:, ::-1].astype(jnp.float32)


def shift(keys, images):
  """Pixels plus a draw per image, so that the keys matter."""
  draw = jax.vmap(lambda k: jax.random.randint(k, (M, B, 1), 0, 9))(keys)
  return images.astype(jnp.float32) + draw.astype(jnp.float32)


def mesh_of(count):
  return devices_lib.make_mesh(jax.devices()[:count])


def arrays_of(found):
  """Every array of an analysis by name."""
  parts = (found.features, found.code, found.pairs, found.views, found.scores)
  arrays = {"indices": found.indices}
  for part in parts:
    arrays |= {} if part is None else vars(part)
  return {n: v for n, v in arrays.items() if isinstance(v, np.ndarray)}


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  # Few distinct values, so that probabilities tie; zeros among them.
  pixels = rng.choice([0, 1, 1, 4], (N, M, B, 1)).astype(np.uint8)
  pixels[:, :, 0] += 1
  pixels[:, 3] = np.where(rng.random((N, B, 1)) < 0.5, 1, 200)
  labels = rng.integers(-1, 3, N).astype(np.int32)
  return pixels, labels


def run(data, batch_size, devices, *, order=None):
  pixels, labels = data
  order = np.arange(N) if order is None else order
  batches = lambda: table_batches(pixels, order, batch_size, labels)
  images = Images(
    batches,
    views=two_views(batches, mirror, shift),
    factors={"depth": np.linspace(0, 1, N) ** 2},
    label_names=("ant", "bee", "cat"),
  )
  return measurement.analyze(
    table_subject(), images, OPTIONS, mesh=mesh_of(devices)
  )


@pytest.fixture(scope="module")
def found(data):
  return run(data, 40, 8)


@pytest.fixture(scope="module")
def q(data):
  return probabilities(data[0]).astype(np.float64)


def relative(found, expected):
  """Largest relative error, over all cells that are not zero."""
  assert ((expected == 0) == (found == 0)).all()
  return np.max(np.abs(found - expected)[expected > 0] / expected[expected > 0])


def test_joint_matrix(found, q):
  flat = q.reshape(N, -1)
  assert found.pairs.joint.dtype == np.float32
  assert relative(found.pairs.joint, flat.T @ flat / N) < 1e-6


def test_cross_joint_matrix(found, data):
  pixels, _ = data
  keys = probes.image_keys(jax.random.key(0), jnp.arange(N), 1)
  first = probabilities(np.asarray(mirror(None, pixels))).astype(np.float64)
  second = probabilities(np.asarray(shift(keys, pixels))).astype(np.float64)
  expected = first.reshape(N, -1).T @ second.reshape(N, -1) / N
  assert relative(found.views.cross_joint, expected) < 1e-6
  same = first.argmax(-1) == second.argmax(-1)
  np.testing.assert_allclose(found.views.agreement, same.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    found.views.soft_agreement, (first * second).sum(-1).mean(0), rtol=1e-6
  )


def test_marginals_and_entropies(found, q):
  np.testing.assert_allclose(found.code.marginal, q.mean(0), rtol=1e-6)
  p = q.mean(0)
  np.testing.assert_allclose(
    found.code.entropies(), -(p * np.log(p)).sum(-1), rtol=1e-6
  )
  own = -(q * np.log(np.where(q > 0, q, 1))).sum(-1).mean(0)
  np.testing.assert_allclose(found.code.conditional_entropy, own, rtol=1e-6)
  np.testing.assert_allclose(
    found.code.confidence, q.max(-1).mean(0), rtol=1e-6
  )


def test_codes_and_usage(found, q):
  # Ties go to the lower bin, in NumPy as well.
  codes = q.astype(np.float32).argmax(-1)
  assert found.code.codes.dtype == np.uint8
  np.testing.assert_array_equal(found.code.codes, codes)
  usage = [np.bincount(codes[:, m], minlength=B) for m in range(M)]
  np.testing.assert_array_equal(found.code.usage, usage)


def test_top_images_with_ties(found, q):
  scores = np.round(q.astype(np.float32) * 2.0**16) / 2.0**16
  ties = 0
  for m in range(M):
    for d in range(B):
      column = scores[:, m, d]
      order = np.lexsort((np.arange(N), -column))[:TOP]
      np.testing.assert_array_equal(found.code.top_indices[m, d], order)
      np.testing.assert_array_equal(found.code.top_scores[m, d], column[order])
      ties += (column == column[order[-1]]).sum() > 1
  assert ties > 10  # Else this tests nothing.


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 203), (1, 24), (8, 7)])
def test_same_for_any_devices_batches_and_order(
  data, found, devices, batch_size
):
  order = np.random.default_rng(1).permutation(N)
  other = arrays_of(run(data, batch_size, devices, order=order))
  found = arrays_of(found)
  exact = ["codes", "usage", "top_indices", "top_scores", "indices"]
  for name in (*exact, "sample_indices", "sample_features"):
    np.testing.assert_array_equal(other[name], found[name])
  for name in ("joint", "cross_joint", "marginal", "feature_mean"):
    np.testing.assert_allclose(other[name], found[name], rtol=1e-6)
  for name in ("mutual_information", "feature_covariance", "nmi"):
    # A small covariance of large features has the rounding of the large.
    expected = found[name]
    atol = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(other[name], expected, rtol=1e-5, atol=atol)


def test_covariance_of_features_far_from_zero(found, data):
  features = data[0][..., 0].astype(np.float64).sum(-1) * 0.5 + 100
  np.testing.assert_allclose(
    found.features.feature_mean, features.mean(0), rtol=1e-6
  )
  np.testing.assert_allclose(
    found.features.feature_covariance,
    np.cov(features.T, bias=True),
    rtol=1e-5,
    atol=1e-5,
  )


def test_labels_and_factors(found, data, q):
  _, labels = data
  known = labels >= 0
  codes = found.code.codes[known]
  label, depth = found.factors
  assert label.names == ("ant", "bee", "cat")
  for m in range(M):
    expected = metrics.normalized_mutual_info_score(codes[:, m], labels[known])
    assert found.scores.nmi[m, 0] == pytest.approx(expected, abs=1e-9)
    counts = np.zeros((B, 3), int)
    np.add.at(counts, (codes[:, m], labels[known]), 1)
    np.testing.assert_array_equal(found.scores.class_counts["label"][m], counts)
    expected = metrics.normalized_mutual_info_score(
      found.code.codes[:, m], depth.values
    )
    assert found.scores.nmi[m, 1] == pytest.approx(expected, abs=1e-9)
  assert np.ptp(np.bincount(depth.values)) <= 1


def test_sample_is_uniform_and_bounded(found):
  assert (np.diff(found.features.sample_indices) > 0).all()
  sample = scan.UniformSample(1000)
  for start in range(0, 20_000, 500):
    index = np.arange(start, start + 500)
    sample.add(index, index[:, None].astype(np.float32))
    assert len(sample.indices) <= 1000
  indices, rows = sample.sorted()
  np.testing.assert_array_equal(rows[:, 0], indices)
  counts = np.histogram(indices, 10, (0, 20_000))[0]
  assert counts.min() > 60  # 100 expected each.
  assert counts.max() < 140


def image_pass(devices, images):
  """A pass over batches like `images`, and its empty sums."""
  shapes = scan.encoding_shapes(table_subject(), images)
  compiled = accumulate.image_pass(
    table_subject().encode,
    shapes,
    mesh=mesh_of(devices),
    num_top=1,
    joint=True,
    covariance=False,
  )
  return compiled, compiled.start()


def numbered(images, step):
  """The step-th batch of many."""
  size = len(images)
  index = step * size + np.arange(size)
  return {"image": images, "index": index, "mask": np.ones(size, bool)}


def test_a_long_sum_keeps_its_digits():
  # 120,000 images whose terms round the same way every time.
  pixels = np.array([[3, 7], [1, 9]], np.uint8)[None, :, :, None]
  images = np.repeat(pixels, 2000, 0)
  compiled, found = image_pass(1, images)
  one = probabilities(pixels).astype(np.float64).reshape(-1)
  for step in range(60):
    found, _ = compiled.step((), found, numbered(images, step))
  total = int(found.count)
  assert total == 120_000
  joint = found.code.joint.value() / total
  np.testing.assert_allclose(joint, np.outer(one, one), rtol=1e-6)
  marginal = found.code.marginal.value() / total
  np.testing.assert_allclose(marginal, one, rtol=1e-6)


@pytest.mark.slow
def test_a_million_images_keep_their_digits():
  rng = np.random.default_rng(0)
  found, exact = None, 0.0
  for step in range(256):
    images = rng.integers(0, 256, (4096, 3, 8, 1)).astype(np.uint8)
    images[:, :, 0] |= 1
    if found is None:
      compiled, found = image_pass(8, images)
    found, _ = compiled.step((), found, numbered(images, step))
    flat = probabilities(images).astype(np.float64).reshape(4096, -1)
    exact += flat.T @ flat
  np.testing.assert_allclose(found.code.joint.value(), exact, rtol=1e-6)


NAMES = Captions(
  (
    Caption(0, 2, "depth 0.1 to 0.3", 20, 0.9, 0.5, 4.5, 1e-5),
    Caption(1, 0, "Größe \u2265 3 and label bee", 11, 0.6, 0.25, 2.0, 0.01),
  ),
  num_used=7,
)
INTERVENTIONS = Interventions(
  ("shape", "x"),
  np.array([30, 40]),
  np.random.default_rng(0).random((2, M)),
  (
    Selectivity("shape", 1, 0.75, 0.25, 3.0, 2.5, 3.5),
    Selectivity("x", 0, 0.1, 0.1, 1.0, 0.9, 1.1),
  ),
)

EDITS = Interventions(
  ("crop 50%",), np.array([9]), np.linspace(0, 1, M)[None], ()
)


def test_save_and_load(found, tmp_path):
  found = dataclasses.replace(
    found,
    edits=EDITS,
    captions=NAMES,
    interventions=INTERVENTIONS,
  )
  found.save(tmp_path / "analysis.npz")
  again = Analysis.load(tmp_path / "analysis.npz")
  stored = arrays_of(again)
  assert stored.keys() == arrays_of(found).keys()
  for name, value in arrays_of(found).items():
    np.testing.assert_array_equal(stored[name], value)
    assert stored[name].dtype == value.dtype
  assert again.captions == NAMES
  for kind, given in (("interventions", INTERVENTIONS), ("edits", EDITS)):
    flips = getattr(again, kind)
    for one, other in zip(flips, given, strict=True):
      np.testing.assert_array_equal(one, other)
    assert flips.lines("") == given.lines("")
  for one, other in zip(again.factors, found.factors, strict=True):
    assert (one.names, one.ordered) == (other.names, other.ordered)
  assert again.scores.class_counts.keys() == found.scores.class_counts.keys()
  assert again.seconds == found.seconds


def test_no_name_is_not_the_same_as_no_search_for_names(found, tmp_path):
  for captions in (Captions((), 3), None):
    path = tmp_path / "analysis.npz"
    dataclasses.replace(found, captions=captions).save(path)
    assert Analysis.load(path).captions == captions


def test_a_file_of_an_earlier_version(found, tmp_path):
  """It had neither names nor interventions."""
  found.save(tmp_path / "new.npz")
  with np.load(tmp_path / "new.npz") as stored:
    later = ("caption/", "selectivity/", "intervention/", "edit")
    old = {
      name: stored[name]
      for name in stored.files
      if not name.startswith(later) and not name.endswith("/ordered")
    }
  assert len(old) < len(stored.files)
  np.savez(tmp_path / "old.npz", **old)
  again = Analysis.load(tmp_path / "old.npz")
  assert again.captions is again.interventions is None
  np.testing.assert_array_equal(again.code.codes, found.code.codes)
  assert again.factors[1].names == found.factors[1].names


def test_without_codes_the_features_remain(data, tmp_path):
  subject = Subject(
    encode=lambda v, x: Encoding(_features(x)), objective="VICReg"
  )
  images = Images(lambda: table_batches(data[0], np.arange(N), 64, data[1]))
  result = measurement.analyze(subject, images, mesh=mesh_of(8))
  result.save(tmp_path / "analysis.npz")
  for found in (result, Analysis.load(tmp_path / "analysis.npz")):
    assert found.code is None
    assert found.num_variables == 0
    assert found.factors[0].name == "label"
    assert len(found.features.sample_features) == N
    assert found.scores is found.pairs is found.views is None


def _features(images):
  return images[..., 0].astype(jnp.float32).sum(-1)


def small(images, indices, **options):
  batch = {"image": images, "index": np.asarray(indices)}
  batch |= options.pop("batch", {})
  return scan.scan(
    options.pop("subject", table_subject()),
    Images(lambda: [batch]),
    mesh=mesh_of(8),
    joint=False,
    covariance=False,
    **options,
  )


ONES = np.ones((8, 2, 3, 1), np.uint8)


def test_user_mistakes():
  with pytest.raises(UserError, match="Image 3 came more than once"):
    small(ONES, [0, 1, 2, 3, 3, 4, 5, 6])
  with pytest.raises(UserError, match="no images"):
    measurement.analyze(table_subject(), Images(lambda: []))
  with pytest.raises(UserError, match="8 of 8 images have"):
    small(ONES * 0, range(8))
  with pytest.raises(UserError, match="indices must be in"):
    small(ONES, range(-1, 7))
  flat = Subject(encode=lambda v, x: Encoding(_features(x), _features(x)))
  with pytest.raises(ValueError, match=r"\[B, M, b\]"):
    small(ONES, range(8), subject=flat)
  with pytest.raises(UserError, match="no images"):
    small(ONES, range(8), batch={"mask": np.zeros(8, bool)})


def test_an_example_needs_views(data):
  images = Images(
    lambda: table_batches(data[0], np.arange(N), 64),
    views=two_views(
      lambda: table_batches(data[0], np.arange(8), 8), mirror, mirror
    ),
  )
  with pytest.raises(UserError, match="no views of image"):
    measurement.analyze(table_subject(), images, OPTIONS, mesh=mesh_of(8))


def test_batches_are_padded_and_sorted():
  given = [
    {"image": np.full((3, 1, 1, 1), 7), "index": np.array([5, 1, 3])},
    {"image": np.full((2, 1, 1, 1), 7), "index": np.array([0, 2])},
  ]
  first, second = padded_batches(given, 4)
  np.testing.assert_array_equal(first["index"][:3], [1, 3, 5])
  np.testing.assert_array_equal(second["mask"], [True, True, False, False])
  assert first["image"].shape == second["image"].shape == (4, 1, 1, 1)


def test_more_bins_than_a_byte_holds():
  images = np.ones((8, 1, 300, 1), np.uint8)
  images[:, 0, 299] = 2
  codes = small(images, range(8), num_top=2)[0].code.codes
  assert codes.dtype == np.uint16
  assert (codes == 299).all()
