"""The entropy terms: two kernels, every idiom, costs from compiled programs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks.costs import hlo
from imsvd_jax.objectives.joint_entropy import (
  choose_kernel,
  joint_entropy_terms,
  off_diagonal_plain,
)
from imsvd_jax.objectives.joint_entropy_streamed import (
  off_diagonal_streamed,
  tile_side,
)
from tests.objectives import idioms, numpy_objectives

P = jax.sharding.PartitionSpec
AXIS = idioms.AXIS


def soft_variables(num_images, num_variables, num_bins):
  """Soft variables [N, M, b] of two related views, float32."""
  rng = np.random.default_rng(0)
  shape = (num_images, num_variables, num_bins)
  common = rng.normal(size=shape)
  views = [common + 0.5 * rng.normal(size=shape) for _ in "12"]
  softmax = numpy_objectives.softmax
  return [np.float32(softmax(z, num_bins, 0.5)) for z in views]


def reference(q1, q2):
  """off_diagonal and its gradients in float64, by hand."""
  n, m, _ = q1.shape
  q1, q2 = np.float64(q1), np.float64(q2)
  p = np.einsum("imd,ine->mdne", q1, q2) / n
  slope = np.where(p > 0, np.log(np.maximum(p, 1e-300)), 0.0)
  different = (1 - np.eye(m))[:, None, :, None] / max(m * (m - 1), 1)
  value = np.sum(different * p * slope)
  slope = different * (slope + 1) / n
  d_q1 = np.einsum("ine,mdne->imd", q2, slope)
  d_q2 = np.einsum("imd,mdne->ine", q1, slope)
  return value, (d_q1, d_q2)


def with_gradients(function):
  return jax.value_and_grad(function, argnums=(0, 1))


def split(function):
  """`function(q1, q2, axis_name)` on slices over 8 devices."""
  return jax.shard_map(
    functools.partial(function, axis_name=AXIS),
    mesh=idioms.mesh(),
    in_specs=(P(AXIS), P(AXIS)),
    out_specs=P(),
  )


def assert_close(actual, expected, rtol=1e-5):
  """Values, and gradients to rtol of their largest entry."""
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.max(np.abs(e)))


# --- The numbers --------------------------------------------------------------


@pytest.mark.parametrize(
  ("num_images", "num_variables", "num_bins", "side"),
  [
    (2, 3, 5, 4),  # Variables cut by tiles; one tile is padding mostly.
    (8, 1, 4, 3),  # No off-diagonal block at all.
    (16, 13, 2, 8),
    (64, 5, 128, 200),
    (256, 7, 16, None),  # One tile.
    (2048, 9, 3, 10),
  ],
)
def test_streamed_equals_plain_and_the_formula(
  num_images, num_variables, num_bins, side
):
  q1, q2 = soft_variables(num_images, num_variables, num_bins)
  streamed = functools.partial(off_diagonal_streamed, tile_side=side)

  @jax.jit
  def every(q1, q2):
    results = {
      "plain": with_gradients(off_diagonal_plain)(q1, q2),
      "streamed": with_gradients(streamed)(q1, q2),
      "value alone": (streamed(q1, q2), None),
    }
    if num_images % 8 == 0:
      results["8 devices"] = with_gradients(split(streamed))(q1, q2)
    return results

  results = every(q1, q2)
  value, gradients = reference(q1, q2)
  assert_close(results.pop("value alone")[0], value)
  for result in results.values():
    assert_close(result, (value, gradients))
    assert_close(result, results["plain"])


def test_empty_cells_pull_like_the_plain_formula():
  """One-hot codes have cells of exactly 0; the true slope there is inf."""
  rng = np.random.default_rng(0)
  q1, q2 = np.float32(np.eye(4)[rng.integers(0, 4, (2, 8, 3))])
  plain = with_gradients(off_diagonal_plain)(q1, q2)
  assert np.max(np.abs(plain[1][0])) > 10 * abs(plain[0]) / 8  # They occur.
  for side in (None, 5):
    streamed = functools.partial(off_diagonal_streamed, tile_side=side)
    assert_close(with_gradients(streamed)(q1, q2), plain)


def test_float64_and_half_precision():
  q1, q2 = soft_variables(16, 5, 4)
  streamed = with_gradients(
    functools.partial(off_diagonal_streamed, tile_side=8)
  )
  with jax.enable_x64():
    wide = streamed(*(jnp.asarray(q, jnp.float64) for q in (q1, q2)))
    assert_close(wide, reference(q1, q2), rtol=1e-12)

  half = [jnp.asarray(q, jnp.bfloat16) for q in (q1, q2)]
  terms = lambda q1, q2: sum(joint_entropy_terms(q1, q2, kernel="streamed"))
  value, gradients = with_gradients(terms)(*half)
  assert value.dtype == jnp.float32  # Never computes in less.
  assert all(g.dtype == jnp.bfloat16 for g in gradients)
  exact = with_gradients(terms)(*(np.float32(q) for q in half))
  assert_close(value, exact[0])
  assert_close([np.float32(g) for g in gradients], exact[1], rtol=4e-3)


# --- The idioms ---------------------------------------------------------------

NUM_BINS = 4


def terms_loss(zs, *, targets, key, axis_name, kernel):
  del targets, key
  q1, q2 = (
    jax.nn.softmax(z.reshape(z.shape[0], -1, NUM_BINS), axis=-1) for z in zs
  )
  diagonal, off_diagonal = joint_entropy_terms(q1, q2, axis_name, kernel=kernel)
  terms = {"diagonal": diagonal, "off_diagonal": off_diagonal}
  return diagonal + 2 * off_diagonal, terms


@pytest.fixture(scope="module")
def problem():
  """Shared weights, two views, and the plain formula on one device."""
  rng = np.random.default_rng(0)
  xs = [np.float32(rng.normal(size=(16, 6))) for _ in "12"]
  # 20 entries, padded to 24.
  w = np.float32(rng.normal(size=(6, 5 * NUM_BINS)))
  arguments = (w, xs, xs, jax.random.key(0))
  step = idioms.make_step(terms_loss, kernel="plain")
  return arguments, jax.jit(idioms.one_device(step))(*arguments)


@pytest.mark.parametrize("kernel", ["plain", "streamed"])
def test_one_device_equals_eight_in_every_idiom(problem, kernel):
  arguments, expected = problem
  step = idioms.make_step(terms_loss, kernel=kernel)
  results = idioms.sharded(step)(*arguments)
  results["pmap"] = idioms.pmapped(step)(*arguments)
  with jax.set_mesh(idioms.mesh()):
    results["mesh in context"] = idioms.sharded(step)(*arguments)["plain jit"]
  for result in results.values():
    assert_close(result, expected)


def test_a_batch_over_two_mesh_axes(problem):
  (w, xs, _, _), expected = problem
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((2, 4), ("replica", "data"), axis_types=auto)
  axes = mesh.axis_names
  step = idioms.make_step(terms_loss, kernel="streamed")
  run = lambda w, xs, axis_name: jax.value_and_grad(
    lambda w: step(w, xs, None, None, axis_name), has_aux=True
  )(w)
  mapped = jax.shard_map(
    functools.partial(run, axis_name=axes),
    mesh=mesh,
    in_specs=(P(), P(axes)),
    out_specs=P(),
  )
  assert_close(jax.jit(mapped)(w, xs), expected)
  with jax.set_mesh(mesh):
    rows = jax.device_put(xs, jax.sharding.NamedSharding(mesh, P(axes)))
    whole = jax.jit(functools.partial(run, axis_name=None))(w, rows)
  assert_close(whole, expected)


def test_a_batch_that_does_not_divide_over_the_mesh():
  q1, q2 = soft_variables(12, 5, 4)
  terms = functools.partial(joint_entropy_terms, kernel="streamed")
  with jax.set_mesh(idioms.mesh()):
    _, off_diagonal = jax.jit(terms)(q1, q2)
  assert_close(off_diagonal, reference(q1, q2)[0])


# --- The choice ---------------------------------------------------------------


def test_the_choice_of_kernel():
  assert choose_kernel(2048, 8160, 1) == "streamed"
  assert choose_kernel(2048, 8160, 8) == "streamed"
  assert choose_kernel(256, 64, 1) == "plain"
  # The plain formula moves D x D, the streamed kernel N x D twice.
  assert choose_kernel(512, 256, 1) == "streamed"
  assert choose_kernel(512, 256, 8) == "plain"
  assert choose_kernel(128, 256, 8) == "streamed"


def loops(kernel, num_entries=256):
  """How many loops over tiles the gradient's program has."""
  shape = jax.ShapeDtypeStruct((8, num_entries // 4, 4), jnp.float32)
  terms = functools.partial(joint_entropy_terms, kernel=kernel)
  gradient = jax.grad(lambda q: terms(q, q)[1])
  return jax.make_jaxpr(gradient)(shape).pretty_print().count("scan[")


def test_the_choice_can_be_overridden():
  assert loops("auto") == loops("streamed") > 0
  assert loops("plain") == 0
  assert loops("auto", num_entries=64) == 0
  assert loops("streamed", num_entries=64) > 0


def test_bad_names_are_refused():
  q = jnp.full((4, 2, 2), 0.5)
  with pytest.raises(UserError, match=r"'streamd'.*streamed"):
    joint_entropy_terms(q, q, kernel="streamd")
  with pytest.raises(UserError, match=r"'hihgest'.*highest"):
    joint_entropy_terms(q, q, precision="hihgest")


@pytest.mark.parametrize(
  ("platform", "precision", "expected"),
  [
    ("tpu", "auto", "HIGH"),
    ("cuda", "auto", "HIGHEST"),
    ("cpu", "auto", "HIGHEST"),
    ("tpu", "highest", "HIGHEST"),
    ("cuda", "tensorfloat32", "HIGH"),
  ],
)
def test_the_precision_of_the_products(platform, precision, expected):
  shape = jax.ShapeDtypeStruct((8, 64, 4), jnp.float32)
  loss = lambda q: joint_entropy_terms(q, q, precision=precision)[1]
  traced = jax.jit(jax.grad(loss)).trace(shape)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert len(products) == 3
  assert all(f"[{expected}, {expected}]" in line for line in products)


def test_tiles_cover_evenly_and_need_no_padding_on_a_cpu():
  for length in (1, 20, 1024, 1025, 8160, 65_536):
    for platform in ("cpu", "gpu", "tpu"):
      side = tile_side(length, platform)
      tiles = math.ceil(length / side)
      assert side <= {"cpu": 1024}.get(platform, 4096)
      assert tiles * side < 1.04 * length + 1
  assert 8160 % tile_side(8160, "cpu") == 0
  assert tile_side(8160, "tpu") % 128 == 0


# --- What it costs, from the compiled programs at full size -------------------

N, M, B = 2048, 102, 80
MATRIX = 4 * (M * B) ** 2  # Bytes of one D x D matrix: 266 MB.


def compiled(function, shape=(N, M, B), sharding=None):
  """The program for value and gradient; compiled, not run."""
  q = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
  return jax.jit(with_gradients(function)).lower(q, q).compile()


def terms_of(kernel):
  return lambda q1, q2: sum(joint_entropy_terms(q1, q2, kernel=kernel))


def temporary_bytes(kernel, shape=(N, M, B)):
  program = compiled(terms_of(kernel), shape)
  return program.memory_analysis().temp_size_in_bytes


def test_memory_is_a_quarter_of_the_plain_formulas():
  plain, streamed = map(temporary_bytes, ("plain", "auto"))
  assert plain > 4 * MATRIX
  assert streamed < plain / 4
  assert streamed < 450e6


def test_memory_has_no_quadratic_term():
  """D = 65,536: one D x D matrix would be 17 GB."""
  assert temporary_bytes("auto", (1024, 512, 128)) < 4e9


def flops(program):
  counted = hlo.Program(program.as_text())
  assert counted.unknown_loops == 0
  return sum(work.flops for work in counted.work())


def test_work_and_traffic_per_device():
  mesh = idioms.mesh()
  rows = jax.sharding.NamedSharding(mesh, P(AXIS))
  product = 2 * N * (M * B) ** 2
  alone = compiled(terms_of("auto"))
  assert flops(alone) == pytest.approx(3 * product, rel=0.01)
  with jax.set_mesh(mesh):
    shared = compiled(terms_of("auto"), sharding=rows)
  assert flops(shared) < 1.15 / 8 * flops(alone)
  collectives = hlo.Program(shared.as_text()).collectives()
  kinds = {c.kind for c in collectives}
  assert {"all-gather", "all-to-all", "reduce-scatter"} <= kinds
  # [N, D] and its gradient, and an eighth of them for the rows.
  moved = sum(c.runs * c.bytes for c in collectives)
  assert moved < 1.01 * 2 * (1 + 1 / 8) * 4 * N * M * B
  assert moved < MATRIX


def test_the_traffic_of_the_plain_formula_would_be_seen():
  rows = jax.sharding.NamedSharding(idioms.mesh(), P(AXIS))
  program = compiled(terms_of("plain"), sharding=rows)
  collectives = hlo.Program(program.as_text()).collectives()
  assert sum(c.runs * c.bytes for c in collectives) >= MATRIX


@pytest.mark.slow
def test_an_embedding_of_65536_entries_runs():
  q1, q2 = soft_variables(1024, 512, 128)
  value, gradients = jax.jit(with_gradients(terms_of("auto")))(q1, q2)
  assert -2 * math.log(128) - math.log(128) < value < 0
  assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


# --- On a GPU -----------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
  ("precision", "rtol"),
  [("auto", 1e-5), ("highest", 1e-5), ("tensorfloat32", 1e-3)],
)
def test_gpu_equals_float64(precision, rtol):
  assert jax.default_backend() == "gpu"
  q1, q2 = soft_variables(512, 64, 80)  # 5120 entries: several tiles.
  streamed = functools.partial(
    joint_entropy_terms, kernel="streamed", precision=precision
  )
  off_diagonal = lambda q1, q2: streamed(q1, q2)[1]
  result = jax.jit(with_gradients(off_diagonal))(q1, q2)
  assert_close(result, reference(q1, q2), rtol=rtol)


@pytest.mark.gpu
def test_gpu_memory():
  assert jax.default_backend() == "gpu"
  plain, streamed = map(temporary_bytes, ("plain", "auto"))
  # Tiles are 4096 x 4096 there: 67 MB each.
  assert streamed < plain / 2
