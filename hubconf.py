"""ResNets of `imsvd export` for torch.hub, without JAX and this package.

  import torch

  encoder = torch.hub.load("FOLDER", "encoder", "encoder.pth", source="local")
  features = encoder(images)  # float32 [B, C, H, W], normalized

FOLDER is a checkout of this repository. No code in the weights is executed. A
ViT or a ConvNeXt is loaded by timm, from a folder of `--format=hub`.
"""

import json
import os
import re

dependencies = ["torch", "torchvision"]

# Of conv1, by its kernel: stride, and whether a max-pool follows.
_STEMS = {7: (2, True), 5: (2, False), 3: (1, False)}


def encoder(file):
  """Returns a network with the weights of a file, in evaluation mode.

  Args:
    file: Of `imsvd export --format=torchvision`, `timm` or `safetensors`. Of a
      file with a projector the backbone is taken. A classifier, where there is
      one, makes the network return scores.

  Returns:
    torchvision's ResNet, loaded strictly. Its attribute `metadata` has the mean
    and standard deviation of the images, their size, and more.

  Raises:
    ValueError: The file cannot be read, or has no ResNet.
  """
  path = os.path.expanduser(os.fspath(file))
  try:
    state, metadata = _read(path)
  except (ImportError, FileNotFoundError):
    raise
  except Exception as error:
    # torch's own words would advise to run code of the file.
    raise ValueError(
      f"{file} cannot be read as a file of weights that `imsvd export` writes:"
      f" {type(error).__name__}."
    ) from None
  if any(key.startswith("projector.") for key in state):
    inside = [key for key in state if key.startswith("backbone.")]
    state = {key.removeprefix("backbone."): state[key] for key in inside}
  if "conv1.weight" not in state or "layer1.0.conv1.weight" not in state:
    raise ValueError(
      f"{file} has no ResNet with torchvision's names. timm loads a ViT or a"
      " ConvNeXt: `imsvd export --format=hub`."
    )
  network = _network(state, _pool_grid(metadata))
  network.load_state_dict(state)
  network.metadata = metadata
  return network.eval()


def _read(file):
  """Returns the tensors by name, and what the file says about itself."""
  import torch

  if file.endswith(".safetensors"):
    import safetensors.torch

    with safetensors.safe_open(file, framework="pt") as opened:
      metadata = opened.metadata() or {}
    return safetensors.torch.load_file(file), _parsed(metadata)
  major, minor = map(int, re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
  if (major, minor) < (2, 10):
    raise ImportError(
      f"PyTorch {torch.__version__} can execute code that a file of weights"
      " contains; install 2.10 or later, or export --format=safetensors."
    )
  state = torch.load(file, map_location="cpu", weights_only=True)
  return state, getattr(state, "metadata", {})


def _pool_grid(metadata):
  """Returns into how many rows and columns the last map is pooled."""
  return metadata.get("architecture", {}).get("pool_grid", 1)


def _parsed(metadata):
  """Returns what safetensors keeps as text; all but words are JSON."""
  parsed = {}
  for name, text in metadata.items():
    try:
      parsed[name] = json.loads(text)
    except ValueError:
      parsed[name] = text
  return parsed


def _network(state, pool_grid):
  """Returns torchvision's ResNet of the shapes in a state dict."""
  from torch import nn
  from torchvision.models import resnet

  filters, channels, kernel, _ = state["conv1.weight"].shape
  stride, pool = _STEMS[kernel]
  stages = [
    len({key.split(".")[1] for key in state if key.startswith(f"layer{i}.")})
    for i in range(1, 5)
  ]

  class Scaled(resnet.ResNet):  # torchvision builds width 1 only.
    def _make_layer(self, block, planes, *args, **kwargs):
      if planes == 64:
        self.inplanes = filters
      return super()._make_layer(block, planes * filters // 64, *args, **kwargs)

  bottleneck = "layer1.0.conv3.weight" in state
  block = resnet.Bottleneck if bottleneck else resnet.BasicBlock
  network = Scaled(block, [max(count, 1) for count in stages])
  network.conv1 = nn.Conv2d(
    channels, filters, kernel, stride, kernel // 2, bias=False
  )
  network.bn1 = nn.BatchNorm2d(filters)
  if not pool:
    network.maxpool = nn.Identity()
  for i, count in enumerate(stages, 1):
    if not count:
      setattr(network, f"layer{i}", nn.Identity())
  network.avgpool = nn.AdaptiveAvgPool2d(pool_grid)
  network.fc = nn.Identity()
  if "fc.weight" in state:
    network.fc = nn.Linear(*reversed(state["fc.weight"].shape))
  return network
