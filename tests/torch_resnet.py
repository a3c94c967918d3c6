"""An independent ResNet in plain PyTorch, to compare against.

Written from the paper (He et al., 2015) with torch.nn alone; parameter names
are the ones that torchvision's networks have.
"""

import importlib
import itertools
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

# depth: (bottleneck, blocks per stage)
DEPTHS = {
  "resnet8": (False, (1, 1, 1)),
  "resnet10": (False, (1, 1, 1, 1)),
  "resnet18": (False, (2, 2, 2, 2)),
  "resnet34": (False, (3, 4, 6, 3)),
  "resnet50": (True, (3, 4, 6, 3)),
}
# stem: (kernel, stride, max-pool)
STEMS = {
  "imagenet": (7, 2, True),
  "cifar": (3, 1, False),
  "small": (5, 2, False),
}


def conv(inputs, outputs, kernel, stride=1):
  return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
  def __init__(self, inputs, inner, stride, bottleneck):
    super().__init__()
    self.bottleneck = bottleneck
    outputs = 4 * inner if bottleneck else inner
    if bottleneck:
      self.conv1 = conv(inputs, inner, 1)
      self.conv2 = conv(inner, inner, 3, stride)
      self.conv3 = conv(inner, outputs, 1)
      self.bn3 = nn.BatchNorm2d(outputs)
    else:
      self.conv1 = conv(inputs, inner, 3, stride)
      self.conv2 = conv(inner, inner, 3)
    self.bn1 = nn.BatchNorm2d(inner)
    self.bn2 = nn.BatchNorm2d(inner)
    self.downsample = None
    if stride != 1 or inputs != outputs:
      self.downsample = nn.Sequential(
        conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
      )

  def forward(self, x):
    y = self.bn1(self.conv1(x)).relu()
    y = self.bn2(self.conv2(y))
    if self.bottleneck:
      y = self.bn3(self.conv3(y.relu()))
    shortcut = x if self.downsample is None else self.downsample(x)
    return (y + shortcut).relu()


class TorchResNet(nn.Module):
  def __init__(
    self,
    bottleneck,
    stage_sizes,
    filters=64,
    stem="imagenet",
    channels=3,
    pool_grid=1,
  ):
    super().__init__()
    kernel, stride, pool = STEMS[stem]
    self.conv1 = conv(channels, filters, kernel, stride)
    self.bn1 = nn.BatchNorm2d(filters)
    self.maxpool = nn.MaxPool2d(3, 2, 1) if pool else nn.Identity()
    inputs = filters
    for i, size in enumerate(stage_sizes):
      inner = filters * 2**i
      outputs = 4 * inner if bottleneck else inner
      blocks = [
        Block(
          inputs if j == 0 else outputs,
          inner,
          2 if i > 0 and j == 0 else 1,
          bottleneck,
        )
        for j in range(size)
      ]
      setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
      inputs = outputs
    self.num_stages = len(stage_sizes)
    self.pool_grid = pool_grid

  def forward(self, x):
    x = self.maxpool(self.bn1(self.conv1(x)).relu())
    for i in range(self.num_stages):
      x = getattr(self, f"layer{i + 1}")(x)
    return nn.functional.adaptive_avg_pool2d(x, self.pool_grid).flatten(1)


def torch_resnet(name, filters=64, stem="imagenet", channels=3, pool_grid=1):
  return TorchResNet(*DEPTHS[name], filters, stem, channels, pool_grid)


def torch_projector(widths, hidden_bias=True, last_bias=False):
  """Widths start with the features."""
  layers = []
  for inputs, outputs in itertools.pairwise(widths[:-1]):
    layers += [
      nn.Linear(inputs, outputs, bias=hidden_bias),
      nn.BatchNorm1d(outputs),
      nn.ReLU(),
    ]
  return nn.Sequential(*layers, nn.Linear(*widths[-2:], bias=last_bias))


def randomize(module, seed=0):
  """Gives every batch norm weights and statistics of a trained network."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for m in module.modules():
      if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d):
        m.weight.uniform_(0.5, 1.5)
        m.bias.normal_(0, 0.2)
        m.running_mean.normal_(0, 0.2)
        m.running_var.uniform_(0.5, 1.5)
        m.num_batches_tracked.fill_(7)
      elif isinstance(m, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(m.weight)
  return module


def state_of(module):
  """Copies the state dict: `numpy()` shares memory with batch norm buffers."""
  return {key: t.numpy().copy() for key, t in module.state_dict().items()}


def import_or_skip(name):
  """Imports torchvision or a user of it, also beside a CPU-only torch.

  No torchvision goes with a CPU build of torch: it would register kernels for
  operators that are not there. Its networks need none of them.
  """
  if name != "torchvision":
    import_or_skip("torchvision")
  nothing = lambda *args, **kwargs: lambda function: function
  with mock.patch.object(torch.library, "register_fake", nothing):
    try:
      return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
      pytest.skip(f"{name}: {error}")
