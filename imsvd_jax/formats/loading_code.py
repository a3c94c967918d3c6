"""Python that loads an exported file where this package is not installed."""

from imsvd_jax.formats.architecture import Architecture
from imsvd_jax.formats.weight_format import Content
from imsvd_jax.models.resnet import STEMS

_MODULE = """
class Encoder(torch.nn.Module):
  def __init__(self, backbone, projector):
    super().__init__()
    self.backbone, self.projector = backbone, projector

  def forward(self, images):
    features = self.backbone(images)
    return features, self.projector(features)


"""


def torchvision_code(content: Content) -> str:
  """Returns Python that loads a torch file into torchvision's network."""
  load = f'torch.load("{content.file_name}", weights_only=True)'
  return _torch_code(content, "import torch\n", load)


def safetensors_code(content: Content) -> str:
  """Returns Python that loads a safetensors file into torchvision's network."""
  imports = "import torch\nfrom safetensors.torch import load_file\n"
  return _torch_code(content, imports, f'load_file("{content.file_name}")')


def _torch_code(content: Content, imports: str, load: str) -> str:
  architecture = content.architecture
  if is_ready_made(architecture):
    imports += "import torchvision\n"
  else:
    block = _block(architecture)
    imports += f"from torchvision.models.resnet import {block}, ResNet\n"
  network = _network(architecture, content.num_classes)
  wrap = _wrap(architecture) if content.projector else ""
  module = _MODULE if content.projector else "\n"
  return (
    f"{imports}{module}{network}{wrap}model.load_state_dict({load})\n"
    "model.eval()\n"
  )


# The backbones that torchvision and timm have a function for.
READY_MADE = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def is_ready_made(architecture: Architecture) -> bool:
  """Returns whether torchvision and timm build this network by its name."""
  return (
    architecture.width_multiplier == 1 and architecture.backbone in READY_MADE
  )


def _stages(architecture: Architecture) -> list[int]:
  """Returns the blocks of each of the four stages that their ResNets have."""
  sizes = list(architecture.network().stage_sizes)
  return sizes + [1] * (4 - len(sizes))


def _block(architecture: Architecture) -> str:
  expansion = architecture.network().block.expansion
  return "BasicBlock" if expansion == 1 else "Bottleneck"


def _replacements(architecture: Architecture) -> str:
  """Returns code that replaces the layers in which torchvision's differ."""
  size, stride, pool = STEMS[architecture.stem]
  filters = architecture.network().num_filters
  lines = ""
  if (size, filters, architecture.channels) != (7, 64, 3):
    lines += (
      f"model.conv1 = torch.nn.Conv2d({architecture.channels}, {filters}, "
      f"{size}, {stride}, {size // 2}, bias=False)\n"
    )
  if filters != 64:
    lines += f"model.bn1 = torch.nn.BatchNorm2d({filters})\n"
  if not pool:
    lines += "model.maxpool = torch.nn.Identity()\n"
  for stage in range(len(architecture.network().stage_sizes), 4):
    lines += f"model.layer{stage + 1} = torch.nn.Identity()\n"
  return lines


def _network(architecture: Architecture, num_classes: int) -> str:
  net = architecture.network()
  filters, sizes = net.num_filters, _stages(architecture)
  block = _block(architecture)
  if is_ready_made(architecture):
    code = f"model = torchvision.models.{architecture.backbone}(weights=None)\n"
  elif filters == 64:
    code = f"model = ResNet({block}, {sizes})\n"
  else:
    code = f"""class Scaled(ResNet):  # torchvision builds width 1 only
  def _make_layer(self, block, planes, *args, **kwargs):
    if planes == 64:
      self.inplanes = {filters}
    planes = planes * {filters} // 64
    return super()._make_layer(block, planes, *args, **kwargs)


model = Scaled({block}, {sizes})
"""
  code += _replacements(architecture)
  if num_classes:
    head = f"torch.nn.Linear({net.num_features}, {num_classes})"
  else:
    head = "torch.nn.Identity()  # features, not classes"
  return f"{code}model.fc = {head}\n"


def _wrap(architecture: Architecture) -> str:
  """Returns code that puts the projector behind the backbone."""
  inputs, layers = architecture.network().num_features, []
  for width in architecture.projector[:-1]:
    bias = "" if architecture.hidden_bias else ", bias=False"
    layers += [
      f"torch.nn.Linear({inputs}, {width}{bias})",
      f"torch.nn.BatchNorm1d({width})",
      "torch.nn.ReLU()",
    ]
    inputs = width
  last = architecture.projector[-1]
  bias = "" if architecture.last_bias else ", bias=False"
  layers.append(f"torch.nn.Linear({inputs}, {last}{bias})")
  body = "".join(f"  {layer},\n" for layer in layers)
  return (
    f"projector = torch.nn.Sequential(\n{body})\n"
    "model = Encoder(model, projector)\n"
  )


def timm_code(content: Content) -> str:
  """Returns Python that loads a torch file into timm's network."""
  architecture, num_classes = content.architecture, content.num_classes
  file_name = content.file_name
  arguments = f"num_classes={num_classes}, in_chans={architecture.channels}"
  if is_ready_made(architecture) and architecture.stem == "imagenet":
    return (
      "import timm\n\n"
      f'model = timm.create_model("{architecture.backbone}", {arguments}, '
      f'checkpoint_path="{file_name}")\nmodel.eval()\n'
    )
  block, net = _block(architecture), architecture.network()
  head = ""
  if num_classes and len(net.stage_sizes) < 4:
    head = f"model.fc = torch.nn.Linear({net.num_features}, {num_classes})\n"
  return (
    "import torch\n"
    f"from timm.models.resnet import {block}, ResNet\n\n"
    f"model = ResNet({block}, {_stages(architecture)}, {arguments})\n"
    f"{_replacements(architecture)}{head}"
    f'model.load_state_dict(torch.load("{file_name}", weights_only=True))\n'
    "model.eval()\n"
  )
