"""Looks at the data of a recipe before a run pays for them.

Each image is read once. `check` reports counts, sizes, kinds, bad files, exact
duplicates, leaks between train and evaluation, the balance of classes and the
speed, and writes a page with the views of the recipe; `stats` reports the mean
and std of each channel.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict

from imsvd_jax.commands import command_line, shared_flags


def _define_recipe() -> Callable[[], ConfigDict]:
  """Defines --config, and --data in place of its data; returns what reads."""
  config = shared_flags.define_config()
  data = flags.DEFINE_string(
    "data",
    "",
    "Other data than the recipe's: folder:DIR, arrays:FILE, tfds:NAME.",
  )

  def read() -> ConfigDict:
    if data.value:
      from imsvd_jax.data import named

      named.check(data.value)
      named.choose(config.value.data, data.value)
    return config.value

  return read


def _check() -> Callable[[], None]:
  """Reports on the data of a recipe, and shows its views.

  imsvd data check --config=folder_r18 --data=folder:~/images

  The page (index.html in --output) shows ten images with all their views in
  training, and repeats the report.
  """
  config = _define_recipe()
  output = flags.DEFINE_string(
    "output", "data-check", "Folder for the page; empty: no page."
  )

  def check() -> None:
    from imsvd_jax.explain import data_page

    print("\n".join(data_page.check_data(config(), output.value)))

  return check


def _stats() -> Callable[[], None]:
  """Reports the mean and std of each channel of a recipe's images.

  imsvd data stats --config=folder_r18 --data=folder:~/images

  Prints the flags that set data.mean and data.std to them. Each image counts
  alike, whatever its size.
  """
  config = _define_recipe()

  def stats() -> None:
    from imsvd_jax.explain import data_page

    print("\n".join(data_page.data_stats(config())))

  return stats


class _Look(NamedTuple):
  """One line about a way to look at data, and what defines its flags."""

  about: str
  define: Callable[[], Callable[[], None]]


LOOKS = {
  "check": _Look("bad files, duplicates, leaks, sizes, and views", _check),
  "stats": _Look("mean and std of each channel", _stats),
}


def run() -> None:
  """Runs what the first word names."""
  name = command_line.pick(
    "imsvd data",
    {name: look.about for name, look in LOOKS.items()},
    about=__doc__,
  )
  look = LOOKS[name]
  command_line.run(
    look.define(),
    required=shared_flags.REQUIRED_CONFIG,
    about=inspect.getdoc(look.define),
  )
