"""Names and shapes: ours, torch's, and what is said when they do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from imsvd_jax import formats, models
from imsvd_jax.base.errors import UserError
from imsvd_jax.formats import detectron2
from imsvd_jax.formats.architecture import entries

Architecture = formats.Architecture


def encoder(architecture):
  net = architecture.network()
  head = models.Projector(
    architecture.projector, architecture.hidden_bias, architecture.last_bias
  )
  return models.Encoder(net, head)


def variables_of(architecture, seed=0):
  """Random variables with the Linen module's own names and shapes."""
  images = jnp.zeros((1, 32, 32, architecture.channels))
  shapes = jax.eval_shape(
    lambda: encoder(architecture).init(jax.random.key(0), images, False)
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes
  )


def assert_same(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def backbone_of(variables):
  return {
    kind: {"backbone": variables[kind]["backbone"]}
    for kind in ("params", "batch_stats")
  }


def fake(architecture, prefix="", rename=lambda key: key):
  """A state dict with an official layout, made from shapes alone."""
  rng = np.random.default_rng(0)
  state = {}
  for entry in entries(architecture):
    key = entry.key if prefix else entry.key.removeprefix("backbone.")
    value = rng.uniform(0.5, 1, size=entry.shape)
    if len(entry.shape) > 1:
      value = rng.normal(size=entry.shape) / np.prod(entry.shape[1:]) ** 0.5
    value = np.array(5) if entry.path is None else value.astype(np.float32)
    state[prefix + rename(key)] = value
  return state


TINY = Architecture("resnet10", 1 / 16, "small", projector=(12, 8, 6))


@pytest.fixture(scope="module")
def variables():
  return variables_of(TINY)


@pytest.fixture(scope="module")
def state(variables):
  return formats.to_torchvision(variables, projector=True)


# ---- both sides have the same tensors --------------------------------------


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_table_of_names_covers_the_module(backbone):
  variables = variables_of(Architecture(backbone, 1 / 16, projector=(8, 4)))
  architecture = formats.architecture_of(variables)
  ours = {path: leaf.shape for path, leaf in flatten_dict(variables).items()}
  table = entries(architecture)
  assert {e.path for e in table if e.path} == set(ours)
  for entry in table:
    if entry.path:
      # Kernels are transposed, so that sorted sizes must agree.
      assert sorted(entry.shape) == sorted(ours[entry.path])
  formats.check_variables(variables, architecture)


@pytest.mark.parametrize(
  ("hidden_bias", "last_bias"), [(True, False), (False, False), (False, True)]
)
@pytest.mark.parametrize(
  ("backbone", "width", "stem", "channels"),
  [
    ("resnet8", 0.375, "small", 3),
    ("resnet10", 0.375, "small", 1),
    ("resnet18", 1.0, "imagenet", 3),
    ("resnet34", 0.25, "cifar", 3),
    ("resnet50", 0.125, "imagenet", 3),
    ("resnet101", 0.0625, "imagenet", 3),
    ("resnet152", 0.0625, "cifar", 3),
  ],
)
def test_round_trip_recognises_the_network(
  backbone, width, stem, channels, hidden_bias, last_bias
):
  architecture = Architecture(
    backbone, width, stem, channels, (24, 16, 8), hidden_bias, last_bias
  )
  variables = variables_of(architecture)
  assert formats.architecture_of(variables) == architecture
  state = formats.to_torchvision(variables, projector=True)
  imported = formats.from_torchvision(state)
  assert imported.architecture == architecture
  assert imported.classifier is None
  assert imported.ignored == ()
  assert_same(imported.variables, variables)


def test_layout(variables, state):
  kernel = variables["params"]["backbone"]["conv1"]["kernel"]  # HWIO
  found = state["backbone.conv1.weight"]
  assert found.shape == (4, 3, 5, 5)
  assert found[1, 2, 3, 4] == kernel[3, 4, 2, 1]
  dense = variables["params"]["projector"]["dense_0"]["kernel"]
  np.testing.assert_array_equal(state["projector.0.weight"], dense.T)
  assert all(value.flags["C_CONTIGUOUS"] for value in state.values())
  assert state["backbone.bn1.num_batches_tracked"].dtype == np.int64


def test_backbone_alone_has_torchvisions_own_names(variables):
  classifier = {"kernel": np.ones((32, 5), np.float32), "bias": np.zeros(5)}
  state = formats.to_torchvision(
    variables, classifier=classifier, num_batches_tracked=9
  )
  assert list(state)[:2] == ["conv1.weight", "bn1.weight"]
  assert "layer2.0.downsample.1.running_var" in state
  assert state["fc.weight"].shape == (5, 32)
  assert state["bn1.num_batches_tracked"] == 9
  imported = formats.from_torchvision(state)
  assert imported.architecture.projector == ()
  assert set(imported.variables["params"]) == {"backbone"}
  np.testing.assert_array_equal(
    imported.classifier["kernel"], classifier["kernel"]
  )


def test_detectron2_names():
  architecture = Architecture("resnet50", 1 / 16)
  whole = dataclasses.replace(architecture, projector=(4,))
  backbone = backbone_of(variables_of(whole))
  state = detectron2.to_detectron2(backbone)
  for key in (
    "stem.conv1.weight",
    "stem.conv1.norm.running_mean",
    "res2.0.shortcut.weight",
    "res2.0.shortcut.norm.weight",
    "res2.0.conv3.norm.bias",
    "res5.2.conv2.weight",
  ):
    assert key in state
  assert not any("bn" in key or "layer" in key for key in state)
  assert not any("num_batches" in key for key in state)
  imported = detectron2.from_detectron2(state)
  assert imported.architecture == architecture
  assert_same(imported.variables, backbone)
  for key in list(state)[::9]:  # Errors speak detectron2's language.
    rest = {k: v for k, v in state.items() if k != key}
    with pytest.raises(UserError) as error:
      detectron2.from_detectron2(rest, architecture)
    assert f"missing {key}." in str(error.value)


@pytest.mark.parametrize(
  ("architecture", "reason"),
  [
    (Architecture("resnet10"), "its depths are 18, 34"),
    (Architecture("resnet50", stem="cifar"), "its stem"),
    (Architecture("resnet18", 0.5), "width 1"),
  ],
)
def test_detectron2_refuses_what_it_cannot_build(architecture, reason):
  with pytest.raises(UserError, match=reason):
    detectron2.detectron2_config(formats.Content("x", architecture))


def test_detectron2_config():
  found = detectron2.detectron2_config(
    formats.Content(
      "encoder.pth",
      Architecture("resnet50"),
      mean=(0.485, 0.456, 0.406),
      std=(0.229, 0.224, 0.225),
    )
  )
  assert "PIXEL_MEAN: [123.675, 116.28, 103.53]" in found
  assert "PIXEL_STD: [58.395, 57.12, 57.375]" in found
  assert "STRIDE_IN_1X1: False" in found
  assert "RES2_OUT_CHANNELS: 256" in found
  assert 'FORMAT: "RGB"' in found


def test_timm_refuses_other_widths(variables, tmp_path):
  with pytest.raises(UserError, match=r"width 0.0625.*--format=torchvision"):
    formats.write_file(
      tmp_path / "x", variables, format_name="timm", metadata={}
    )


# ---- what does not fit is named --------------------------------------------


def test_every_missing_key_is_named(state):
  for key in state:
    rest = {k: v for k, v in state.items() if k != key}
    if key.endswith("num_batches_tracked"):
      assert formats.from_torchvision(rest).architecture == TINY
    elif key.endswith(("projector.0.bias", "projector.3.bias")):
      with pytest.raises(UserError, match=key.replace(".", r"\.")):
        formats.from_torchvision(rest)
    else:
      with pytest.raises(UserError) as error:
        formats.from_torchvision(rest)
      assert key.removeprefix("backbone.") in str(error.value)
      if key != "backbone.conv1.weight":  # Without it there is no network.
        assert key in str(error.value)
      assert "\n" not in str(error.value)


def test_every_unexpected_key_is_named(state):
  for key in (
    "backbone.layer1.0.conv3.weight",
    "backbone.layer1.1.conv1.weight",
    "backbone.layer5.0.conv1.weight",
    "backbone.conv1.bias",
    "projector.6.bias",
    "predictor.0.weight",
    "queue",
  ):
    with pytest.raises(UserError) as error:
      formats.from_torchvision(
        {**state, key: np.zeros(4, np.float32)}, architecture=TINY
      )
    assert key in str(error.value)


def test_every_misshapen_key_is_named(state):
  for key, value in state.items():
    wrong = np.zeros((*value.shape, 2), np.float32)
    with pytest.raises(UserError) as error:
      formats.from_torchvision({**state, key: wrong}, architecture=TINY)
    assert f"{key} is {list(wrong.shape)}" in str(error.value)
    assert str(list(value.shape)) in str(error.value)


def test_one_damaged_tensor_does_not_hide_among_others(state):
  """Without being told the network, the blame falls on the right tensor."""
  for key in ("backbone.bn1.weight", "backbone.layer1.0.bn1.weight"):
    wrong = {**state, key: np.zeros(7, np.float32)}
    with pytest.raises(UserError) as error:
      formats.from_torchvision(wrong)
    assert str(error.value).count(" instead of ") == 1
    assert key in str(error.value)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (np.float32([1, 1, np.nan, 1]), "not finite"),
    (np.float32([1, 1, 1, np.inf]), "not finite"),
    (np.ones(4, np.int8), "holds int8 values"),
  ],
)
def test_values_that_no_network_has(values, message, state):
  key = "backbone.bn1.running_var"
  with pytest.raises(UserError, match=f"{key} .*{message}|{key} {message}"):
    formats.from_torchvision({**state, key: values})


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"conv1.weight": (64, 3, 9, 9)}, "kernel of 9"),
    ({"layer1.2.conv1.weight": (64, 64, 3, 3)}, r"stages of \[3, 2, 2, 2\]"),
    ({"layer1.0.conv1.weight": (128, 64, 3, 3)}, "layer1.0.conv1.weight is"),
    ({"layer1.0.conv2.weight": (64, 2, 3, 3)}, "layer1.0.conv2.weight is"),
    ({"fc.weight": (10, 512)}, "fc.bias"),
  ],
)
def test_other_networks(changes, message):
  shapes = {
    e.key.removeprefix("backbone."): e.shape
    for e in entries(Architecture("resnet18"))
  }
  arrays = {k: np.zeros(s, np.float32) for k, s in (shapes | changes).items()}
  with pytest.raises(UserError, match=message):
    formats.from_torchvision(arrays)


def test_variables_of_another_network(variables):
  with pytest.raises(UserError, match=r"missing params/.*layer1_1"):
    formats.to_torchvision(variables, Architecture("resnet18", 1 / 16, "small"))
  with pytest.raises(UserError, match="no projector"):
    formats.to_torchvision(backbone_of(variables), projector=True)
