"""The network of a set of weights, and the names of its tensors.

`entries` is the one table of names, which every conversion of weights uses. The
names on the torch side are torchvision's for a ResNet, and timm's for a ViT or
a ConvNeXt.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from imsvd_jax.base.errors import UserError
from imsvd_jax.models import BACKBONES, make_backbone
from imsvd_jax.models.convnext import ConvNeXt
from imsvd_jax.models.resnet import MAX_POOL_GRID, STEMS, ResNet
from imsvd_jax.models.vit import ViT, grid

NUM_BATCHES = "num_batches_tracked"
# Where torch's names differ from ours.
_OUR_NAMES = {
  "downsample.0": "downsample_conv",
  "downsample.1": "downsample_bn",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A network, in the words of the config.

  Attributes:
    backbone: A key of BACKBONES.
    width_multiplier: Scales the filters of every stage.
    stem: A key of STEMS.
    channels: Channels of the images.
    projector: Output widths of the projector's layers; empty without one.
    hidden_bias: Whether the projector's hidden layers have a bias.
    last_bias: Whether its last layer has one.
    patch_size: Of a ViT or a ConvNeXt, in pixels.
    pool: Of a ViT: "token" or "mean".
    pool_grid: Of a ResNet: G, for the means of G x G parts of its last map.
    registers: Of a ViT: tokens beside the class token.
    layer_scale: Of a ViT: above 0 where branches have a learned factor.
    positions: Of a ViT: how many positions were learned.
  """

  backbone: str
  width_multiplier: float = 1.0
  stem: str = "imagenet"
  channels: int = 3
  projector: tuple[int, ...] = ()
  hidden_bias: bool = True
  last_bias: bool = False
  patch_size: int = 0
  pool: str = "token"
  pool_grid: int = 1
  registers: int = 0
  layer_scale: float = 0.0
  positions: int = 0

  def options(self) -> dict[str, Any]:
    """Returns what differs from the defaults, by its name in the config."""
    names = ("patch_size", "pool", "pool_grid", "registers", "layer_scale")
    fields = {field.name: field for field in dataclasses.fields(self)}
    given = {name: getattr(self, name) for name in names}
    return {k: v for k, v in given.items() if v != fields[k].default}

  def network(self, **common: Any) -> Any:
    """Returns the backbone as a module (no parameters are made).

    Args:
      **common: Further arguments of every backbone, such as dtype.
    """
    return make_backbone(
      self.backbone,
      self.options(),
      width_multiplier=self.width_multiplier,
      stem=self.stem,
      **common,
    )

  @property
  def is_resnet(self) -> bool:
    """Whether it is a ResNet, and not a ViT or a ConvNeXt."""
    return isinstance(self.network(), ResNet)

  @property
  def is_vit(self) -> bool:
    """Whether it is a ViT."""
    return isinstance(self.network(), ViT)

  def describe(self) -> str:
    """Returns e.g. "resnet18 (width 0.25, small stem)"."""
    parts = []
    if self.is_resnet:
      if self.width_multiplier != 1 or self.stem != "imagenet":
        parts = [f"width {self.width_multiplier:g}", f"{self.stem} stem"]
      if self.pool_grid != 1:
        parts.append(f"means of {self.pool_grid} x {self.pool_grid} parts")
    else:
      if self.width_multiplier != 1:
        parts.append(f"width {self.width_multiplier:g}")
      parts.append(f"patches of {self.patch_size}")
      if self.pool != "token":
        parts.append(f"{self.pool} pooling")
      if self.registers:
        parts.append(f"{self.registers} registers")
    return f"{self.backbone} ({', '.join(parts)})" if parts else self.backbone


class Entry(NamedTuple):
  """One tensor."""

  key: str  # Its name in torch, with "backbone." or "projector." in front.
  # Where it is in our variables; None for torch's batch counters.
  path: tuple[str, ...] | None
  shape: tuple[int, ...]  # Its shape in torch.


def _batch_norm(key: str, path: tuple[str, ...], size: int) -> Iterator[Entry]:
  params, stats = ("params", *path), ("batch_stats", *path)
  yield Entry(f"{key}.weight", (*params, "scale"), (size,))
  yield Entry(f"{key}.bias", (*params, "bias"), (size,))
  yield Entry(f"{key}.running_mean", (*stats, "mean"), (size,))
  yield Entry(f"{key}.running_var", (*stats, "var"), (size,))
  yield Entry(f"{key}.{NUM_BATCHES}", None, ())


def _conv_norm(
  key: str,
  path: tuple[str, ...],
  shape: tuple[int, int, int, int],
  conv: str,
  norm: str,
) -> Iterator[Entry]:
  """A convolution and its batch norm, by their names in torch."""
  kernel = ("params", *path, _OUR_NAMES.get(conv, conv), "kernel")
  yield Entry(f"{key}{conv}.weight", kernel, shape)
  norm_path = (*path, _OUR_NAMES.get(norm, norm))
  yield from _batch_norm(f"{key}{norm}", norm_path, shape[0])


def _resnet(architecture: Architecture) -> Iterator[Entry]:
  net = architecture.network()
  expansion = net.block.expansion
  filters, size = net.num_filters, STEMS[net.stem][0]
  stem = (filters, architecture.channels, size, size)
  yield from _conv_norm("backbone.", ("backbone",), stem, "conv1", "bn1")
  inputs = filters
  for stage, blocks in enumerate(net.stage_sizes):
    inner = filters * 2**stage
    outputs = inner * expansion
    for block in range(blocks):
      key = f"backbone.layer{stage + 1}.{block}."
      path = ("backbone", f"layer{stage + 1}_{block}")
      if expansion == 1:
        shapes = [(inner, inputs, 3, 3), (inner, inner, 3, 3)]
      else:
        shapes = [
          (inner, inputs, 1, 1),
          (inner, inner, 3, 3),
          (outputs, inner, 1, 1),
        ]
      for i, shape in enumerate(shapes, 1):
        yield from _conv_norm(key, path, shape, f"conv{i}", f"bn{i}")
      if block == 0 and (stage > 0 or inputs != outputs):
        shape = (outputs, inputs, 1, 1)
        yield from _conv_norm(key, path, shape, "downsample.0", "downsample.1")
      inputs = outputs


def _as_named(architecture: Architecture) -> Iterator[Entry]:
  """The tensors of a network whose names are torch's but for separators."""
  net = architecture.network()
  side = net.patch * 2**5  # No shape but one depends on it.
  images = jnp.zeros((1, side, side, architecture.channels))
  shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), images, False))
  for path, leaf in flatten_dict(shapes["params"]).items():
    key = _torch_key(("backbone", *path))
    shape = _torch_shape(leaf.shape)
    if path == ("pos_embed",) and architecture.positions:
      shape = (1, architecture.positions, shape[2])
    yield Entry(key, ("params", "backbone", *path), shape)


def _projector(architecture: Architecture) -> Iterator[Entry]:
  inputs = architecture.network().num_features
  last = len(architecture.projector) - 1
  for i, width in enumerate(architecture.projector):
    # torch's Sequential counts Linear, BatchNorm and ReLU: three a layer.
    key, path = f"projector.{3 * i}", ("params", "projector", f"dense_{i}")
    yield Entry(f"{key}.weight", (*path, "kernel"), (width, inputs))
    if architecture.hidden_bias if i < last else architecture.last_bias:
      yield Entry(f"{key}.bias", (*path, "bias"), (width,))
    if i < last:
      norm = ("projector", f"bn_{i}")
      yield from _batch_norm(f"projector.{3 * i + 1}", norm, width)
    inputs = width


def entries(architecture: Architecture) -> list[Entry]:
  """Returns every tensor of the network; a ResNet's in torchvision's order."""
  backbone = _resnet if architecture.is_resnet else _as_named
  return [*backbone(architecture), *_projector(architecture)]


# ---- recognizing a network -------------------------------------------------


def _backbone_name(bottleneck: bool, sizes: tuple[int, ...]) -> str:
  known = {}
  for name, make in BACKBONES.items():
    net = make()
    if isinstance(net, ResNet):
      known[net.block.expansion > 1, net.stage_sizes] = name
  if (bottleneck, sizes) not in known:
    kind = "bottleneck" if bottleneck else "basic"
    raise UserError(
      f"The weights have stages of {list(sizes)} {kind} blocks, which is none "
      f"of {', '.join(sorted(known.values()))}."
    )
  return known[bottleneck, sizes]


def _stem_name(kernel: int) -> str:
  for name, (size, _, _) in STEMS.items():
    if size == kernel:
      return name
  sizes = ", ".join(f"{s[0]} ({name})" for name, s in STEMS.items())
  raise UserError(
    f"conv1.weight has a kernel of {kernel}; known stems have {sizes}."
  )


def infer_architecture(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
  """Returns the network that names and shapes belong to.

  Args:
    shapes: Shape by the name in torch, with "backbone." and "projector." in
      front.

  Returns:
    The nearest architecture; the caller must compare every shape.

  Raises:
    UserError: The names are not those of a known network.
  """
  if len(shapes.get("backbone.patch_embed.proj.weight", ())) == 4:
    backbone = _infer_vit(shapes)
  elif len(shapes.get("backbone.stem.0.weight", ())) == 4:
    backbone = _infer_convnext(shapes)
  else:
    backbone = _infer_resnet(shapes)
    first = shapes.get("projector.0.weight", ())
    if len(first) == 2:
      backbone = pooled_as(backbone, first[1])
  widths, hidden_bias = _infer_projector(shapes)
  if not all((backbone.channels, *widths)):
    raise UserError("The weights have a layer without inputs or outputs.")
  return dataclasses.replace(
    backbone,
    projector=widths,
    hidden_bias=hidden_bias,
    last_bias=f"projector.{3 * len(widths) - 3}.bias" in shapes,
  )


def pooled_as(architecture: Architecture, num_features: Any) -> Architecture:
  """Returns a ResNet with the pooling that gives this many features.

  Weights of a backbone alone do not show it, but a layer behind them or the
  file's metadata may.

  Args:
    architecture: A network; unless it is a ResNet, it stays as it is.
    num_features: F. What no pooling gives, or is no number, changes nothing.
  """
  if not architecture.is_resnet or not isinstance(num_features, int):
    return architecture
  whole = dataclasses.replace(architecture, pool_grid=1)
  channels = whole.network().num_features
  for parts in range(1, MAX_POOL_GRID + 1):
    if num_features == channels * parts**2:
      return dataclasses.replace(architecture, pool_grid=parts)
  return architecture


def _blocks(pattern: str, names: Iterable[str]) -> tuple[int, ...]:
  """Returns how many blocks each stage has, by the numbers in names.

  Args:
    pattern: Matches names; its groups are the stage and the block.
    names: Of tensors.
  """
  counts: dict[int, int] = collections.Counter()
  for name in names:
    if found := re.match(pattern, name):
      stage, block = int(found[1]), int(found[2])
      counts[stage] = max(counts[stage], block + 1)
  return tuple(counts[i] for i in range(min(counts), max(counts) + 1))


def _infer_resnet(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
  # No network has more digits; a file from a stranger may.
  stages = r"backbone\.layer(\d{1,2})\.(\d{1,3})\."
  stem = shapes.get("backbone.conv1.weight", ())
  if len(stem) != 4 or not any(re.match(stages, key) for key in shapes):
    names = [key.removeprefix("backbone.") for key in [*shapes][:9]]
    sample = ", ".join(map(repr, names))
    raise UserError(
      "The weights are not a ResNet's, nor a ViT's or a ConvNeXt's with timm's"
      " names: expected conv1.weight with 4 dimensions and"
      f" layer1.0.conv1.weight, found {sample[:200] or 'nothing'}."
    )
  sizes = _blocks(stages, shapes)
  bottleneck = any(".conv3." in key for key in shapes)
  # By majority, so that one damaged tensor is reported by its name.
  witnesses = ("conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.bn1.weight")
  votes = [shapes.get(f"backbone.{key}", ()) for key in witnesses]
  filters = collections.Counter(v[0] for v in votes if v).most_common(1)[0][0]
  if not filters:
    raise UserError("The weights have a layer without inputs or outputs.")
  return Architecture(
    backbone=_backbone_name(bottleneck, sizes),
    width_multiplier=filters / 64,
    stem=_stem_name(stem[2]),
    channels=stem[1],
  )


def _infer_vit(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
  width, channels, patch, _ = shapes["backbone.patch_embed.proj.weight"]
  numbers = [
    int(found[1])
    for key in shapes
    if (found := re.match(r"backbone\.blocks\.(\d{1,3})\.", key))
  ]
  depth = max(numbers, default=-1) + 1
  name, multiplier = _by_width(ViT, lambda net: net.depth == depth, width)
  positions = _tokens(shapes, "pos_embed") or 1
  grid(positions)
  return Architecture(
    backbone=name or _unknown(f"{depth} blocks", ViT),
    width_multiplier=multiplier,
    channels=channels,
    patch_size=patch,
    pool="mean" if "backbone.fc_norm.weight" in shapes else "token",
    registers=_tokens(shapes, "reg_token"),
    # What it started at is not in the weights; DINOv2's value.
    layer_scale=1e-5 if any(".ls1." in key for key in shapes) else 0.0,
    positions=positions,
  )


def _tokens(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
  """Returns how many tokens a table [1, N, C] has; 0 without one."""
  shape = shapes.get(f"backbone.{name}", ())
  return shape[1] if len(shape) == 3 else 0


def _infer_convnext(shapes: Mapping[str, tuple[int, ...]]) -> Architecture:
  width, channels, patch, _ = shapes["backbone.stem.0.weight"]
  stages = r"backbone\.stages\.(\d{1,2})\.blocks\.(\d{1,3})\."
  found = any(re.match(stages, key) for key in shapes)
  depths = _blocks(stages, shapes) if found else ()
  name, multiplier = _by_width(
    ConvNeXt, lambda net: net.depths == depths, width
  )
  return Architecture(
    backbone=name or _unknown(f"stages of {list(depths)} blocks", ConvNeXt),
    width_multiplier=multiplier,
    channels=channels,
    patch_size=patch,
  )


def _by_width(
  kind: type, fits: Callable[[Any], bool], width: int
) -> tuple[str, float]:
  """Returns the backbone that fits, and its width multiplier; "" if none.

  Of several, the one of this width, else the smallest.
  """
  first = lambda net: net.widths[0] if kind is ConvNeXt else net.num_features
  nets = {name: make() for name, make in BACKBONES.items()}
  known = {n: first(m) for n, m in nets.items() if isinstance(m, kind)}
  known = {name: size for name, size in known.items() if fits(nets[name])}
  for name, size in known.items():
    if size == width:
      return name, 1.0
  name = next(iter(known), "")
  return name, width / known[name] if name else 1.0


def _unknown(found: str, kind: type) -> NoReturn:
  known = [n for n, make in BACKBONES.items() if isinstance(make(), kind)]
  raise UserError(
    f"The weights have {found}, which is none of {', '.join(known)}."
  )


def _infer_projector(
  shapes: Mapping[str, tuple[int, ...]],
) -> tuple[tuple[int, ...], bool]:
  """Returns the projector's widths, and whether hidden layers have a bias."""
  numbers = [
    int(found[1])
    for key in shapes
    if (found := re.match(r"projector\.(\d{1,4})\.", key))
  ]
  if not numbers:
    return (), True
  # A norm is never last: a missing Linear after it is reported by name.
  end = max(numbers) + (3 if max(numbers) % 3 == 1 else 1)
  widths = []
  for i in range(0, end, 3):
    # If a hidden layer is missing, the norm after it tells its width.
    for key in (f"projector.{i}.weight", f"projector.{i + 1}.weight"):
      if shapes.get(key):
        widths.append(shapes[key][0])
        break
    else:
      raise UserError(
        f"The weights lack projector.{i}.weight; a projector has Linear, "
        "BatchNorm1d and ReLU for each hidden layer, then one Linear."
      )
  hidden = [f"projector.{3 * i}.bias" for i in range(len(widths) - 1)]
  return tuple(widths), not hidden or any(key in shapes for key in hidden)


def architecture_of(variables: Mapping[str, Any]) -> Architecture:
  """Returns the network of our variables."""
  return infer_architecture(
    {
      _torch_key(path): _torch_shape(leaf.shape)
      for path, leaf in flatten_dict(variables["params"]).items()
    }
  )


def _torch_key(path: tuple[str, ...]) -> str:
  """Returns our path as a torch name.

  Exact for a ViT and a ConvNeXt, else as far as `infer_architecture` needs.
  """
  *modules, leaf = path
  if len(modules) > 1 and modules[0] == "projector":
    kind, _, number = modules[1].rpartition("_")
    if re.fullmatch(r"\d{1,4}", number):
      modules[1] = str(3 * int(number) + (kind == "bn"))
  leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
  name = ".".join([*modules, leaf])
  return re.sub(r"\.([a-z]+\d*)_(\d+)(?=\.)", r".\1.\2", name)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  if len(shape) == 4:
    return (shape[3], shape[2], shape[0], shape[1])
  return tuple(reversed(shape)) if len(shape) == 2 else tuple(shape)
