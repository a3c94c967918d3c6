"""A pack of squares that `imsvd pack` made of another data set.

`data.path` is its folder; splits, labels, classes and names are those of what
was packed. The devices cut the views, as those of images in memory. A damaged
pack ends a run with one line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import printable
from imsvd_jax.data import pack_files
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.squares import Squares

_VALIDATION = ("val", "validation", "valid")


def make(settings: ConfigDict, split: str) -> source_lib.Source | None:
  """Returns one split of a pack; None if it has no evaluation part.

  Raises:
    UserError: It is damaged, has no such split or other channels.
  """
  source_lib.reject_num_examples(settings)
  folder = _folder(settings)
  digest, manifest = read_manifest(folder)
  part = _part(manifest, settings, split)
  if part is None:
    return None
  found = manifest["splits"][part]
  how = {key: manifest[key] for key in ("encoding", "size", "channels")}
  if how["channels"] != settings.channels:
    raise UserError(
      f"The pack {printable(folder)} has {how['channels']} channels, but"
      f" data.channels is {settings.channels}; pack again with another"
      " --config.data.channels, or change data.channels."
    )
  how |= {key: found[key] for key in ("num_classes", "multi_label")}
  shards = pack_files.Shards(folder, part, found["shards"], how)
  read = pack_files.reader(shards)
  squares = Squares(read, shards.sides, how["size"], how["channels"])
  return source_lib.Source(
    name=f"pack:{printable(folder)} {found['name']}",
    num_examples=len(shards.names),
    num_classes=found["num_classes"],
    label_names=tuple(map(printable, found["classes"])),
    channels=how["channels"],
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    images=squares,
    labels=shards.labels if found["num_classes"] else None,
    multi_label=found["multi_label"],
    fetch=source_lib.computed(
      lambda index: read(np.array([index]))[0], squares.shape[1:]
    ),
    describe=lambda index: printable(shards.names[index]),
    stamp=lambda: f"{digest} {part}",
    remarks=(f"{how['encoding']} squares of {how['size']} pixels",),
    why_unlabeled=found["why_unlabeled"],
  )


def split_names(settings: ConfigDict) -> list[str]:
  """Returns the splits of a pack."""
  _, manifest = read_manifest(_folder(settings))
  return [found["name"] for found in manifest["splits"].values()]


def read_manifest(folder: str) -> tuple[str, dict[str, Any]]:
  """Returns the checksum and the content of pack.json.

  Raises:
    UserError: It is no pack, or not finished.
  """
  path = os.path.join(folder, pack_files.MANIFEST)
  if not os.path.lexists(path):
    raise UserError(
      f"{printable(folder)} is no pack: it has no {pack_files.MANIFEST};"
      " expected the --output of `imsvd pack`."
    )
  digest, manifest = pack_files.read_checked(path)
  if manifest.get("format") != pack_files.FORMAT:
    raise UserError(
      f"The pack {printable(folder)} has the format"
      f" {printable(str(manifest.get('format')))!r}; expected"
      f" {pack_files.FORMAT!r}."
    )
  if "splits" not in manifest:
    raise UserError(
      f"The pack {printable(folder)} is not finished; the same `imsvd pack`"
      " command as before goes on."
    )
  if not _fits(manifest):
    raise pack_files.damaged(path, "does not say what a pack says")
  return digest, manifest


def _fits(manifest: Mapping[str, Any]) -> bool:
  """Returns whether everything is there that is used, of its type."""
  try:
    return (
      manifest["encoding"] in pack_files.ENCODINGS
      and type(manifest["size"]) is int
      and 0 < manifest["size"] <= pack_files.MAX_SIZE
      and type(manifest["channels"]) is int
      and 0 < manifest["channels"] <= pack_files.MAX_CHANNELS
      and set(manifest["splits"]) <= {*pack_files.PARTS}
      and all(map(_split_fits, manifest["splits"].values()))
    )
  except (TypeError, AttributeError, LookupError):
    return False


def _split_fits(split: Mapping[str, Any]) -> bool:
  texts = [split["name"], split["why_unlabeled"], *split["shards"]]
  count, classes = split["num_classes"], split["classes"]
  return (
    all(isinstance(text, str) for text in [*texts, *classes])
    and type(split["multi_label"]) is bool
    and type(count) is int
    and len(classes) in (0, count)
    and count >= 0
  )


def _folder(settings: ConfigDict) -> str:
  if not settings.path:
    raise UserError(
      "data.path is empty; source 'pack' expects the --output of `imsvd pack`."
    )
  return os.path.expanduser(settings.path)


def _part(
  manifest: Mapping[str, Any], settings: ConfigDict, split: str
) -> str | None:
  """Returns which part a split is; None: there is no evaluation part."""
  names = _VALIDATION if split in _VALIDATION else (split,)
  found = {value["name"]: part for part, value in manifest["splits"].items()}
  for name in names:
    if name in found:
      return found[name]
  if split != settings.train_split and len(found) == 1:
    return None
  raise UserError(
    f"The pack {printable(settings.path)} has no split {split!r}; expected one"
    f" of {', '.join(map(printable, found))}."
  )
