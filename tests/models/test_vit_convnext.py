"""ViT and ConvNeXt: timm's numbers, options, precision, stochastic depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax import formats, models
from imsvd_jax.base.errors import UserError
from imsvd_jax.models.layers import DROP_PATH
from imsvd_jax.models.vit import resized_positions

# timm's numbers without the classifier of 1000 classes.
PARAMETERS = {
  "vit_tiny": 5_717_416 - 193_000,
  "vit_small": 22_050_664 - 385_000,
  "vit_base": 86_567_656 - 769_000,
  "vit_large": 304_326_632 - 1_025_000,
  "convnext_tiny": 28_589_128 - 769_000,
  "convnext_small": 50_223_688 - 769_000,
  "convnext_base": 88_591_464 - 1_025_000,
}
# name: (backbone, options, pixels of a side that positions are learned for)
NETS = {
  "token": ("vit_micro", {"patch_size": 4}, 16),
  "mean": ("vit_micro", {"patch_size": 4, "pool": "mean"}, 16),
  "registers": (
    "vit_micro",
    {"patch_size": 4, "registers": 3, "layer_scale": 0.5},
    16,
  ),
  "convnext": ("convnext_micro", {"patch_size": 2, "layer_scale": 0.5}, 16),
}
WIDTHS = {"vit_micro": 1 / 3, "convnext_micro": 1 / 12}


def make(name, **more):
  backbone, options, size = NETS[name]
  options = {**options, **more}
  width = {"width_multiplier": WIDTHS[backbone], "stem": "imagenet"}
  return models.BACKBONES[backbone](**width, **options), size


def images(size, dtype=np.float32):
  rng = np.random.default_rng(0)
  return rng.normal(size=(3, size, size, 3)).astype(dtype)


def variables_of(net, size, dtype=np.float32):
  """Random weights large enough that every part matters."""
  x = jnp.zeros((1, size, size, 3))
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x, False))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    value = 0.3 * rng.normal(size=leaf.shape)
    return (value + (path[-1].key in ("scale", "gamma"))).astype(dtype)

  return {"params": jax.tree.map_with_path(draw, shapes["params"])}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_timms(name):
  net, x = models.BACKBONES[name](), jnp.zeros((1, 224, 224, 3))
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), x, False))
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == PARAMETERS[name]
  assert list(shapes) == ["params"]


# ---- timm's numbers --------------------------------------------------------


@pytest.fixture(scope="module")
def references():
  return pytest.importorskip("tests.torch_transformers")


def torch_state(references, variables):
  whole = {"params": {"backbone": variables["params"]}, "batch_stats": {}}
  state = formats.to_torchvision(whole)
  torch = references.torch
  return {k: torch.from_numpy(v).requires_grad_() for k, v in state.items()}


def reference(references, name, net, side):
  if name == "convnext":
    return references.convnext
  return functools.partial(references.vit, heads=net.heads, side=side // 4)


def to_torch(references, x):
  return references.torch.from_numpy(np.moveaxis(x, -1, 1).copy())


@pytest.mark.parametrize("size", [16, 24, 12])
@pytest.mark.parametrize("name", NETS)
def test_features_are_those_of_a_torch_network(name, size, references):
  net, side = make(name)
  if name == "convnext":
    size += size // 2 + 1  # Odd sizes too; and no positions.
  variables = variables_of(net, side)
  state = torch_state(references, variables)
  expected = reference(references, name, net, side)(
    state, to_torch(references, images(size))
  )
  found = jax.jit(net.apply, static_argnums=2)(variables, images(size), False)
  assert found.shape == (3, net.num_features)
  np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-5)


@pytest.mark.parametrize("name", NETS)
def test_gradients_are_those_of_a_torch_network(name, references):
  with jax.enable_x64(True):
    net, size = make(name, dtype=jnp.float64)
    variables = variables_of(net, size, np.float64)
    x = images(size, np.float64)
    state = torch_state(references, variables)
    function = reference(references, name, net, size)
    (function(state, to_torch(references, x)) ** 3).sum().backward()
    loss = lambda v: jnp.sum(net.apply(v, x, True) ** 3)
    found = jax.jit(jax.grad(loss))(variables)
    found = torch_state(references, found)
  for key, tensor in state.items():
    scale = tensor.grad.abs().max().item()
    np.testing.assert_allclose(
      found[key].detach(), tensor.grad, atol=1e-9 * max(scale, 1), err_msg=key
    )


TIMM = {
  "vit_tiny_patch16_224": ("vit_tiny", {}, {"dynamic_img_size": True}),
  "deit_tiny_patch16_224": ("vit_tiny", {}, {"dynamic_img_size": True}),
  "vit_small_patch16_224": (
    "vit_small",
    {"registers": 4, "layer_scale": 1e-5, "pool": "mean", "patch_size": 14},
    {
      "reg_tokens": 4,
      "no_embed_class": True,
      "init_values": 1e-5,
      "global_pool": "avg",
      "patch_size": 14,
      "dynamic_img_size": True,
    },
  ),
  "convnext_tiny": ("convnext_tiny", {}, {}),
}


@pytest.mark.proof
@pytest.mark.parametrize("name", TIMM)
def test_features_are_those_of_timm(name, references):
  from tests.torch_resnet import import_or_skip

  timm, torch = import_or_skip("timm"), references.torch
  ours, options, theirs = TIMM[name]
  torch.manual_seed(0)
  model = timm.create_model(name, num_classes=0, **theirs).eval()
  for parameter in model.parameters():
    parameter.data += 0.02 * torch.randn(parameter.shape)
  state = {k: v.numpy() for k, v in model.state_dict().items()}
  imported = formats.from_torchvision(state)
  assert imported.architecture.backbone == ours
  net = models.make_backbone(ours, options)
  variables = {"params": imported.variables["params"]["backbone"]}
  for size in (224, 112):
    x = images(size)
    with torch.no_grad():
      expected = model(to_torch(references, x)).numpy()
    found = jax.jit(net.apply, static_argnums=2)(variables, x, False)
    np.testing.assert_allclose(found, expected, atol=1e-4)
  # Features per patch, as docs/interop.md has it.
  with torch.no_grad():
    theirs = model.forward_features(to_torch(references, x))
    if theirs.ndim == 4:  # [B, F, h, w] of a ConvNeXt.
      maps = model.head.norm(theirs).permute(0, 2, 3, 1)
    else:
      maps = model.fc_norm(theirs)[:, model.num_prefix_tokens :]
  found = jax.jit(functools.partial(net.apply, method="feature_maps"))(
    variables, x
  )
  np.testing.assert_allclose(
    found, maps.numpy().reshape(found.shape), atol=1e-3
  )
  again = formats.to_torchvision(imported.variables)
  assert again.keys() == state.keys()
  for key, value in state.items():
    np.testing.assert_array_equal(again[key], value)


# ---- our own promises ------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_maps_pooling_and_attribution_agree(name):
  net, size = make(name)
  encoder = models.Encoder(net, models.Projector((5,)))
  x = images(size)
  variables = encoder.init(jax.random.key(0), x, False)
  variables = {"params": dict(variables["params"])}
  variables["params"]["backbone"] = variables_of(net, size)["params"]

  @jax.jit
  def outputs(v, x):
    features, embeddings = encoder.apply(v, x, False)
    state = encoder.apply(v, x, method="spatial")
    again = encoder.apply(v, state, method="embed_spatial")
    maps = encoder.apply(v, x, method="feature_maps")
    return features, embeddings, again, maps, jax.tree.leaves(state)[0]

  features, embeddings, again, maps, spatial = outputs(variables, x)
  np.testing.assert_allclose(again, embeddings, rtol=1e-5, atol=1e-5)
  positions = 4 if "vit" in NETS[name][0] else 1
  assert maps.shape == (3, positions, positions, net.num_features)
  assert spatial.shape == maps.shape
  assert features.shape == (3, net.num_features)


def test_embeddings_per_patch_are_the_projectors_of_single_positions():
  net, size = make("registers")
  encoder = models.Encoder(net, models.Projector((6, 5)))
  x = images(size)
  variables = encoder.init(jax.random.key(0), x, False)
  maps, found = encoder.apply(variables, x, method="patch_embeddings")
  own = {name: part["projector"] for name, part in variables.items()}
  one = encoder.projector.apply(own, maps[:, 1, 2], False)
  np.testing.assert_allclose(found[:, 1, 2], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["token", "mean", "registers"])
def test_attention_is_the_softmax_of_the_last_block(name):
  net, size = make(name)
  encoder = models.Encoder(net, models.Projector((5,)))
  x = images(size)
  variables = {"params": {"backbone": variables_of(net, size)["params"]}}
  found = models.attention_maps(encoder, variables, x)
  maps, first = net.apply(
    {"params": variables["params"]["backbone"]}, x, method="spatial"
  )
  last = variables["params"]["backbone"][f"blocks_{net.depth - 1}"]
  tokens = np.concatenate([first, maps.reshape(3, 16, -1)], 1, dtype=np.float64)
  centered = tokens - tokens.mean(-1, keepdims=True)
  normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
  normed = normed * last["norm1"]["scale"] + last["norm1"]["bias"]
  qkv = normed @ last["attn"]["qkv"]["kernel"] + last["attn"]["qkv"]["bias"]
  q, k, _ = np.moveaxis(qkv.reshape(3, -1, 3, net.heads, net.head_size), 2, 0)
  logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(net.head_size)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  skip = first.shape[1]
  chosen = weights[:, :, skip:] if name == "mean" else weights[:, :, :1]
  expected = chosen[..., skip:].mean((1, 2)).reshape(3, 4, 4)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["registers", "convnext"])
def test_precision_and_recomputation(name):
  net, size = make(name)
  variables, x = variables_of(net, size), images(size)

  def run(**settings):
    other, _ = make(name, **settings)
    loss = lambda v: jnp.sum(other.apply(v, x, True) ** 2)
    return str(jax.make_jaxpr(jax.grad(loss))(variables)), jax.jit(
      lambda v: (other.apply(v, x, True), jax.grad(loss)(v))
    )(variables)

  _, (features, gradients) = run()
  program, (again, same) = run(remat=True)
  assert "remat" in program or "checkpoint" in program
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
  jax.tree.map(close, (again, same), (features, gradients))
  _, (low, gradients) = run(dtype=jnp.bfloat16)
  kinds = {leaf.dtype for leaf in jax.tree.leaves((low, gradients))}
  assert kinds == {jnp.dtype("float32")}
  error = np.abs(low - features).max() / np.abs(features).max()
  assert 1e-4 < error < 0.1


@pytest.mark.parametrize("name", ["token", "convnext"])
def test_stochastic_depth(name):
  net, size = make(name, drop_path=0.5)
  plain, _ = make(name)
  variables, x = variables_of(net, size), images(size)
  x = np.concatenate([x] * 4)

  def run(train, seed=None):
    rngs = None if seed is None else {DROP_PATH: jax.random.key(seed)}
    return net.apply(variables, x, train, rngs=rngs)

  expected = plain.apply(variables, x, True)
  for features in (run(False, 0), run(True)):  # Evaluation; a target network.
    np.testing.assert_array_equal(features, expected)
  first = run(True, 0)
  np.testing.assert_array_equal(first, run(True, 0))
  changed = np.abs(first - run(True, 1)).max(1) > 1e-3
  assert changed.any()
  # Another choice for every image of a batch, copies included.
  assert np.abs(first[:3] - first[3:6]).max() > 1e-3


def test_positions_follow_the_size():
  table = jnp.asarray(np.random.default_rng(0).normal(size=(1, 17, 4)))
  assert resized_positions(table, 17) is table
  larger = resized_positions(table, 37)
  assert larger.shape == (1, 37, 4)
  np.testing.assert_array_equal(larger[:, 0], table[:, 0])
  added = resized_positions(table[:, 1:], 17)
  np.testing.assert_array_equal(added[:, 0], 0)
  with pytest.raises(UserError, match="class token"):
    resized_positions(table, 16)
  with pytest.raises(UserError, match="23 positions"):
    resized_positions(table[:, :1].repeat(23, 1), 16)


def test_user_mistakes():
  vit, convnext = (
    models.BACKBONES["vit_tiny"],
    models.BACKBONES["convnext_tiny"],
  )
  with pytest.raises(
    UserError, match=r"pool='max'; expected 'token' or 'mean'"
  ):
    vit(pool="max")
  with pytest.raises(UserError, match=r"stem='cifer'.*cifar.*a ViT"):
    vit(stem="cifer")
  with pytest.raises(UserError, match=r"patch_size=-1"):
    convnext(patch_size=-1)
  with pytest.raises(UserError, match=r"resnet18 has no model\.drop_path=0\.1"):
    models.make_backbone("resnet18", {"drop_path": 0.1})
  with pytest.raises(UserError, match=r"100x100 pixels.*patches of 16x16"):
    models.check_size(vit(), 100)
  with pytest.raises(UserError, match=r"16x16 pixels.*needs 32"):
    models.check_size(convnext(), 16)
