"""Our networks compute what a PyTorch ResNet computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from imsvd_jax import models  # noqa: E402
from imsvd_jax.formats import from_torchvision, to_torchvision  # noqa: E402
from imsvd_jax.models.resnet import Bottleneck, ResNet  # noqa: E402
from tests.torch_resnet import (  # noqa: E402
  TorchResNet,
  import_or_skip,
  randomize,
  state_of,
  torch_projector,
  torch_resnet,
)


def relative_error(found, expected):
  return np.abs(found - expected).max() / np.abs(expected).max()


def images(shape, dtype=np.float32):
  return np.random.default_rng(0).normal(size=shape).astype(dtype)


def part_of(variables, name):
  """The variables of the "backbone" or the "projector" alone."""
  return {kind: tree[name] for kind, tree in variables.items()}


def assert_same_features(net, variables, reference, shape):
  x = images(shape)
  with torch.no_grad():
    expected = reference(nchw(x)).numpy()
  apply = jax.jit(functools.partial(net.apply, train=False))
  found = apply(part_of(variables, "backbone"), x)
  assert relative_error(found, expected) < 1e-5


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
  ("name", "stem", "sizes"),
  [
    ("resnet18", "imagenet", [64, 65]),
    ("resnet34", "imagenet", [47, 48]),
    ("resnet50", "imagenet", [64, 51]),
    ("resnet18", "cifar", [17]),
    ("resnet10", "small", [16, 15]),
  ],
)
def test_evaluation_features_equal_torch(name, stem, sizes):
  filters = 64 if stem == "imagenet" else 16
  reference = randomize(torch_resnet(name, filters, stem)).eval()
  imported = from_torchvision(state_of(reference))
  net = models.BACKBONES[name](width_multiplier=filters / 64, stem=stem)
  for size in sizes:
    shape = (2, size, size, 3)
    assert_same_features(net, imported.variables, reference, shape)


@pytest.mark.parametrize(
  ("pool_grid", "size"),
  [
    (2, 16),  # A map of 4: parts of 2.
    (2, 17),  # Of 5: they share the middle.
    (3, 16),
    (2, 4),  # Of 1, which every part is.
  ],
)
def test_means_of_parts_equal_torch(pool_grid, size):
  reference = torch_resnet("resnet8", 8, "cifar", pool_grid=pool_grid)
  randomize(reference).eval()
  imported = from_torchvision(state_of(reference))
  net = models.BACKBONES["resnet8"](
    width_multiplier=1 / 8, stem="cifar", pool_grid=pool_grid
  )
  shape = (2, size, size, 3)
  assert_same_features(net, imported.variables, reference, shape)
  assert net.num_features == 32 * pool_grid**2


@pytest.mark.parametrize("last_bias", [False, True])
def test_projector_equals_torch(last_bias):
  widths = [24, 32, 16, 8]
  reference = randomize(torch_projector(widths, last_bias=last_bias)).eval()
  state = {
    f"projector.{key}": value for key, value in state_of(reference).items()
  }
  backbone = randomize(torch_resnet("resnet10", filters=3))
  for key, value in state_of(backbone).items():
    state[f"backbone.{key}"] = value
  variables = part_of(from_torchvision(state).variables, "projector")
  x = images((5, 24))
  found = models.Projector((32, 16, 8), last_bias=last_bias).apply(
    variables, x, False
  )
  with torch.no_grad():
    expected = reference(torch.from_numpy(x)).numpy()
  assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("stem", ["cifar", "imagenet", "small"])
def test_initial_weights_are_spread_as_torch_defaults(stem):
  torch.manual_seed(0)
  filters, widths = 32, (64, 64, 32)
  reference = torch_resnet("resnet10", filters, stem)
  head = torch_projector([8 * filters, *widths], last_bias=True)
  state = state_of(reference)
  state = {f"backbone.{key}": value for key, value in state.items()}
  state |= {f"projector.{k}": value for k, value in state_of(head).items()}
  expected = from_torchvision(state).variables
  net = models.BACKBONES["resnet10"](
    width_multiplier=filters / 64,
    stem=stem,
    kernel_init="torch_default",
    zero_init_residual=False,
  )
  encoder = models.Encoder(net, models.Projector(widths, last_bias=True))
  init = lambda: encoder.init(jax.random.key(0), images((2, 8, 8, 3)), False)
  found = jax.jit(init)()

  def compare(path, ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    rtol = 4 / np.sqrt(ours.size)  # Of two samples of a uniform distribution.
    np.testing.assert_allclose(
      ours.std(), theirs.std(), rtol=rtol, err_msg=str(path)
    )
    # The bound itself: a normal distribution would go far beyond it.
    np.testing.assert_allclose(
      np.abs(ours).max(), np.abs(theirs).max(), rtol=rtol, err_msg=str(path)
    )

  jax.tree.map_with_path(compare, found, expected)


def statistics_inputs(module):
  """Records how many values each batch norm averages over."""
  counts = {}

  def hook(name, _, inputs):
    counts[name] = inputs[0].numel() // inputs[0].shape[1]

  for name, m in module.named_modules():
    if isinstance(m, torch.nn.BatchNorm2d):
      m.register_forward_pre_hook(functools.partial(hook, name))
  return counts


@pytest.mark.parametrize(
  "name", ["resnet10", "tiny", "resnet18", "resnet34", "resnet50"]
)
def test_training_gradients_and_statistics_equal_torch(name, monkeypatch):
  # float64, since rounding flips ReLUs and a flip is a jump of the gradient.
  filters = 2  # Every layer of the real depth, and seconds.
  bottleneck = name in ("tiny", "resnet50")
  if name == "tiny":
    sizes = (1, 1, 1, 1)
    tiny = functools.partial(ResNet, Bottleneck, sizes)
    monkeypatch.setitem(models.BACKBONES, "tiny", tiny)
    reference = TorchResNet(bottleneck, sizes, filters).double()
  else:
    reference = torch_resnet(name, filters).double()
  randomize(reference).train()
  counts = statistics_inputs(reference)
  before = state_of(reference)
  x = images((4, 33, 33, 3), np.float64)
  weights = images((4, (32 if bottleneck else 8) * filters), np.float64)

  (reference(nchw(x)) * torch.from_numpy(weights)).sum().backward()
  after = state_of(reference)
  gradients = dict(before)
  for key, parameter in reference.named_parameters():
    gradients[key] = parameter.grad.numpy()
  expected = from_torchvision(gradients, dtype=np.float64)
  expected = expected.variables["params"]["backbone"]
  for key, count in counts.items():  # torch's running variance is unbiased.
    biased = (count - 1) / count
    key = f"{key}.running_var"
    after[key] = 0.9 * before[key] + biased * (after[key] - 0.9 * before[key])
  statistics = from_torchvision(after, dtype=np.float64)
  statistics = statistics.variables["batch_stats"]["backbone"]

  with jax.enable_x64(True):
    variables = from_torchvision(before, dtype=np.float64).variables
    net = models.BACKBONES[name](
      width_multiplier=filters / 64, dtype=jnp.float64
    )

    @jax.jit
    def gradient(params, batch_stats, x, weights):
      def loss(params):
        features, updated = net.apply(
          {"params": params, "batch_stats": batch_stats},
          x,
          True,
          mutable=["batch_stats"],
        )
        return jnp.sum(features * weights), updated["batch_stats"]

      return jax.grad(loss, has_aux=True)(params)

    own = part_of(variables, "backbone")
    found, found_statistics = gradient(
      own["params"], own["batch_stats"], x, weights
    )
  leaves = jax.tree.leaves_with_path(found)
  assert len(leaves) == len(dict(reference.named_parameters()))
  for (path, leaf), wanted in zip(
    leaves, jax.tree.leaves(expected), strict=True
  ):
    assert leaf.dtype == np.float64
    assert relative_error(np.asarray(leaf), wanted) < 1e-9, path
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
    found_statistics,
    statistics,
  )


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_equals_torchvision_where_it_can_be_imported(name):
  torchvision = import_or_skip("torchvision")
  reference = getattr(torchvision.models, name)(weights=None)
  reference.fc = torch.nn.Identity()
  randomize(reference).eval()
  imported = from_torchvision(state_of(reference))
  assert imported.architecture.backbone == name
  exported = to_torchvision(imported.variables, num_batches_tracked=7)
  assert list(exported) == list(reference.state_dict())
  reference.load_state_dict(
    {key: torch.from_numpy(value) for key, value in exported.items()}
  )
  net = models.BACKBONES[name]()
  assert_same_features(net, imported.variables, reference, (2, 61, 61, 3))
