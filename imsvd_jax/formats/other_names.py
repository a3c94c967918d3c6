"""timm's names of a ViT or a ConvNeXt, and those of other projects.

A pair of patterns is timm's name and the other one; {} is a number.
"""

import functools
import re
from collections.abc import Collection

# torchvision's, where `features` counts stem, stages and halvings in one.
_VIT = [
  ("cls_token", "class_token"),
  ("pos_embed", "encoder.pos_embedding"),
  ("patch_embed.proj.", "conv_proj."),
  ("blocks.{}.norm1.", "encoder.layers.encoder_layer_{}.ln_1."),
  ("blocks.{}.norm2.", "encoder.layers.encoder_layer_{}.ln_2."),
  (
    "blocks.{}.attn.qkv.",
    "encoder.layers.encoder_layer_{}.self_attention.in_proj_",
  ),
  (
    "blocks.{}.attn.proj.",
    "encoder.layers.encoder_layer_{}.self_attention.out_proj.",
  ),
  ("blocks.{}.mlp.fc1.", "encoder.layers.encoder_layer_{}.mlp.0."),
  ("blocks.{}.mlp.fc2.", "encoder.layers.encoder_layer_{}.mlp.3."),
  ("norm.", "encoder.ln."),
  ("head.", "heads.head."),
]
_CONVNEXT = [
  ("stem.{}.", "features.0.{}."),
  ("head.norm.", "classifier.0."),
  ("head.fc.", "classifier.2."),
  *[
    (f"stages.{i}.{ours}", f"features.{2 * i + block}.{theirs}")
    for i in range(4)
    for block, ours, theirs in (
      (0, "downsample.{}.", "{}."),
      (1, "blocks.{}.conv_dw.", "{}.block.0."),
      (1, "blocks.{}.norm.", "{}.block.2."),
      (1, "blocks.{}.mlp.fc1.", "{}.block.3."),
      (1, "blocks.{}.mlp.fc2.", "{}.block.5."),
      (1, "blocks.{}.gamma", "{}.layer_scale"),
    )
  ],
]
# The paper's code.
_FIRST_CONVNEXT = [
  ("stem.{}.", "downsample_layers.0.{}."),
  ("stages.{}.downsample.{}.", "downsample_layers.{}.{}."),
  ("stages.{}.blocks.{}.conv_dw.", "stages.{}.{}.dwconv."),
  ("stages.{}.blocks.{}.mlp.fc1.", "stages.{}.{}.pwconv1."),
  ("stages.{}.blocks.{}.mlp.fc2.", "stages.{}.{}.pwconv2."),
  ("stages.{}.blocks.{}.", "stages.{}.{}."),
  ("head.norm.", "norm."),
  ("head.fc.", "head."),
]
# By a name that every file of the project has.
_PROJECTS = {
  "conv_proj.weight": _VIT,
  "features.0.0.weight": _CONVNEXT,
  "downsample_layers.0.0.weight": _FIRST_CONVNEXT,
}
# DINOv2's, beside timm's: registers, and blocks in chunks.
_DINOV2 = [("reg_token", "register_tokens"), ("blocks.{1}.", "blocks.{0}.{1}.")]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
  return re.compile(re.sub(r"\\{\d?\\}", r"(\\d{1,3})", re.escape(template)))


def _renamed(name: str, pairs: Collection[tuple[str, str]]) -> str:
  """Replaces the beginning of a name by the first (old, new) that fits."""
  for old, new in pairs:
    if found := _pattern(old).match(name):
      return new.format(*found.groups()) + name[found.end() :]
  return name


def to_timm(names: Collection[str]) -> dict[str, str]:
  """Returns timm's name by the name in a file, without prefixes."""
  pairs = next((p for key, p in _PROJECTS.items() if key in names), _DINOV2)
  back = [(theirs, ours) for ours, theirs in pairs]
  # Newer versions of torchvision write `mlp.0`, older ones `mlp.linear_1`.
  old = {"mlp.linear_1.": "mlp.0.", "mlp.linear_2.": "mlp.3."}
  result = {}
  for name in names:
    plain = name
    for first, later in old.items():
      plain = plain.replace(first, later)
    result[name] = _renamed(plain, back)
  return result


def to_torchvision_names(name: str) -> str:
  """Returns torchvision's name of a ViT's or a ConvNeXt's tensor."""
  convnext = re.match(r"stem\.|stages\.|head\.(norm|fc)\.", name)
  return _renamed(name, _CONVNEXT if convnext else _VIT)
