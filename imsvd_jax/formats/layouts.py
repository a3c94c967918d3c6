"""Where a torch file's backbone is: the names of other projects.

Every project wraps a network in a module of its own, with heads beside it. A
layout says how the backbone's names begin there, and which names belong to the
heads. A new project is one row of LAYOUTS.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from imsvd_jax.base.errors import UserError
from imsvd_jax.formats.other_names import to_timm
from imsvd_jax.formats.untrusted import one_line

# Parts of names that torch's wrappers add: DistributedDataParallel and compile.
_WRAPPERS = ("module", "_orig_mod")
# The children of a ResNet that have tensors, in order, beside its stages.
_PLAIN = ("conv1", "bn1", "fc")
# What a network's names have first: a ResNet's, a ViT's, a ConvNeXt's.
_FIRST = {"conv1", "patch_embed", "stem"}
# Beside the classifier, what a network's module holds that gives no features.
_NOT_FEATURES = re.compile(
  r"(?:fc|head_dist|mask_token)(?:\.|$)|head\.(?!norm\.)"
)


class Layout(NamedTuple):
  """How one project names its tensors, without wrappers."""

  project: str
  backbone: str  # How the backbone's names begin.
  head: str  # The first part of other names; every file has this one.
  heads: str  # Pattern of further ones.


_SOLO_HEADS = (
  r"projector|predictor|head|prototypes|queue\w*|\w+_loss_func|momentum_\w+"
)
LAYOUTS = (
  Layout("MVEB", "encoder.", "momentum_encoder", r"(?:momentum_)?projector"),
  Layout("SwAV", "", "prototypes", r"projection_head"),
  Layout("DINO", "backbone.", "head", r"(?!)"),
  Layout("MoCo v2", "encoder_q.", "encoder_k", r"queue|queue_ptr"),
  Layout("MoCo v3", "base_encoder.", "momentum_encoder", r"predictor"),
  Layout("SimSiam", "encoder.", "predictor", r"(?!)"),
  Layout("solo-learn", "backbone.", "classifier", _SOLO_HEADS),
  Layout("solo-learn", "encoder.", "classifier", _SOLO_HEADS),
  Layout(
    "lightly",
    "backbone.",
    "projection_head",
    r"\w+_(?:head|classifier|momentum)|(?:student|query)_\w+|prototypes|queues"
    r"|criterion|memory_bank",
  ),
  Layout(
    "lightly", "teacher_backbone.", "teacher_head", r"student_\w+|criterion"
  ),
)

VIT_LAYOUTS = (
  Layout("MAE", "", "decoder_embed", r"decoder_\w+|mask_token"),
  Layout("DINOv2", "", "mask_token", r"(?!)"),
  Layout("DINOv2", "backbone.", "dino_head", r"ibot_head"),
)


class Names(NamedTuple):
  """The tensors of a file that belong to the encoder.

  Attributes:
    keys: The file's key by our name, which begins with "backbone." or
      "projector.".
    project: Whose layout the file has; empty if it is torchvision's or ours.
    left_out: What belongs to heads, such as "predictor.*".
  """

  keys: dict[str, str]
  project: str = ""
  left_out: tuple[str, ...] = ()


def read_names(keys: Collection[str], prefix: str = "") -> Names:
  """Finds the encoder among the tensors of a file.

  Args:
    keys: Of a state dict.
    prefix: How the backbone's names begin, for layouts not in the table; all
      other tensors are then left out.

  Raises:
    UserError: No name begins with the prefix, or two networks are mixed.
  """
  bare = {key: _bare(key) for key in keys}
  layout = _given(bare.values(), prefix) if prefix else _known(bare.values())
  if layout is None:
    whole = any(name.startswith("backbone.") for name in bare.values())
    if not whole:
      _check_known(bare.values())
    start = "" if whole else "backbone."
    return Names(_by_our_name({k: start + name for k, name in bare.items()}))
  names = {}
  left_out: dict[str, None] = {}
  for key, name in bare.items():
    if head := _head(name, layout):
      left_out[head] = None
    else:
      names[key] = "backbone." + name.removeprefix(layout.backbone)
  return Names(_by_our_name(names), layout.project, tuple(left_out))


def _bare(key: str) -> str:
  """Returns a name without the parts that wrappers add."""
  return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _starts(names: Iterable[str]) -> str:
  """Returns how the names of the networks in a file begin, as a list."""
  first = re.compile(
    r"(.*\.)(?:(?:layer1|\d)\.0\.conv1|patch_embed\.proj|stem\.0)\.weight"
  )
  found = {match[1] for match in map(first.fullmatch, names) if match}
  return ", ".join(one_line(start, 100) for start in sorted(found)[:3])


def _check_known(names: Collection[str]) -> None:
  """Raises UserError for a ResNet in another place, which a prefix can name."""
  if "conv1.weight" not in names and (found := _starts(names)):
    raise UserError(
      f"The names of the ResNet begin with {found}, which is no known layout;"
      f" imsvd import_weights --prefix={found.split(', ')[0]} takes it."
    )


def _given(names: Collection[str], prefix: str) -> Layout:
  start = _bare(prefix.rstrip(".") + ".")
  if not any(name.startswith(start) for name in names):
    raise UserError(
      f"No name begins with {prefix!r}; the names of ResNets in the file begin"
      f" with {_starts(names) or 'nothing else'}."
    )
  return Layout("", start, "", r"(?!)")


def _known(names: Collection[str]) -> Layout | None:
  """Returns the layout of a file's names, if it has one of the table."""
  first = {name.partition(".")[0] for name in names}
  for layout in (*VIT_LAYOUTS, *LAYOUTS):
    rest = {part for part in first if not _is_head(part, layout)}
    start = layout.backbone.removesuffix(".")
    found = rest == {start} if start else bool(rest & _FIRST)
    if found and layout.head in first:
      return layout
  return None


def _is_head(part: str, layout: Layout) -> bool:
  return part == layout.head or bool(re.fullmatch(layout.heads, part))


def _head(name: str, layout: Layout) -> str:
  """Returns the head of a tensor, such as "predictor.*"; "" in the backbone."""
  parts, start = name.split("."), layout.backbone.split(".")[:-1]
  depth = max(n for n in range(len(start) + 1) if parts[:n] == start[:n])
  inside = depth == len(start) and not _is_head(parts[0], layout)
  if inside and not _NOT_FEATURES.match(".".join(parts[depth:])):
    return ""
  head = ".".join(parts[: depth + 1])
  return head if head == name else f"{head}.*"


def _by_our_name(names: dict[str, str]) -> dict[str, str]:
  """Returns the file's keys by our names."""
  children = _children(names.values())
  inner = {name.removeprefix("backbone.") for name in names.values()}
  known = to_timm(inner)
  keys: dict[str, str] = {}
  for key, name in names.items():
    start, _, rest = name.partition(".")
    rest = known.get(rest, rest)
    child, dot, rest = rest.partition(".")
    if start == "backbone":
      name = f"{start}.{children.get(child, child)}{dot}{rest}"
    name = re.sub(r"\.shortcut\.([01])\.", r".downsample.\1.", name)
    if name in keys:
      both = ", ".join(one_line(k, 100) for k in (keys[name], key))
      raise UserError(
        f"The file has both {both}, two names of one tensor: it mixes two"
        " networks."
      )
    keys[name] = key
  return keys


def _children(names: Iterable[str]) -> dict[str, str]:
  """Returns torchvision's name by number, for a ResNet in an nn.Sequential."""
  numbered = re.compile(r"backbone\.(\d+)\.(\d+\.)?")
  found = {m[1]: bool(m[2]) for m in map(numbered.match, names) if m}
  order = sorted(found, key=int)
  stages = [number for number in order if found[number]]
  plain = [number for number in order if not found[number]]
  return {
    **dict(zip(plain, _PLAIN, strict=False)),
    **{number: f"layer{i}" for i, number in enumerate(stages, 1)},
  }
