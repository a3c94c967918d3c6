"""The network of a set of weights, and the names of its tensors.

`entries` is the one table of names, which every conversion of weights uses. The
names on the torch side are torchvision's.
"""

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from flax.traverse_util import flatten_dict

from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.models import BACKBONES
from imsvd_jax.models.resnet import STEMS, ResNet

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
  """

  backbone: str
  width_multiplier: float = 1.0
  stem: str = "imagenet"
  channels: int = 3
  projector: tuple[int, ...] = ()
  hidden_bias: bool = True
  last_bias: bool = False

  def network(self) -> ResNet:
    """Returns the backbone as a module (no parameters are made)."""
    make = lookup(BACKBONES, self.backbone, "backbone")
    return cast(
      ResNet, make(width_multiplier=self.width_multiplier, stem=self.stem)
    )

  def describe(self) -> str:
    """Returns e.g. "resnet18 (width 0.25, small stem)"."""
    if self.width_multiplier == 1 and self.stem == "imagenet":
      return self.backbone
    width = f"width {self.width_multiplier:g}, {self.stem} stem"
    return f"{self.backbone} ({width})"


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


def _backbone(architecture: Architecture) -> Iterator[Entry]:
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
  """Returns every tensor of the network, in torchvision's order."""
  return [*_backbone(architecture), *_projector(architecture)]


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
    shapes: Shape by torchvision name, with "backbone." and "projector." in
      front.

  Returns:
    The nearest architecture; the caller must compare every shape.

  Raises:
    UserError: The names are not those of a known ResNet.
  """
  counts: dict[int, int] = collections.Counter()
  for key in shapes:
    # No network has more digits; a file from a stranger may.
    if found := re.match(r"backbone\.layer(\d{1,2})\.(\d{1,3})\.", key):
      stage, block = int(found[1]), int(found[2])
      counts[stage] = max(counts[stage], block + 1)
  stem = shapes.get("backbone.conv1.weight", ())
  if len(stem) != 4 or not counts:
    names = [key.removeprefix("backbone.") for key in [*shapes][:9]]
    sample = ", ".join(map(repr, names))
    raise UserError(
      "The weights are not a ResNet's: expected conv1.weight with 4 dimensions "
      f"and layer1.0.conv1.weight, found {sample[:200] or 'nothing'}."
    )
  sizes = tuple(counts[i] for i in range(1, max(counts) + 1))
  bottleneck = any(".conv3." in key for key in shapes)
  # By majority, so that one damaged tensor is reported by its name.
  witnesses = ("conv1.weight", "bn1.weight", "bn1.bias", "layer1.0.bn1.weight")
  votes = [shapes.get(f"backbone.{key}", ()) for key in witnesses]
  filters = collections.Counter(v[0] for v in votes if v).most_common(1)[0][0]
  widths, hidden_bias = _infer_projector(shapes)
  if not all((filters, stem[1], *widths)):
    raise UserError("The weights have a layer without inputs or outputs.")
  return Architecture(
    backbone=_backbone_name(bottleneck, sizes),
    width_multiplier=filters / 64,
    stem=_stem_name(stem[2]),
    channels=stem[1],
    projector=widths,
    hidden_bias=hidden_bias,
    last_bias=f"projector.{3 * len(widths) - 3}.bias" in shapes,
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
  """Returns our path as a torch name, as far as `infer_architecture` needs."""
  *modules, leaf = path
  if len(modules) > 1 and modules[0] == "projector":
    kind, _, number = modules[1].rpartition("_")
    if re.fullmatch(r"\d{1,4}", number):
      modules[1] = str(3 * int(number) + (kind == "bn"))
  leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
  name = ".".join([*modules, leaf])
  return re.sub(r"\.layer(\d+)_(\d+)\.", r".layer\1.\2.", name)


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  if len(shape) == 4:
    return (shape[3], shape[2], shape[0], shape[1])
  return tuple(reversed(shape))
