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

from imsvd_jax.commands import command_line, shared_flags


def _check() -> Callable[[], None]:
  """Reports on the data of a recipe, and shows its views.

  imsvd data check --config=folder_r18 --config.data.path=~/images

  The page (index.html in --output) shows ten images with all their views in
  training, and repeats the report.
  """
  config = shared_flags.define_config()
  output = flags.DEFINE_string(
    "output", "data-check", "Folder for the page; empty: no page."
  )

  def check() -> None:
    from imsvd_jax.explain import data_page

    print("\n".join(data_page.check_data(config.value, output.value)))

  return check


def _stats() -> Callable[[], None]:
  """Reports the mean and std of each channel of a recipe's images.

  imsvd data stats --config=folder_r18 --config.data.path=~/images

  Prints the flags that set data.mean and data.std to them. Each image counts
  alike, whatever its size.
  """
  config = shared_flags.define_config()

  def stats() -> None:
    from imsvd_jax.explain import data_page

    print("\n".join(data_page.data_stats(config.value)))

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
