"""Finds images of a folder or data set by meaning: build an index, then ask it.

Features say which images are alike; codes say why, choose slices, and say
which images are rare. Answers are CSV, and with --page a page of thumbnails.
"""

import inspect
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from imsvd_jax.base.errors import counted
from imsvd_jax.commands import command_line, option_flags, shared_flags
from imsvd_jax.explain import duplicates as duplicates_lib

if TYPE_CHECKING:  # They import JAX.
  from imsvd_jax.search.questions import Answer
  from imsvd_jax.search.store import Store

_INDEX = {"index": "photos.index"}
_BUILD = {"workdir": "runs/mine", **_INDEX}


def _define_index() -> flags.FlagHolder[str]:
  return flags.DEFINE_string("index", None, "Folder of the index.")


def _build() -> Callable[[], None]:
  """Makes an index of images, or adds images to one.

  imsvd search build --workdir=runs/mine --data=photos --index=photos.index

  Images that the index has are skipped, and those that changed are replaced:
  the same command continues a build that was stopped, and adds new images.
  """
  # Late imports keep --help fast.
  from imsvd_jax.search.build_options import BuildOptions

  options = option_flags.define_flags(BuildOptions)
  index = _define_index()

  def build() -> None:
    if not options().data and not options().split:
      command_line.fail(
        "--data is missing. Give it, for example --data=photos; or"
        " --split=train for the run's own data."
      )
    from imsvd_jax.search import build as build_lib

    print("\n".join(build_lib.build(index.value, options())))

  return build


def _query() -> Callable[[str], None]:
  """Finds the images that are most like one.

  imsvd search query photos/a.jpg --index=photos.index --workdir=runs/mine

  The image is a name in the index, the number of its row, or a file; a file
  whose content is not in the index needs --workdir. `agree` counts the
  variables of equal bins, and `rarest` names the five of these bins that the
  fewest images have.
  """
  count = flags.DEFINE_integer("k", 10, "How many images.", lower_bound=1)
  workdir = flags.DEFINE_string(
    "workdir", "", "The run that the index was built with, for another file."
  )
  step = shared_flags.define_step()
  target = shared_flags.define_target()
  answering = _define_answer()

  def query(image: str = "") -> None:
    if not image:
      command_line.fail(
        "Name an image: imsvd search query IMAGE --index=photos.index"
      )
    from imsvd_jax.search import questions

    answering(
      lambda store: questions.query(
        store, image, count.value, workdir.value, step(), target.value
      )
    )

  return query


def _duplicates() -> Callable[[], None]:
  """Lists images that repeat others: exactly, by content, and nearly.

  imsvd search duplicates --index=photos.index --page=duplicates.html
  """
  threshold = flags.DEFINE_float(
    "threshold",
    duplicates_lib.THRESHOLD,
    "Least cosine of the features of near duplicates; 2: exact ones only.",
    -1.0,
  )
  answering = _define_answer()

  def duplicates() -> None:
    from imsvd_jax.search import questions

    answering(lambda store: questions.duplicates(store, threshold.value))

  return duplicates


def _outliers() -> Callable[[], None]:
  """Lists the images of the rarest codes, with -log p in nats.

  imsvd search outliers --index=photos.index --k=100
  """
  count = flags.DEFINE_integer("k", 100, "How many images.", lower_bound=1)
  by = flags.DEFINE_enum(
    "by",
    "pairs",
    ["pairs", "marginals"],
    "What p is: of pairs of variables or of each one alone.",
  )
  answering = _define_answer()

  def outliers() -> None:
    from imsvd_jax.search import questions

    answering(lambda store: questions.outliers(store, count.value, by.value))

  return outliers


def _slice() -> Callable[[str], None]:
  """Lists the images whose codes a condition is true of.

  imsvd search slice "v7=3 and not (v2=5 or v2=6)" --index=photos.index
  """
  answering = _define_answer()

  def choose(condition: str = "") -> None:
    if not condition:
      command_line.fail(
        'Give a condition: imsvd search slice "v7=3" --index=photos.index'
      )
    from imsvd_jax.search import questions

    answering(lambda store: questions.chosen(store, condition))

  return choose


def _define_answer() -> "Callable[[Callable[[Store], Answer]], None]":
  """Defines the flags of all questions; returns what asks and writes."""
  index = _define_index()
  output = flags.DEFINE_string(
    "output", "", "CSV file to write; standard output by default."
  )
  page = flags.DEFINE_string("page", "", "HTML file of thumbnails to write.")

  def answering(ask: "Callable[[Store], Answer]") -> None:
    from imsvd_jax.base import files
    from imsvd_jax.search import answer_files
    from imsvd_jax.search.store import Store

    paths = [files.check_output(p) for p in (output.value, page.value) if p]
    store = Store(os.path.expanduser(index.value))
    answer = ask(store)
    text = answer_files.as_csv(store, answer)
    if page.value:
      answer_files.write_page(paths[-1], store, answer)
    if output.value:
      files.write_whole(paths[0], text.encode())
      print(f"{paths[0]}: {counted(len(answer.rows), 'image')}.")
    else:
      print(text, end="")

  return answering


class _Way(NamedTuple):
  """One line about a command of search, and what defines its flags."""

  about: str
  define: Callable[[], Callable[..., None]]
  max_arguments: int = 0
  required: Mapping[str, str] = _INDEX


WAYS = {
  "build": _Way("make an index of images, or add to it", _build, 0, _BUILD),
  "query": _Way("images like one", _query, 1),
  "duplicates": _Way("images that repeat others", _duplicates),
  "outliers": _Way("images of rare codes", _outliers),
  "slice": _Way("images of chosen codes", _slice, 1),
}


def run() -> None:
  """Runs what the first word names."""
  name = command_line.pick(
    "imsvd search",
    {name: way.about for name, way in WAYS.items()},
    about=__doc__,
  )
  way = WAYS[name]
  command_line.run(
    way.define(),
    required=way.required,
    about=inspect.getdoc(way.define),
    max_arguments=way.max_arguments,
  )
