import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import accumulate, analysis
from imsvd_jax.explain.subject import Encoding, Subject
from tests.explain.table_subject import (
  probabilities,
  table_batches,
  table_subject,
)

M, B, N, TOP = 5, 4, 203, 6


def mirror(keys, images):
  return images[:, ::-1].astype(jnp.float32)


def shift(keys, images):
  """Pixels plus a draw per image, so that the keys matter."""
  draw = jax.vmap(lambda k: jax.random.randint(k, (M, B, 1), 0, 9))(keys)
  return images.astype(jnp.float32) + draw.astype(jnp.float32)


def mesh_of(count):
  return accumulate.data_mesh(jax.devices()[:count])


@pytest.fixture(scope="module")
def data():
  rng = np.random.default_rng(0)
  # Few distinct values, so that probabilities tie; zeros among them.
  pixels = rng.choice([0, 1, 1, 4], (N, M, B, 1)).astype(np.uint8)
  pixels[:, :, 0] += 1
  pixels[:, 3] = np.where(rng.random((N, B, 1)) < 0.5, 1, 200)
  labels = rng.integers(-1, 3, N).astype(np.int32)
  return pixels, labels


def run(data, batch_size, devices, *, order=None, **options):
  pixels, labels = data
  order = np.arange(N) if order is None else order
  return analysis.analyse(
    table_subject(),
    table_batches(pixels, order, batch_size, labels),
    num_top=TOP,
    mesh=mesh_of(devices),
    sample_size=options.pop("sample_size", 50),
    views=(mirror, shift),
    factors={"depth": np.linspace(0, 1, N) ** 2},
    label_names=("ant", "bee", "cat"),
    **options,
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
  assert found.joint.dtype == np.float32
  assert relative(found.joint, flat.T @ flat / N) < 1e-6


def test_cross_joint_matrix(found, data):
  pixels, _ = data
  keys = accumulate.view_keys(jax.random.key(0), jnp.arange(N), 1)
  first = probabilities(np.asarray(mirror(None, pixels))).astype(np.float64)
  second = probabilities(np.asarray(shift(keys, pixels))).astype(np.float64)
  expected = first.reshape(N, -1).T @ second.reshape(N, -1) / N
  assert relative(found.cross_joint, expected) < 1e-6
  same = first.argmax(-1) == second.argmax(-1)
  np.testing.assert_allclose(found.agreement, same.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    found.soft_agreement, (first * second).sum(-1).mean(0), rtol=1e-6
  )


def test_marginals_and_entropies(found, q):
  np.testing.assert_allclose(found.marginal, q.mean(0), rtol=1e-6)
  p = q.mean(0)
  np.testing.assert_allclose(
    found.entropies(), -(p * np.log(p)).sum(-1), rtol=1e-6
  )
  own = -(q * np.log(np.where(q > 0, q, 1))).sum(-1).mean(0)
  np.testing.assert_allclose(found.conditional_entropy, own, rtol=1e-6)
  np.testing.assert_allclose(found.confidence, q.max(-1).mean(0), rtol=1e-6)


def test_codes_and_usage(found, q):
  # Ties go to the lower bin, in NumPy as well.
  codes = q.astype(np.float32).argmax(-1)
  assert found.codes.dtype == np.uint8
  np.testing.assert_array_equal(found.codes, codes)
  usage = [np.bincount(codes[:, m], minlength=B) for m in range(M)]
  np.testing.assert_array_equal(found.usage, usage)


def test_top_images_with_ties(found, q):
  scores = np.round(q.astype(np.float32) * 2.0**16) / 2.0**16
  ties = 0
  for m in range(M):
    for d in range(B):
      column = scores[:, m, d]
      order = np.lexsort((np.arange(N), -column))[:TOP]
      np.testing.assert_array_equal(found.top_indices[m, d], order)
      np.testing.assert_array_equal(found.top_scores[m, d], column[order])
      ties += (column == column[order[-1]]).sum() > 1
  assert ties > 10  # Else this tests nothing.


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 203), (1, 24), (8, 7)])
def test_same_for_any_devices_batches_and_order(
  data, found, devices, batch_size
):
  order = np.random.default_rng(1).permutation(N)
  other = run(data, batch_size, devices, order=order)
  for name in ("codes", "usage", "top_indices", "top_scores", "indices"):
    np.testing.assert_array_equal(getattr(other, name), getattr(found, name))
  for name in ("joint", "cross_joint", "marginal", "feature_mean"):
    np.testing.assert_allclose(
      getattr(other, name), getattr(found, name), rtol=1e-6
    )
  for name in ("mutual_information", "feature_covariance", "nmi"):
    # A small covariance of large features has the rounding of the large.
    expected = getattr(found, name)
    np.testing.assert_allclose(
      getattr(other, name),
      expected,
      rtol=1e-5,
      atol=1e-6 * np.abs(expected).max(),
    )
  np.testing.assert_array_equal(other.sample_indices, found.sample_indices)
  np.testing.assert_array_equal(other.sample_features, found.sample_features)


def test_covariance_of_features_far_from_zero(found, data):
  features = data[0][..., 0].astype(np.float64).sum(-1) * 0.5 + 100
  np.testing.assert_allclose(found.feature_mean, features.mean(0), rtol=1e-6)
  np.testing.assert_allclose(
    found.feature_covariance,
    np.cov(features.T, bias=True),
    rtol=1e-5,
    atol=1e-5,
  )


def test_labels_and_factors(found, data, q):
  _, labels = data
  known = labels >= 0
  codes = found.codes[known]
  label, depth = found.factors
  assert label.names == ("ant", "bee", "cat")
  for m in range(M):
    expected = metrics.normalized_mutual_info_score(codes[:, m], labels[known])
    assert found.nmi[m, 0] == pytest.approx(expected, abs=1e-9)
    counts = np.zeros((B, 3), int)
    np.add.at(counts, (codes[:, m], labels[known]), 1)
    np.testing.assert_array_equal(found.class_counts["label"][m], counts)
    expected = metrics.normalized_mutual_info_score(
      found.codes[:, m], depth.values
    )
    assert found.nmi[m, 1] == pytest.approx(expected, abs=1e-9)
  assert np.ptp(np.bincount(depth.values)) <= 1


def test_sample_is_uniform_and_bounded(found):
  assert len(found.sample_indices) == 50
  assert (np.diff(found.sample_indices) > 0).all()
  sample = analysis.UniformSample(1000)
  for start in range(0, 20_000, 500):
    index = np.arange(start, start + 500)
    sample.add(index, index[:, None].astype(np.float32))
    assert len(sample.indices) <= 1000
  indices, rows = sample.sorted()
  np.testing.assert_array_equal(rows[:, 0], indices)
  counts = np.histogram(indices, 10, (0, 20_000))[0]
  assert counts.min() > 60  # 100 expected each.
  assert counts.max() < 140


def test_a_long_sum_keeps_its_digits():
  # 120,000 images whose terms round the same way every time.
  pixels = np.array([[3, 7], [1, 9]], np.uint8)[None, :, :, None]
  images = np.repeat(pixels, 2000, 0)
  accumulator = accumulate.Accumulator(
    table_subject().encode,
    mesh=mesh_of(1),
    num_top=1,
    joint=True,
    covariance=False,
  )
  state = accumulator.init(accumulator.shapes((), images))
  one = probabilities(pixels).astype(np.float64).reshape(-1)
  naive = np.zeros((4, 4), np.float32)
  batch = np.float32(2000) * np.outer(one, one).astype(np.float32)
  mask = np.ones(2000, bool)
  for step in range(60):
    state, _ = accumulator.step(
      (), state, images, step * 2000 + np.arange(2000), mask
    )
    naive += batch
  total = int(state.count)
  assert total == 120_000
  joint = state.matrices["joint"].value() / total
  np.testing.assert_allclose(joint, np.outer(one, one), rtol=1e-6)
  marginal = state.vectors["marginal"].value() / total
  np.testing.assert_allclose(marginal, one, rtol=1e-6)


def test_two_sum_beats_a_plain_sum():
  add = jax.jit(lambda s, x: accumulate.add(s, x))
  sums = accumulate.Sums(jnp.zeros(1), jnp.zeros(1))
  plain, exact = np.float32(0), 0.0
  for value in np.random.default_rng(0).random(3000, np.float32):
    value = np.float32(value + 1000)
    sums = add(sums, value)
    plain = np.float32(plain + value)
    exact += float(value)
  assert abs(plain / exact - 1) > 1e-7
  assert abs(sums.value()[0] / exact - 1) < 1e-10


@pytest.mark.slow
def test_a_million_images_keep_their_digits():
  rng = np.random.default_rng(0)
  accumulator = accumulate.Accumulator(
    table_subject().encode,
    mesh=mesh_of(8),
    num_top=1,
    joint=True,
    covariance=False,
  )
  state, exact = None, 0.0
  for step in range(256):
    images = rng.integers(0, 256, (4096, 3, 8, 1)).astype(np.uint8)
    images[:, :, 0] |= 1
    if state is None:
      state = accumulator.init(accumulator.shapes((), images))
    index = step * 4096 + np.arange(4096)
    state, _ = accumulator.step((), state, images, index, index >= 0)
    flat = probabilities(images).astype(np.float64).reshape(4096, -1)
    exact += flat.T @ flat
  joint = state.matrices["joint"].value()
  np.testing.assert_allclose(joint, exact, rtol=1e-6)


def test_save_and_load(found, tmp_path):
  found.flip_rates = {"crop 50%": np.linspace(0, 1, M)}
  found.save(tmp_path / "analysis.npz")
  again = analysis.Analysis.load(tmp_path / "analysis.npz")
  for name, value in vars(found).items():
    if isinstance(value, np.ndarray):
      np.testing.assert_array_equal(getattr(again, name), value)
      assert getattr(again, name).dtype == value.dtype
  assert list(again.flip_rates) == ["crop 50%"]
  assert again.factors[0].names == found.factors[0].names
  assert again.class_counts.keys() == found.class_counts.keys()
  assert again.seconds == found.seconds
  found.flip_rates = {}


def test_without_codes_the_features_remain(data):
  subject = Subject(
    encode=lambda v, x: Encoding(_features(x)), objective="VICReg"
  )
  result = analysis.analyse(
    subject,
    table_batches(*[data[0], np.arange(N)], 64, data[1]),
    mesh=mesh_of(8),
  )
  assert not result.has_codes
  assert result.num_variables == result.num_bins == 0
  assert result.factors[0].name == "label"
  assert len(result.sample_features) == N
  assert result.nmi is None


def _features(images):
  return images[..., 0].astype(jnp.float32).sum(-1)


def test_progress_tells_rate_and_time_left():
  lines = []
  meter = analysis.Progress("analysis", 1000, lines.append, every=0.0)
  meter.update(10)
  meter.update(240)
  assert "250 of 1,000 images" in lines[-1]
  assert "images/s" in lines[-1]
  assert lines[-1].endswith("left")
  assert analysis._duration(3725) == "1 h 02 min"
  meter.finish()
  assert lines[-1].startswith("analysis: 250 images in ")


def small(images, indices, **options):
  batch = {"image": images, "index": np.asarray(indices)}
  return analysis.analyse(
    options.pop("subject", table_subject()),
    [batch],
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
    analysis.analyse(table_subject(), [])
  with pytest.raises(UserError, match="8 of 8 images have"):
    small(ONES * 0, range(8))
  with pytest.raises(UserError, match="'size' has 3 values"):
    small(ONES, range(8), factors={"size": [1, 2, 3]})
  with pytest.raises(UserError, match="indices must be in"):
    small(ONES, range(-1, 7))
  flat = Subject(encode=lambda v, x: Encoding(_features(x), _features(x)))
  with pytest.raises(ValueError, match=r"\[B, M, b\]"):
    small(ONES, range(8), subject=flat)


def test_all_masked_is_no_image():
  batch = {
    "image": ONES,
    "index": np.arange(8),
    "mask": np.zeros(8, bool),
  }
  with pytest.raises(UserError, match="no images"):
    analysis.analyse(table_subject(), [batch], mesh=mesh_of(8), joint=False)


def test_more_bins_than_a_byte_holds():
  images = np.ones((8, 1, 300, 1), np.uint8)
  images[:, 0, 299] = 2
  result = small(images, range(8), num_top=2)
  assert result.codes.dtype == np.uint16
  assert (result.codes == 299).all()


def test_view_keys_differ_by_image_and_view_only():
  key = jax.random.key(3)
  bits = lambda indices, view: jax.random.key_data(
    accumulate.view_keys(key, jnp.array(indices), view)
  )
  first = bits([4, 9, 2], 0)
  np.testing.assert_array_equal(bits([9, 4], 0), first[jnp.array([1, 0])])
  everything = np.concatenate([first, bits([4, 9, 2], 1)])
  assert len(np.unique(everything, axis=0)) == 6
