"""Python that loads an exported file where this package is not installed."""

from typing import Any

from imsvd_jax.formats.architecture import Architecture
from imsvd_jax.formats.weight_format import Content
from imsvd_jax.models.resnet import STEMS
from imsvd_jax.models.vit import grid

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
  """Returns Python that loads a safetensors file: torchvision's, or timm's."""
  if not content.architecture.is_resnet:
    if content.projector:
      return (
        "import timm\nimport torch\nfrom safetensors.torch import load_file\n"
        f"{_MODULE}{_create_model(content)}{_wrap(content.architecture)}"
        f'model.load_state_dict(load_file("{content.file_name}"))\n'
        "model.eval()\n"
      )
    return timm_code(content)
  imports = "import torch\nfrom safetensors.torch import load_file\n"
  return _torch_code(content, imports, f'load_file("{content.file_name}")')


def _torch_code(content: Content, imports: str, load: str) -> str:
  architecture = content.architecture
  if not architecture.is_resnet or is_ready_made(architecture):
    imports += "import torchvision\n"
  else:
    block = _block(architecture)
    imports += f"from torchvision.models.resnet import {block}, ResNet\n"
  if architecture.is_resnet:
    network = _network(architecture, content.num_classes)
  else:
    network = _torchvision_network(architecture, content.num_classes)
  wrap = _wrap(architecture) if content.projector else ""
  module = _MODULE if content.projector else "\n"
  return (
    f"{imports}{module}{network}{wrap}model.load_state_dict({load})\n"
    "model.eval()\n"
  )


# The ResNets that torchvision and timm have a function for.
READY_MADE = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def _convolution(inputs: int, outputs: int, patch: int) -> str:
  return f"torch.nn.Conv2d({inputs}, {outputs}, {patch}, {patch})"


def _torchvision_network(architecture: Architecture, num_classes: int) -> str:
  """Returns code that builds torchvision's ViT or ConvNeXt."""
  net, channels = architecture.network(), architecture.channels
  if architecture.is_vit:
    image_size = net.patch * grid(architecture.positions)[0]
    code = (
      "model = torchvision.models.VisionTransformer(\n"
      f"  image_size={image_size}, patch_size={net.patch},"
      f" num_layers={net.depth},\n  num_heads={net.heads},"
      f" hidden_dim={net.num_features}, mlp_dim={4 * net.num_features},\n"
      f"  num_classes={num_classes or 1},\n)\n"
    )
    if channels != 3:
      conv = _convolution(channels, net.num_features, net.patch)
      code += f"model.conv_proj = {conv}\n"
    head = "heads"
  else:
    following = [*net.widths[1:], None]
    blocks = "".join(
      f"  CNBlockConfig({width}, {after}, {depth}),\n"
      for width, after, depth in zip(
        net.widths, following, net.depths, strict=True
      )
    )
    code = (
      "from torchvision.models.convnext import CNBlockConfig\n\n"
      f"model = torchvision.models.ConvNeXt([\n{blocks}],"
      f" num_classes={num_classes or 1})\n"
    )
    if (channels, net.patch) != (3, 4):
      conv = _convolution(channels, net.widths[0], net.patch)
      code += f"model.features[0][0] = {conv}\n"
    head = "classifier[2]"
  if not num_classes:
    code += f"model.{head} = torch.nn.Identity()  # features, not classes\n"
  return code


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


def _pool(architecture: Architecture) -> str:
  """Returns code for a pooling of parts; "" where the whole map is one."""
  parts = architecture.pool_grid
  return f"torch.nn.AdaptiveAvgPool2d({parts})" if parts > 1 else ""


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
  if pool := _pool(architecture):
    code += f"model.avgpool = {pool}\n"
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
  if not architecture.is_resnet:
    return (
      f"import timm\nimport torch\n\n{_create_model(content)}"
      f'timm.models.load_checkpoint(model, "{file_name}")\nmodel.eval()\n'
    )
  arguments = f"num_classes={num_classes}, in_chans={architecture.channels}"
  pool = _pool(architecture)
  if (
    is_ready_made(architecture) and architecture.stem == "imagenet" and not pool
  ):
    return (
      "import timm\n\n"
      f'model = timm.create_model("{architecture.backbone}", {arguments}, '
      f'checkpoint_path="{file_name}")\nmodel.eval()\n'
    )
  block, net = _block(architecture), architecture.network()
  head = ""
  if pool:
    head += (
      f"model.global_pool = torch.nn.Sequential(\n  {pool},"
      " torch.nn.Flatten()\n)\n"
    )
  if num_classes and (pool or len(net.stage_sizes) < 4):
    head += f"model.fc = torch.nn.Linear({net.num_features}, {num_classes})\n"
  return (
    "import torch\n"
    f"from timm.models.resnet import {block}, ResNet\n\n"
    f"model = ResNet({block}, {_stages(architecture)}, {arguments})\n"
    f"{_replacements(architecture)}{head}"
    f'model.load_state_dict(torch.load("{file_name}", weights_only=True))\n'
    "model.eval()\n"
  )


def _create_model(content: Content) -> str:
  """Returns code that builds timm's ViT or ConvNeXt of any size."""
  architecture = content.architecture
  name, arguments = _timm_arguments(architecture)
  arguments = {"num_classes": content.num_classes, **arguments}
  net, channels, stem = architecture.network(), architecture.channels, ""
  if architecture.is_vit:
    arguments["in_chans"] = channels
  elif (channels, net.patch) != (3, 4):
    conv = _convolution(channels, net.widths[0], net.patch)
    stem = f"model.stem[0] = {conv}\n"
  lines = "".join(f"  {key}={value!r},\n" for key, value in arguments.items())
  return f'model = timm.create_model(\n  "{name}",\n{lines})\n{stem}'


def timm_model(architecture: Architecture) -> tuple[str, dict[str, Any]] | None:
  """Returns the name and arguments by which timm builds the network.

  Arguments for classes and channels are left to the caller. None if timm needs
  other layers: a ResNet of another stem, width, number of stages or pooling; a
  ConvNeXt of other patches than 4 (timm would halve the resolution once more).
  """
  net = architecture.network()
  if architecture.is_resnet:
    usual = architecture.stem == "imagenet" and net.num_filters == 64
    if not usual or len(net.stage_sizes) != 4 or net.pool_grid != 1:
      return None
  elif not architecture.is_vit and net.patch != 4:
    return None
  return _timm_arguments(architecture)


def _timm_arguments(architecture: Architecture) -> tuple[str, dict[str, Any]]:
  if architecture.is_vit:
    return "vit_small_patch16_224", _vit_arguments(architecture)
  net = architecture.network()
  if not architecture.is_resnet:
    return "convnext_tiny", {"depths": net.depths, "dims": net.widths}
  if is_ready_made(architecture):
    return architecture.backbone, {}
  similar = "resnet18" if _block(architecture) == "BasicBlock" else "resnet50"
  return similar, {"layers": _stages(architecture)}


def _vit_arguments(architecture: Architecture) -> dict[str, Any]:
  net = architecture.network()
  side, with_class = grid(architecture.positions)
  arguments = {
    "img_size": side * net.patch,
    "patch_size": net.patch,
    "embed_dim": net.num_features,
    "depth": net.depth,
    "num_heads": net.heads,
    "global_pool": "avg" if net.pool == "mean" else None,
    "reg_tokens": net.registers,
    "no_embed_class": not with_class,
    "init_values": net.layer_scale,
  }
  return {key: value for key, value in arguments.items() if value}
