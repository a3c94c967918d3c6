"""ResNets that compute the same numbers as torchvision's.

Weights are portable in both directions because of explicit padding (never
"SAME", which pads strided convolutions on the other side), the stride on the
3x3 convolution of a bottleneck, batch-norm epsilon 1e-5 and momentum 0.9.
Parameter names follow torchvision's (`layer1_0/conv1/kernel` here is
`layer1.0.conv1.weight` there), so that a conversion is a renaming.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.models.convolution import convolve

# name: (kernel size, stride, whether a 3x3/2 max-pool follows)
STEMS: dict[str, tuple[int, int, bool]] = {
  "imagenet": (7, 2, True),
  "cifar": (3, 1, False),
  "small": (5, 2, False),  # Early striding keeps laptops fast.
}

# More would be most of the positions of any map here.
MAX_POOL_GRID = 8

# Of the convolutions: torchvision's, and torch's own for any kernel, which is
# uniform within +-1 / sqrt(fan_in).
INITS: dict[str, nn.initializers.Initializer] = {
  "fan_out_normal": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
  "torch_default": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


@jax.custom_vjp
def max_pool(x: jax.Array) -> jax.Array:
  """Maximum of 3x3 windows at a stride of 2, with a border of one.

  Equals torch's `max_pool2d(x, 3, 2, 1)`, and so does its gradient: of equal
  values, the first of a window gets all. XLA's own gradient scatters numbers,
  which takes 4% of a ResNet-50 step on a GPU; there, this one gathers them.

  Args:
    x: [B, H, W, C].

  Returns:
    [B, ceil(H / 2), ceil(W / 2), C].
  """
  return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return max_pool(x), x


def _max_pool_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  scatter = lambda x, gradient: jax.vjp(max_pool.fun, x)[1](gradient)[0]
  return (
    jax.lax.platform_dependent(
      x, gradient, cuda=gather_max_gradient, default=scatter
    ),
  )


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def gather_max_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
  """Returns the gradient of `max_pool` at x: each pixel looks it up.

  A pixel is in up to four windows: the one at half its position and, where its
  row or column is odd, the next.
  """
  height, width = x.shape[1:3]
  place = _places(x)
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, (1, height, width, 1), axis)
    for axis in (1, 2)
  )
  total = jnp.zeros((), jnp.float32)
  for down in (0, 1):
    for right in (0, 1):
      # A window begins one before twice its position.
      in_row, in_column = row % 2 + 1 - 2 * down, column % 2 + 1 - 2 * right
      look = lambda y, down=down, right=right: _twice(y, down, right)[
        :, :height, :width
      ]
      mine = look(place) == jnp.where(
        (in_row >= 0) & (in_column >= 0), 3 * in_row + in_column, -1
      )
      total += jnp.where(mine, look(gradient).astype(jnp.float32), 0.0)
  return total.astype(x.dtype)


def _places(x: jax.Array) -> jax.Array:
  """Returns where in each window its first maximum is, 0 to 8: int8."""
  height, width = x.shape[1:3]
  border = ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0))
  padded = jnp.pad(x, border, constant_values=-jnp.inf)
  windows = [
    padded[:, row : row + height : 2, column : column + width : 2]
    for row in range(3)
    for column in range(3)
  ]
  best, place = windows[0], jnp.zeros(windows[0].shape, jnp.int8)
  for number, value in enumerate(windows[1:], 1):
    place = jnp.where(value > best, jnp.int8(number), place)
    best = jnp.maximum(best, value)
  return place


def _twice(x: jax.Array, down: int, right: int) -> jax.Array:
  """Repeats each position 2x2 times, after a move by `down` and `right`."""
  batch, height, width, channels = x.shape
  x = jnp.pad(x[:, down:, right:], ((0, 0), (0, down), (0, right), (0, 0)))
  shape = (batch, height, 2, width, 2, channels)
  x = jnp.broadcast_to(x[:, :, None, :, None], shape)
  return x.reshape(batch, 2 * height, 2 * width, channels)


def _conv(
  filters: int,
  kernel: int,
  stride: int,
  dtype: Any,
  init: str,
  name: str | None = None,
) -> nn.Conv:
  pad = (kernel - 1) // 2
  return nn.Conv(
    filters,
    (kernel, kernel),
    strides=(stride, stride),
    padding=((pad, pad), (pad, pad)),
    use_bias=False,
    dtype=dtype,
    kernel_init=INITS[init],
    conv_general_dilated=convolve,
    name=name,
  )


def batch_norm(
  dtype: Any, name: str | None = None, *, zero_scale: bool = False
) -> nn.BatchNorm:
  """Batch norm with torch's constants; statistics are float32 or wider.

  Unlike torch's, the running variance is the biased estimate: n / (n - 1)
  smaller, where n is the number of positions averaged over.
  """
  scale_init = nn.initializers.zeros if zero_scale else nn.initializers.ones
  return nn.BatchNorm(
    momentum=0.9, epsilon=1e-5, dtype=dtype, scale_init=scale_init, name=name
  )


def _shortcut(
  x: jax.Array, filters: int, stride: int, dtype: Any, init: str, train: bool
) -> jax.Array:
  """The identity where shapes allow it, else a strided 1x1 projection."""
  if stride == 1 and x.shape[-1] == filters:
    return x
  x = _conv(filters, 1, stride, dtype, init, "downsample_conv")(x)
  norm = batch_norm(dtype, "downsample_bn")
  return norm(x, use_running_average=not train)


class _Block(nn.Module):
  """Convolutions, of which the first 3x3 one is strided, and a shortcut."""

  filters: int
  stride: int = 1
  dtype: Any = jnp.float32
  zero_init_residual: bool = True
  kernel_init: str = "fan_out_normal"

  kernels: ClassVar[tuple[int, ...]]
  expansion: ClassVar[int]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps [B, h, w, C] to [B, h / stride, w / stride, expansion * filters]."""
    last, strided = len(self.kernels), self.kernels.index(3) + 1
    wide = self.filters * self.expansion
    y = x
    for i, kernel in enumerate(self.kernels, start=1):
      filters = wide if i == last else self.filters
      stride = self.stride if i == strided else 1
      conv = _conv(
        filters, kernel, stride, self.dtype, self.kernel_init, f"conv{i}"
      )
      y = conv(y)
      zero_scale = i == last and self.zero_init_residual
      norm = batch_norm(self.dtype, f"bn{i}", zero_scale=zero_scale)
      y = norm(y, use_running_average=not train)
      if i < last:
        y = nn.relu(y)
    shortcut = _shortcut(
      x, wide, self.stride, self.dtype, self.kernel_init, train
    )
    return nn.relu(y + shortcut)


class BasicBlock(_Block):
  """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

  kernels = (3, 3)
  expansion = 1


class Bottleneck(_Block):
  """1x1, 3x3 (strided), 1x1 convolutions and a shortcut (ResNet-50 up)."""

  kernels = (1, 3, 1)
  expansion = 4


class ResNet(nn.Module):
  """A residual network without classifier.

  Attributes:
    block: BasicBlock or Bottleneck.
    stage_sizes: Blocks in each of the stages; every stage but the first
      halves the resolution and doubles the filters.
    width_multiplier: Scales the filters of the stem and of every stage, and so
      the features, like SimCLR's "2x" (torchvision's `wide_resnet50_2` widens
      only the 3x3 convolutions). 0.25 gives a first stage of 16 filters, 0.375
      one of 24.
    stem: "imagenet" (7x7 stride 2, then max-pool), "cifar" (3x3 stride 1) or
      "small" (5x5 stride 2).
    dtype: Type that convolutions compute in; parameters and batch statistics
      are float32, and outputs float32 or wider.
    remat: Whether to recompute each block in the backward pass: less memory,
      about a third more time.
    zero_init_residual: Whether each block starts as its shortcut alone (the
      scale of its last batch norm is zero).
    kernel_init: Initial convolutions: "fan_out_normal" (torchvision's ResNets)
      or "torch_default" (torch's for any convolution).
    pool_grid: G; the features are the means of G x G parts of the last map.

  Raises:
    UserError: Unknown stem or init, a width that leaves no filters, or a grid
      without parts.
  """

  block: type[_Block]
  stage_sizes: tuple[int, ...]
  width_multiplier: float = 1.0
  stem: str = "imagenet"
  dtype: Any = jnp.float32
  remat: bool = False
  zero_init_residual: bool = True
  kernel_init: str = "fan_out_normal"
  pool_grid: int = 1

  def __post_init__(self) -> None:
    lookup(STEMS, self.stem, "stem")
    lookup(INITS, self.kernel_init, "init")
    if self.num_filters < 1:
      raise UserError(
        f"width_multiplier {self.width_multiplier} leaves {self.num_filters} of"
        " 64 filters; use 1/64 or more."
      )
    if not 1 <= self.pool_grid <= MAX_POOL_GRID:
      raise UserError(
        f"model.pool_grid={self.pool_grid}; expected 1 (one mean of the whole"
        f" map) to {MAX_POOL_GRID}."
      )
    super().__post_init__()

  @property
  def num_filters(self) -> int:
    """Filters of the stem and of the first stage."""
    return round(64 * self.width_multiplier)

  @property
  def num_features(self) -> int:
    """F, the size of the pooled features."""
    doublings = 2 ** (len(self.stage_sizes) - 1)
    channels = self.num_filters * doublings * self.block.expansion
    return channels * self.pool_grid**2

  def setup(self) -> None:
    """Creates the stem and the stages under torchvision's names."""
    kernel, stride, _ = STEMS[self.stem]
    self.conv1 = _conv(
      self.num_filters, kernel, stride, self.dtype, self.kernel_init
    )
    self.bn1 = batch_norm(self.dtype)
    block = self.block
    if self.remat:  # Argument 2 is `train`: self is 0 and x is 1.
      block = nn.remat(block, static_argnums=(2,))
    for i, size in enumerate(self.stage_sizes):
      blocks = [
        block(
          filters=self.num_filters * 2**i,
          stride=2 if i > 0 and j == 0 else 1,
          dtype=self.dtype,
          zero_init_residual=self.zero_init_residual,
          kernel_init=self.kernel_init,
        )
        for j in range(size)
      ]
      setattr(self, f"layer{i + 1}", blocks)

  def feature_maps(self, images: jax.Array, train: bool = False) -> jax.Array:
    """Maps images [B, H, W, C] to the last stage's output [B, h, w, F]."""
    x = self.conv1(images)
    x = nn.relu(self.bn1(x, use_running_average=not train))
    if STEMS[self.stem][2]:
      x = max_pool(x)
    for i in range(len(self.stage_sizes)):
      for block in getattr(self, f"layer{i + 1}"):
        x = block(x, train)
    return x.astype(jnp.promote_types(self.dtype, jnp.float32))

  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images [B, H, W, C] to pooled features [B, F]."""
    return self.pooled(self.feature_maps(images, train))

  def pooled(self, maps: jax.Array) -> jax.Array:
    """Maps the last stage's output [B, h, w, F / G^2] to features [B, F].

    As torch's `AdaptiveAvgPool2d(G)` and `flatten`: the parts of one channel
    are neighbors, row by row, and overlap where G does not divide h or w.
    """
    if self.pool_grid == 1:
      return jnp.mean(maps, axis=(1, 2))
    rows, columns = (
      part_weights(side, self.pool_grid) for side in maps.shape[1:3]
    )
    parts = jnp.einsum(
      "bhwc,hi,wj->bcij", maps, rows, columns, precision="highest"
    )
    return parts.reshape(len(maps), -1)

  def spread(self, maps: jax.Array) -> jax.Array:
    """Maps [B, h, w, F / G^2] to [B, h, w, F]: a position's features.

    They are those of an image that looks like this position everywhere.
    """
    return jnp.repeat(maps, self.pool_grid**2, axis=-1)


def part_weights(size: int, parts: int) -> np.ndarray:
  """Returns the share of each position in the mean of each part.

  Args:
    size: Positions of a row.
    parts: Parts that the row is cut into.

  Returns:
    [size, parts] float32; each column sums to 1.
  """
  weights = np.zeros((size, parts), np.float32)
  for part in range(parts):
    start, stop = size * part // parts, -(-size * (part + 1) // parts)
    weights[start:stop, part] = 1 / (stop - start)
  return weights
