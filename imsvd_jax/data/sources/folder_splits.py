"""Which files of a folder of images belong to a split.

A split is the subfolder of its name. Case does not matter, nor do the usual
synonyms: "Training", "train_set" and "train images" are "train"; "val",
"valid", "validation", "dev", "eval" and "test", "testing" name evaluation
parts, of which the first that exists is used. Without a subfolder for training,
all images outside of the evaluation parts are for training. Where a folder only
looks like a split, nothing is guessed.

"train[:80%]" and "train[80%:]" are parts of a split, and `data.holdout` is a
part of train that is for evaluation. Both take their share of every class, in
the order of a hash of the files' names.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base.errors import UserError
from imsvd_jax.base.files import printable
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.sources.folder_listing import Found, list_directory, walk

_TRAIN = ("train", "training", "trn")
_EVALUATION = (
  *("val", "validation", "valid", "eval", "evaluation", "dev"),
  *("test", "testing", "tst", "heldout"),
)
_KNOWN = {*_TRAIN, *_EVALUATION}
_SUFFIX = re.compile(r"(set|split|part|data|images|imgs|pictures|photos)$")
# A word of a split, with what people add to it, or after other words.
_WORD = "|".join(sorted(_KNOWN, key=len, reverse=True))
_BEGINS_LIKE_A_SPLIT = re.compile(
  rf"({_WORD})([-_. ]?(set|split|part|data|images|imgs|fold|\d+)"
  r"|[-_. ](new|old|full|final|small|large|clean|[a-z]))*"
)
_ENDS_LIKE_A_SPLIT = re.compile(rf".+[-_. ]({_WORD})")
_SLICE = re.compile(r"(.*)\[(-?\d+%?)?:(-?\d+%?)?\]")


class Part(NamedTuple):
  """The files of a split.

  Attributes:
    top: The directory.
    found: The images below it.
    is_train: Whether it is the training part, or a part of that.
    chosen: Which of the images, increasing; None: all.
    slice_text: What distinguishes the part from all of `top`, for its name.
    remarks: Facts for the log.
  """

  top: str
  found: Found
  is_train: bool
  chosen: np.ndarray | None = None
  slice_text: str = ""
  remarks: tuple[str, ...] = ()


class Layout:
  """The splits of `data.path`."""

  def __init__(self, settings: ConfigDict) -> None:
    """Lists the first level of the folder.

    Raises:
      UserError: It is no directory, or it is not clear what the splits are.
    """
    self._settings = settings
    self._root = root_of(settings.path)
    self._holdout = source_lib.setting(settings, "holdout")
    names = (settings.train_split, settings.eval_split)
    for name in filter(None, names):
      _check_inside(name)
    self._folders = sorted(list_directory_of(self._root))
    self._evaluation = self._evaluation_folders()
    self._train = self._train_folder()
    self._check_evaluation()
    self._check_clear()

  def part(self, split: str) -> Part | None:
    """Returns a split; None if it is for evaluation and not there."""
    name, first, last = self._parsed(split)
    if self._is_train(name):
      part = self._training_part()
    elif self._holdout:
      part = self._held_out(for_training=False)
    elif not self._settings.train_split:
      return None  # Every folder is a class.
    elif path := self._evaluation_path(name):
      train = [self._train] if self._train else []
      part = Part(path, walk(path, excluded=train), is_train=False)
    else:
      return None
    if first is None and last is None:
      return part
    return _sliced(part, first, last, split)

  @functools.cached_property
  def training_files(self) -> Found:
    """Returns all images that are not in an evaluation part."""
    if self._train:
      return walk(self._train, excluded=self._evaluation)
    return walk(self._root, excluded=self._evaluation)

  # --- Names ------------------------------------------------------------------

  def _parsed(self, split: str) -> tuple[str, str | None, str | None]:
    """Returns the name of a split, and the ends of a slice."""
    found = _SLICE.fullmatch(split)
    if found is None or self._path_of(split):
      return split, None, None
    return found[1], found[2] or "0", found[3] or "100%"

  def _path_of(self, name: str) -> str | None:
    """Returns the subfolder of exactly this name, in Unicode's NFC."""
    for folder in self._folders:
      if _nfc(folder) == _nfc(name):
        return os.path.join(self._root, folder)
    path = os.path.join(self._root, name)
    return path if "/" in name and tf.io.gfile.isdir(path) else None

  def _is_train(self, name: str) -> bool:
    own = self._parsed(self._settings.train_split)[0]
    return name == own or (
      _plain(name) in _TRAIN and self._path_of(name) is None
    )

  def _train_folder(self) -> str | None:
    name = self._parsed(self._settings.train_split)[0]
    if not name:
      return None
    if path := self._path_of(name):
      return path
    if _plain(name) not in _TRAIN:
      self._no_split(name)
    same = [f for f in self._folders if _plain(f) in _TRAIN]
    if len(same) > 1:
      self._unclear(same)
    return os.path.join(self._root, same[0]) if same else None

  def _evaluation_folders(self) -> list[str]:
    """Returns the parts not to train on, the one to evaluate on first."""
    if not self._settings.train_split:
      return []
    own = self._parsed(self._settings.eval_split)[0]
    exact = None
    if own and not self._is_train(own):
      exact = self._path_of(own)
    by_rank = sorted(
      (f for f in self._folders if _plain(f) in _EVALUATION),
      key=lambda f: (_plain(f) != _plain(own), _EVALUATION.index(_plain(f))),
    )
    paths = [os.path.join(self._root, folder) for folder in by_rank]
    return list(dict.fromkeys([*filter(None, [exact]), *paths]))

  def _evaluation_path(self, name: str) -> str | None:
    if path := self._path_of(name):
      return path
    if _plain(name) not in _EVALUATION:
      self._no_split(name)
    return self._evaluation[0] if self._evaluation else None

  def _check_evaluation(self) -> None:
    """Raises UserError for the name of an evaluation part that cannot be."""
    name = self._parsed(self._settings.eval_split)[0]
    is_usual = not name or _plain(name) in _EVALUATION
    if is_usual or not self._settings.train_split:
      return
    if not self._is_train(name) and self._path_of(name) is None:
      self._no_split(name)

  # --- What is not clear ------------------------------------------------------

  def _no_split(self, name: str) -> NoReturn:
    known = ", ".join(printable(folder) for folder in self._folders) or "none"
    raise UserError(
      f"{printable(self._root)!r} has no split {name!r}; expected one of its"
      f" subfolders ({known}), 'train', or a part such as 'train[:80%]'."
    )

  def _unclear(self, folders: list[str]) -> NoReturn:
    shown = ", ".join(repr(printable(folder)) for folder in folders[:5])
    raise UserError(
      f"{printable(self._root)!r} has folders that look like splits: {shown}."
      " Set data.train_split and data.eval_split to the names of the two to"
      " use, or data.train_split='' if every folder is a class."
    )

  def _check_clear(self) -> None:
    """Raises UserError if images might be trained on that are for testing."""
    if not self._settings.train_split:
      return
    if self._train is None:
      self._check_second_level()
    if self._train is not None and (
      self._evaluation or not self._settings.eval_split
    ):
      return
    used = {self._train, *self._evaluation}
    others = [f for f in self._folders if self._path_of(f) not in used]
    begin = [f for f in others if _BEGINS_LIKE_A_SPLIT.fullmatch(_lower(f))]
    end = [f for f in others if _ENDS_LIKE_A_SPLIT.fullmatch(_lower(f))]
    if begin or len(end) > 1:
      self._unclear([*begin, *end])
    if self._train is not None and len(others) > 1 and self._is_like(others):
      self._unclear([os.path.basename(self._train)])

  def _is_like(self, others: list[str]) -> bool:
    """Returns whether the folder for training looks like one of the others.

    That is, a class named "train": neither has folders within.
    """
    tops = [str(self._train), *(os.path.join(self._root, f) for f in others)]
    return all(
      not list_directory(top).folders and walk(top, first_only=True).files
      for top in tops
    )

  def _check_second_level(self) -> None:
    """Raises UserError for class/train/1.jpg, or splits one level down."""
    inside: dict[str, set[str]] = {}
    for file in self.training_files.files:
      parts = file.split("/")
      if len(parts) > 2:
        inside.setdefault(parts[0], set()).add(parts[1])
    for folder, names in inside.items():
      kinds = {_plain(name) for name in names}
      if kinds & set(_TRAIN) and kinds & set(_EVALUATION):
        shown = ", ".join(sorted(printable(n) for n in names)[:5])
        raise UserError(
          f"{printable(os.path.join(self._root, folder))!r} has folders that"
          f" look like splits ({shown}); expected them at the first level of"
          " data.path: set data.path to their folder, or move them; or set"
          " data.train_split='' to train on all."
        )

  # --- Parts of train ---------------------------------------------------------

  def _training_part(self) -> Part:
    if self._holdout:
      return self._held_out(for_training=True)
    return self._whole_training_part()

  def _whole_training_part(self) -> Part:
    found = self.training_files
    if self._train is None:
      return Part(self._root, found, is_train=True)
    beside = self._folders_beside()
    remark = (
      f"training uses only {printable(os.path.basename(self._train))!r} and"
      f" ignores the folders of images beside it: {', '.join(beside)}"
    )
    remarks = (remark,) if beside else ()
    return Part(self._train, found, is_train=True, remarks=remarks)

  def _folders_beside(self) -> list[str]:
    """Returns the folders that have images and are in no split."""
    used = {self._train, *self._evaluation}
    paths = {
      folder: os.path.join(self._root, folder) for folder in self._folders
    }
    return [
      printable(folder)
      for folder, path in paths.items()
      if path not in used and walk(path, first_only=True).files
    ]

  def _held_out(self, *, for_training: bool) -> Part:
    """Returns the part of train that is held out, or the rest of it."""
    share = self._holdout
    if self._evaluation:
      name = printable(os.path.basename(self._evaluation[0]))
      raise UserError(
        f"data.holdout is {share:g}, but {printable(self._root)!r} has an"
        f" evaluation part, {name!r}; set data.holdout=0 to use that."
      )
    whole = self._whole_training_part()
    seed = source_lib.setting(self._settings, "holdout_seed")
    away = _held_out(whole.found.files, share, seed)
    everything = np.arange(len(whole.found.files))
    chosen = np.setdiff1d(everything, away) if for_training else away
    if not away.size or not chosen.size:
      raise UserError(
        f"data.holdout is {share:g}, but no class of"
        f" {printable(whole.top)!r} has two images; expected more."
      )
    what = "without" if for_training else "only"
    remark = (
      f"data.holdout={share:g}: {len(away)} of {len(everything)} images are"
      " for evaluation alone, the same share of each folder"
    )
    return whole._replace(
      chosen=chosen,
      slice_text=f" ({what} the held-out {share:g}, seed {seed})",
      remarks=(*whole.remarks, remark),
    )


def list_directory_of(root: str) -> list[str]:
  """Returns the subfolders of data.path."""
  try:
    return list_directory(root).folders
  except (OSError, tf.errors.OpError) as error:
    reason = getattr(error, "strerror", None) or str(error)
    raise UserError(
      f"Cannot read the directory {printable(root)!r}: {reason}."
    ) from error


def split_names(settings: ConfigDict) -> list[str]:
  """Returns the subfolders, and the usual names of the splits that are there.

  Any of the usual names stands for any other, see `Layout`.
  """
  folders = list_directory_of(root_of(settings.path))
  has_evaluation = any(_plain(folder) in _EVALUATION for folder in folders)
  return [*folders, *_TRAIN, *(_EVALUATION if has_evaluation else ())]


def root_of(path: str) -> str:
  """Returns data.path with ~ expanded; raises UserError if it is not there."""
  if not path:
    raise UserError(
      "data.path is empty; source 'folder' expects the directory of images,"
      " for example --config.data.path=~/images."
    )
  path = path if "://" in path else os.path.expanduser(path)
  if not tf.io.gfile.isdir(os.fsencode(path)):
    found = "a file" if tf.io.gfile.exists(os.fsencode(path)) else "nothing"
    raise UserError(
      f"data.path is {printable(path)!r}: found {found}, expected a directory"
      " of images."
    )
  return path


def _check_inside(name: str) -> None:
  if os.path.isabs(name) or ".." in name.split("/"):
    raise UserError(
      f"data.path has no split {name!r}: a split of a folder is one of its"
      " subfolders, such as 'train'."
    )


def _nfc(name: str) -> str:
  return unicodedata.normalize("NFC", name)


def _lower(name: str) -> str:
  return _nfc(name).casefold()


def _plain(name: str) -> str:
  """Returns "train" for "Train", "train_set", "Train Images"."""
  plain = re.sub(r"[-_. ]", "", _lower(name))
  short = _SUFFIX.sub("", plain)
  return short if short in _KNOWN else plain


# --- Shares of every class ----------------------------------------------------


def _ranks(files: list[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns each file's rank in its folder of the first level, and the counts.

  The order is that of a hash of (seed, name).
  """
  hashes = [
    hashlib.sha256(os.fsencode(f"{seed}/{_nfc(file)}")).digest()
    for file in files
  ]
  ranks: np.ndarray = np.zeros(len(files), np.int64)
  counts: dict[str, int] = {}
  groups = [_nfc(file.rpartition("/")[0].partition("/")[0]) for file in files]
  for i in sorted(range(len(files)), key=hashes.__getitem__):
    ranks[i] = counts.get(groups[i], 0)
    counts[groups[i]] = int(ranks[i]) + 1
  return ranks, np.array([counts[group] for group in groups], np.int64)


def _held_out(files: list[str], share: float, seed: int) -> np.ndarray:
  """Returns which files are held out: of two or more in a class at least one.

  A class keeps at least one, too.
  """
  ranks, counts = _ranks(files, seed)
  given = np.maximum(1, np.round(share * counts).astype(np.int64))
  return np.flatnonzero(ranks >= counts - np.minimum(given, counts - 1))


def _sliced(
  part: Part, first: str | None, last: str | None, split: str
) -> Part:
  """Returns the files from one end to another, in a mixed order.

  Any slice has its share of every class, to one image.
  """
  indices = part.chosen
  if indices is None:
    indices = np.arange(len(part.found.files))
  ranks, counts = _ranks([part.found.files[i] for i in indices], seed=0)
  mixed = indices[np.argsort((ranks + 0.5) / counts, kind="stable")]
  end: Callable[[str | None], int] = lambda text: _end(text, len(indices))
  chosen = np.sort(mixed[end(first) : end(last)])
  if not chosen.size:
    raise UserError(
      f"The split {split!r} has no image: it takes images {end(first)} to"
      f" {end(last)} of {len(indices)}."
    )
  return part._replace(
    chosen=chosen, slice_text=f"{part.slice_text} [{first}:{last}]"
  )


def _end(text: str | None, count: int) -> int:
  """Returns an end of a slice, such as "80%", as a number of images."""
  text = text or "0"
  is_share = text.endswith("%")
  number = int(text.rstrip("%"))
  if text.startswith("-"):  # Before it is rounded: [:50%] ends at [-50%:].
    number += 100 if is_share else count
  if is_share:
    number = round(number * count / 100)
  return min(max(number, 0), count)
