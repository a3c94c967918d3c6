"""A labelled data set to measure on, and what results.json says about it."""

import functools
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import ALPHA_DROPPED, Source


class DataSet:
  """A train and a test split, made when they are first asked for.

  `settings` are as `config.data`; `train` and `test` may be made already.
  """

  def __init__(
    self,
    settings: ConfigDict,
    train: Source | None = None,
    test: Source | None = None,
  ) -> None:
    self.settings = settings
    self._given = {"train": train, "eval": test}

  @functools.cached_property
  def train(self) -> Source:
    """The train split."""
    return self._source("train")

  @functools.cached_property
  def test(self) -> Source:
    """The test split."""
    return self._source("eval")

  def make(self) -> None:
    """Makes both splits now; raises UserError if there is none such."""
    _ = self.train, self.test

  @property
  def given_test(self) -> Source | None:
    """The test split, if it is made already."""
    return self._given["eval"]

  def _source(self, split: str) -> Source:
    if not self.settings.name:
      raise UserError(
        "These weights do not say which data they belong to; give --data, such"
        " as --data=tfds:imagenet2012 or --data=folder:~/images."
      )
    source = self._given[split] or data.make_source(self.settings, split)
    if source is None:
      raise UserError(
        f"{self.settings.name} has no test split: {self._why_no_test()}."
        " Name both, such as --splits='train[:80%],train[80%:]'"
        f"{self._holdout_hint()}."
      )
    return source

  def _why_no_test(self) -> str:
    name = self.settings.eval_split
    if not name:
      return "data.eval_split is empty"
    return f"data.eval_split is {name!r}, and {self.settings.path} has none"

  def _holdout_hint(self) -> str:
    is_folder = self.settings.name == "folder"
    return ", or hold a part out: --holdout=0.2" if is_folder else ""

  def described(self, *, with_test: bool) -> dict[str, Any]:
    """Returns what `results.json` says about the data."""
    settings = self.settings
    found = {
      "name": settings.name,
      "train": settings.train_split,
      "preprocessing": preparation(settings),
    }
    optional = {
      "test": settings.eval_split if with_test else "",
      "path": settings.path,
      "num_examples": settings.num_examples,
      "holdout": settings.get("holdout"),
      "holdout_seed": settings.get("holdout") and settings.get("holdout_seed"),
    }
    return found | {name: value for name, value in optional.items() if value}


def preparation(settings: ConfigDict) -> dict[str, Any]:
  """Returns how images are prepared, of the data settings."""
  names = ("resize", "crop", "interpolation", "channels", "mean", "std")
  found = {name: settings[name] for name in names}
  optional = {name: settings.get(name) for name in ("exif", "value_range")}
  if settings.get("background", ALPHA_DROPPED) != ALPHA_DROPPED:
    found["background"] = settings.background
  return found | {name: value for name, value in optional.items() if value}
