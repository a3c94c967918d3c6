"""Networks: sizes, stems, precision, recomputation, devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from imsvd_jax import models
from imsvd_jax.base.errors import UserError
from imsvd_jax.models import resnet

# torchvision's numbers, less the classifier of 1000 classes.
PARAMETERS = {
  "resnet18": 11_689_512 - 513_000,
  "resnet34": 21_797_672 - 513_000,
  "resnet50": 23_508_032,
  "resnet101": 44_549_160 - 2_049_000,
  "resnet152": 60_192_808 - 2_049_000,
}


def shapes_of(net, image_size=64):
  images = jnp.zeros((2, image_size, image_size, 3))
  return jax.eval_shape(lambda: net.init(jax.random.key(0), images, False))


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_close(actual, expected, atol, rtol=0):
  close = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
  jax.tree.map(close, actual, expected)


RESNETS = [name for name in models.BACKBONES if name.startswith("resnet")]


@pytest.mark.parametrize("name", RESNETS)
def test_parameter_counts_are_torchvisions(name):
  # resnet10 and resnet8 are nobody's standard: counted by hand, ResNet-18 less
  # the second block of each stage, and less the last stage.
  second_blocks = sum(2 * 9 * n * n + 4 * n for n in (64, 128, 256, 512))
  last_stage = 9 * (256 * 512 + 512 * 512) + 256 * 512 + 6 * 512
  ten = PARAMETERS["resnet18"] - second_blocks
  known = PARAMETERS | {"resnet10": ten, "resnet8": ten - last_stage}
  variables = shapes_of(models.BACKBONES[name]())
  assert count(variables["params"]) == known[name]


@pytest.mark.parametrize(
  ("stem", "size"), [("imagenet", 2), ("cifar", 8), ("small", 4)]
)
def test_stems(stem, size):
  net = models.BACKBONES["resnet18"](width_multiplier=0.25, stem=stem)
  maps_of = functools.partial(net.apply, method="feature_maps")
  maps = jax.eval_shape(maps_of, shapes_of(net), jnp.zeros((2, 64, 64, 3)))
  assert maps.shape == (2, size, size, 128)
  assert maps.shape[-1] == net.num_features


@pytest.mark.parametrize(
  ("width", "filters"), [(0.25, 16), (0.375, 24), (2, 128)]
)
def test_width_scales_every_stage(width, filters):
  net = models.BACKBONES["resnet50"](width_multiplier=width)
  params = shapes_of(net)["params"]
  assert params["conv1"]["kernel"].shape == (7, 7, 3, filters)
  for stage in range(4):
    inner = params[f"layer{stage + 1}_1"]["conv2"]["kernel"].shape
    assert inner == (3, 3, filters * 2**stage, filters * 2**stage)
  assert net.num_features == 32 * filters


@pytest.fixture
def as_on_a_gpu(monkeypatch):
  monkeypatch.setattr(
    jax.lax, "platform_dependent", lambda *a, cuda, default: cuda(*a)
  )


@pytest.mark.parametrize(
  ("height", "width"), [(8, 8), (7, 9), (6, 5), (1, 1), (2, 3)]
)
def test_a_gpu_gathers_the_gradient_of_the_maximum(as_on_a_gpu, height, width):
  draw = jax.random.normal(jax.random.key(0), (2, height, width, 3))
  x = jnp.round(4 * jnp.maximum(draw, -0.5)) / 4  # Many are equal.
  plain = lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
  y, transpose = jax.vjp(resnet.max_pool, x)
  expected, transpose_plain = jax.vjp(plain, x)
  gradient = jax.random.normal(jax.random.key(1), y.shape)
  np.testing.assert_array_equal(y, expected)
  np.testing.assert_array_equal(
    transpose(gradient)[0], transpose_plain(gradient)[0]
  )


def test_user_mistakes():
  with pytest.raises(UserError, match=r"stem 'cifer'.*'cifar'.*Known: cifar, "):
    models.BACKBONES["resnet18"](stem="cifer")
  with pytest.raises(UserError, match=r"init 'torch'.*Known: fan_out_normal, "):
    models.BACKBONES["resnet18"](kernel_init="torch")
  for parts in (0, 9):
    with pytest.raises(UserError, match=rf"pool_grid={parts}; expected 1.* 8"):
      models.BACKBONES["resnet18"](pool_grid=parts)
  with pytest.raises(UserError, match=r"width_multiplier 0\.001"):
    models.BACKBONES["resnet18"](width_multiplier=0.001)
  with pytest.raises(UserError, match="expected at least one"):
    models.Projector(()).init(jax.random.key(0), jnp.zeros((2, 8)), False)


# ---- one tiny encoder, compiled few times ----------------------------------


def tiny_encoder(**settings):
  net = models.BACKBONES["resnet10"](
    width_multiplier=1 / 8, stem="small", **settings
  )
  dtype = settings.get("dtype", jnp.float32)
  return models.Encoder(net, models.Projector((24, 16), dtype=dtype))


def images(batch_size=16):
  rng = np.random.default_rng(0)
  return rng.normal(size=(batch_size, 12, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
  init = lambda key: tiny_encoder().init(key, images(2), False)
  return jax.jit(init)(jax.random.key(0))


def trained(variables, seed=0):
  """Batch-norm scales away from the zeros that they start with."""
  rng = np.random.default_rng(seed)

  def change(path, leaf):
    if path[-1].key == "scale":
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
    return leaf

  return jax.tree.map_with_path(change, variables)


def train_outputs(encoder, variables, x):
  """Loss, gradients, batch statistics and outputs in train mode."""

  def loss(params):
    (features, embeddings), updated = encoder.apply(
      {**variables, "params": params}, x, True, mutable=["batch_stats"]
    )
    value = jnp.mean(embeddings**3) + jnp.mean(features**2)
    return value, (updated["batch_stats"], features, embeddings)

  return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.fixture(scope="module")
def train_mode():
  return jax.jit(functools.partial(train_outputs, tiny_encoder()))


@pytest.fixture(scope="module")
def single_device(train_mode, variables):
  return train_mode(trained(variables), images())


def test_initialisation(variables):
  params = variables["params"]
  for name, block in params["backbone"].items():
    if name.startswith("layer"):
      # The residual branch adds nothing at first.
      np.testing.assert_array_equal(block["bn2"]["scale"], 0)
      np.testing.assert_array_equal(block["bn1"]["scale"], 1)
  kernel = params["backbone"]["layer4_0"]["conv2"]["kernel"]  # [3, 3, 64, 64]
  assert np.std(kernel) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.03)
  dense = params["projector"]["dense_0"]
  bound = 64**-0.5
  for leaf in (dense["kernel"], dense["bias"]):
    assert bound * 0.8 < np.abs(leaf).max() <= bound
  assert "bias" not in params["projector"]["dense_1"]


def test_parts_of_a_map_are_pooled_apart():
  """A patch's code is that of an image which looks like it everywhere."""
  net = models.BACKBONES["resnet8"](1 / 16, stem="cifar", pool_grid=2)
  encoder = models.Encoder(net, models.Projector((8, 6)))
  x = images(2)
  init = jax.jit(lambda: encoder.init(jax.random.key(0), x, False))
  variables = init()
  features, z = encoder.apply(variables, x, False)
  maps, patches = encoder.apply(variables, x, method="patch_embeddings")
  assert maps.shape == (2, 3, 3, 16)
  assert features.shape == (2, 64)
  top_right = maps[:, :2, 1:].mean((1, 2))
  np.testing.assert_allclose(features[:, 1::4], top_right, rtol=1e-5, atol=1e-6)
  again = encoder.apply(variables, maps, method="embed_spatial")
  np.testing.assert_allclose(again, z, rtol=1e-5, atol=1e-6)
  everywhere = jnp.broadcast_to(maps[:, 1:2, 2:], maps.shape)
  expected = encoder.apply(variables, everywhere, method="embed_spatial")
  np.testing.assert_allclose(patches[:, 1, 2], expected, rtol=1e-5, atol=1e-6)


def test_encoder_returns_pooled_maps_and_embeddings(variables, single_device):
  encoder = tiny_encoder()
  (_, (_, features, embeddings)), _ = single_device
  assert features.shape == (16, 64)
  assert embeddings.shape == (16, 16)
  evaluate = jax.jit(
    lambda v, x: (
      encoder.apply(v, x, False),
      encoder.apply(v, x, method="features"),
      encoder.apply(v, x, method="feature_maps"),
    )
  )
  (features, _), same, maps = evaluate(variables, images(4))
  np.testing.assert_array_equal(features, same)
  np.testing.assert_allclose(features, np.mean(maps, (1, 2)), rtol=1e-6)


def test_eight_devices_equal_one(variables, train_mode, single_device):
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  rows, everywhere = (NamedSharding(mesh, P(*axis)) for axis in (["data"], []))
  x = jax.device_put(images(), rows)
  sharded = train_mode(jax.device_put(trained(variables), everywhere), x)
  assert_close(sharded, single_device, rtol=2e-4, atol=2e-6)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(
  variables, single_device
):
  encoder = tiny_encoder(dtype=jnp.bfloat16)
  function = functools.partial(train_outputs, encoder)
  low = jax.jit(function)(trained(variables), images())
  assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("float32")}
  (_, (statistics, features, _)), _ = low
  (_, (exact_statistics, exact_features, _)), _ = single_device
  error = np.abs(features - exact_features).max() / np.abs(exact_features).max()
  assert 1e-4 < error < 0.05
  assert_close(statistics, exact_statistics, rtol=0.02, atol=0.02)
  shapes = jax.eval_shape(
    lambda: encoder.init(jax.random.key(0), images(2), False)
  )
  kinds = {leaf.dtype for leaf in jax.tree.leaves(shapes)}
  assert kinds == {jnp.dtype("float32")}
  lines = str(jax.make_jaxpr(function)(variables, images(2))).splitlines()
  convolutions = [line for line in lines if "conv_general_dilated" in line]
  assert convolutions
  assert all("bf16" in line.split("=")[0] for line in convolutions)


def test_remat_changes_nothing_but_the_program(variables, single_device):
  encoder = tiny_encoder(remat=True)
  function = functools.partial(train_outputs, encoder)
  program = str(jax.make_jaxpr(function)(variables, images(2)))
  assert "remat" in program or "checkpoint" in program
  again = jax.jit(function)(trained(variables), images())
  assert_close(again, single_device, rtol=1e-4, atol=1e-6)
