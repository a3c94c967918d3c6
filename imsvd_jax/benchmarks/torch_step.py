"""A recipe's training step in PyTorch, as a contender on a GPU.

As a PyTorch user would write it who knows the usual means of speed: channels
last, bfloat16 by autocast, cuDNN's search for the fastest algorithm and, on
request, `torch.compile`. It embeds two given views, computes IMSVD's loss by
the formula and updates by SGD with momentum. Augmentation and LARS are left
out, which favors PyTorch.
"""

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import torch_formula
from imsvd_jax.benchmarks.text import Findings, quantity

# name: (blocks per stage, whether blocks are bottlenecks)
_RESNETS = {
  "resnet18": ((2, 2, 2, 2), False),
  "resnet50": ((3, 4, 6, 3), True),
}


@dataclasses.dataclass(frozen=True)
class Result:
  """The time of PyTorch's step."""

  batch_size: int  # Images per step, each in two views.
  dtype: str  # What the network computes in.
  compiled: bool  # Whether by torch.compile.
  step: float  # Seconds, the median over the rounds.
  images_per_second: float  # At the median.
  peak_bytes: float | None  # Of the GPU's memory; None on a CPU.
  loss: float  # At the last step.
  device: str  # The GPU's name, or "cpu".
  torch: str  # PyTorch's version.


def benchmark(
  config: ConfigDict, *, name: str, rounds: int, compiled: bool
) -> Findings:
  """Measures the recipe called `name` on this machine; see `measure`."""
  result = measure(config, rounds=rounds, compiled=compiled)
  how = "torch.compile" if result.compiled else "eager"
  text = (
    f"{name} in PyTorch {result.torch}, {how}, on {result.device}: batch"
    f" {result.batch_size}, {result.dtype}\n"
    f"{result.images_per_second:,.0f} images/s; a step takes"
    f" {result.step:.4g} s; loss {result.loss:.4g}; peak memory"
    f" {quantity(result.peak_bytes, 'B')}\n"
    "Two views, no augmentation, SGD with momentum."
  )
  numbers = {"benchmark": "torch_step", "config": name}
  return Findings(text, numbers | dataclasses.asdict(result))


def measure(config: ConfigDict, *, rounds: int, compiled: bool) -> Result:
  """Times steps on random views.

  Args:
    config: A recipe of a ResNet-18 or ResNet-50 with IMSVD's loss.
    rounds: Measured steps.
    compiled: Whether to compile the network by `torch.compile`.

  Raises:
    UserError: PyTorch is not installed, or the recipe is another one.
  """
  if importlib.util.find_spec("torch") is None:
    raise UserError("PyTorch is not installed; pip install torch.")
  if config.model.backbone not in _RESNETS or config.objective.name != "imsvd":
    raise UserError(
      f"PyTorch's step knows {', '.join(_RESNETS)} with imsvd's loss; found"
      f" {config.model.backbone} with {config.objective.name}."
    )
  import torch

  on_gpu = torch.cuda.is_available()
  step = _training_step(config, compiled=compiled)

  def finish(loss: Any) -> float:
    if on_gpu:
      torch.cuda.synchronize()
    return float(loss.detach())

  console.print_line("Warming up PyTorch's step.")
  for _ in range(3):
    finish(step())
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    loss = finish(step())
    seconds.append(time.perf_counter() - start)
  median = statistics.median(seconds)
  return Result(
    batch_size=config.batch_size,
    dtype=config.model.dtype,
    compiled=compiled,
    step=median,
    images_per_second=config.batch_size / median,
    peak_bytes=float(torch.cuda.max_memory_allocated()) if on_gpu else None,
    loss=loss,
    device=torch.cuda.get_device_name() if on_gpu else "cpu",
    torch=torch.__version__,
  )


def _training_step(config: ConfigDict, *, compiled: bool) -> Callable[[], Any]:
  """Returns a function that makes a step and returns its loss."""
  import torch

  on_gpu = torch.cuda.is_available()
  device = torch.device("cuda" if on_gpu else "cpu")
  torch.backends.cudnn.benchmark = True
  torch.manual_seed(0)
  network = _network(config).to(device, memory_format=torch.channels_last)
  optimizer = torch.optim.SGD(
    network.parameters(),
    lr=0.01,
    momentum=0.9,
    weight_decay=config.optimizer.weight_decay,
  )
  size = config.views.view1.size
  views = [
    torch.randn(config.batch_size, 3, size, size, device=device).to(
      memory_format=torch.channels_last
    )
    for _ in range(2)
  ]
  embed = torch.compile(network) if compiled else network
  dtype = getattr(torch, config.model.dtype)

  def step() -> Any:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
      z1, z2 = (embed(view) for view in views)
    loss = torch_formula.loss(
      z1.float(), z2.float(), config.objective.imsvd.num_bins
    )
    loss.backward()
    optimizer.step()
    return loss

  return step


def _network(config: ConfigDict) -> Any:
  """Returns the recipe's backbone and projector as one torch module."""
  from torch import nn

  stages, bottleneck = _RESNETS[config.model.backbone]
  width = round(64 * config.model.width_multiplier)
  expansion = 4 if bottleneck else 1

  def convolve(inputs: int, outputs: int, kernel: int, stride: int = 1) -> Any:
    return nn.Sequential(
      nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, bias=False
      ),
      nn.BatchNorm2d(outputs),
    )

  class Block(nn.Module):
    def __init__(self, inputs: int, filters: int, stride: int) -> None:
      super().__init__()
      outputs = filters * expansion
      layers = (
        [
          convolve(inputs, filters, 1),
          nn.ReLU(inplace=True),
          convolve(filters, filters, 3, stride),
          nn.ReLU(inplace=True),
          convolve(filters, outputs, 1),
        ]
        if bottleneck
        else [
          convolve(inputs, filters, 3, stride),
          nn.ReLU(inplace=True),
          convolve(filters, outputs, 3),
        ]
      )
      self.layers = nn.Sequential(*layers)
      same = stride == 1 and inputs == outputs
      self.shortcut = (
        nn.Identity() if same else convolve(inputs, outputs, 1, stride)
      )

    def forward(self, x: Any) -> Any:
      return nn.functional.relu(self.layers(x) + self.shortcut(x))

  layers = {
    "imagenet": [
      convolve(3, width, 7, 2),
      nn.ReLU(inplace=True),
      nn.MaxPool2d(3, 2, 1),
    ],
    "cifar": [convolve(3, width, 3), nn.ReLU(inplace=True)],
    "small": [convolve(3, width, 5, 2), nn.ReLU(inplace=True)],
  }[config.model.stem]
  inputs = width
  for i, blocks in enumerate(stages):
    for j in range(blocks):
      filters, stride = width * 2**i, 2 if i and not j else 1
      layers.append(Block(inputs, filters, stride))
      inputs = filters * expansion
  layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
  *hidden, last = config.model.projector
  for outputs in hidden:
    layers += [
      nn.Linear(inputs, outputs),
      nn.BatchNorm1d(outputs),
      nn.ReLU(inplace=True),
    ]
    inputs = outputs
  return nn.Sequential(*layers, nn.Linear(inputs, last, bias=False))
