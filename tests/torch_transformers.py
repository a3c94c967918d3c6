"""Independent ViT and ConvNeXt: functions of a state dict in plain PyTorch."""

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional


def norm(state, name, x):
  weight = state[f"{name}.weight"]
  return F.layer_norm(x, (len(weight),), weight, state[f"{name}.bias"], 1e-6)


def linear(state, name, x):
  return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def convolve(state, name, x, stride=1, **options):
  weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
  return F.conv2d(x, weight, bias, stride, **options)


def mlp(state, name, x):
  return linear(state, f"{name}.fc2", F.gelu(linear(state, f"{name}.fc1", x)))


def count(state, prefix):
  numbers = {k[len(prefix) :].split(".")[0] for k in state if prefix in k}
  return len(numbers)


def positions(table, side, height, width):
  extra = table.shape[1] - side**2
  grid = table[:, extra:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
  if (height, width) != (side, side):
    size = (height, width)
    grid = F.interpolate(grid, size, mode="bicubic", antialias=True)
  return table[:, :extra], grid.flatten(2).transpose(1, 2)


def vit(state, images, *, heads, side):
  """Features of images [B, C, H, W]; positions were learned for side x side."""
  patch = state["patch_embed.proj.weight"].shape[-1]
  x = convolve(state, "patch_embed.proj", images, patch)
  first, table = positions(state["pos_embed"], side, *x.shape[2:])
  x = x.flatten(2).transpose(1, 2) + table
  tokens = [state["cls_token"] + (first if first.shape[1] else 0)]
  if "reg_token" in state:
    tokens.append(state["reg_token"])
  prefix = sum(t.shape[1] for t in tokens)
  x = torch.cat([t.expand(len(x), -1, -1) for t in tokens] + [x], dim=1)
  for i in range(count(state, "blocks.")):
    name = f"blocks.{i}"
    y = linear(state, f"{name}.attn.qkv", norm(state, f"{name}.norm1", x))
    q, k, v = y.reshape(*y.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = linear(state, f"{name}.attn.proj", y)
    x = x + y * state.get(f"{name}.ls1.gamma", 1)
    y = mlp(state, f"{name}.mlp", norm(state, f"{name}.norm2", x))
    x = x + y * state.get(f"{name}.ls2.gamma", 1)
  if "fc_norm.weight" in state:
    return norm(state, "fc_norm", x[:, prefix:].mean(1))
  return norm(state, "norm", x)[:, 0]


def convnext(state, images):
  """Features of images [B, C, H, W]."""
  last = lambda function, x: function(x.movedim(1, -1)).movedim(-1, 1)
  patch = state["stem.0.weight"].shape[-1]
  x = convolve(state, "stem.0", images, patch)
  x = last(lambda y: norm(state, "stem.1", y), x)
  for i in range(count(state, "stages.")):
    stage = f"stages.{i}"
    if i:
      x = last(lambda y, s=stage: norm(state, f"{s}.downsample.0", y), x)
      x = convolve(state, f"{stage}.downsample.1", x, 2)
    for j in range(count(state, f"{stage}.blocks.")):
      name = f"{stage}.blocks.{j}"
      groups = x.shape[1]
      y = convolve(state, f"{name}.conv_dw", x, padding=3, groups=groups)
      y = norm(state, f"{name}.norm", y.movedim(1, -1))
      y = mlp(state, f"{name}.mlp", y) * state[f"{name}.gamma"]
      x = x + y.movedim(-1, 1)
  return norm(state, "head.norm", x.mean((2, 3)))
