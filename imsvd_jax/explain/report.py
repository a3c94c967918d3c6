"""Everything at once: analysis, figures and explorer in one folder."""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from imsvd_jax.base import console, devices, files
from imsvd_jax.base.errors import UserError, lookup
from imsvd_jax.explain import figure_set, figures, health, patch_codes
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.explain_options import FORMATS, ExplainOptions
from imsvd_jax.explain.explorer import writer
from imsvd_jax.explain.illustrations import illustrate
from imsvd_jax.explain.images import Images
from imsvd_jax.explain.measurement import analyze
from imsvd_jax.explain.scan import encoding_shapes
from imsvd_jax.explain.subject import Subject, no_code_sentence

ANALYSIS = "analysis.npz"
CAPTIONS = "captions.csv"
INTERVENTIONS = "interventions.csv"
EDITS = "edits.csv"
EXPLORER = "explorer"  # The folder of pages.
_FIGURE = re.compile(
  r"(joint|cross_joint|mutual_information|factors|samples_variable_\d+"
  r"|attribution|embedding_vectors|embedding_map|training_curves)"
  rf"\.({'|'.join(FORMATS)})"
)


@dataclasses.dataclass(frozen=True)
class Report:
  """What was written."""

  analysis: Analysis  # The numbers.
  index: pathlib.Path  # The explorer's index.html.
  figures: list[pathlib.Path]  # Paths of the figures.


def explain(
  subject: Subject,
  images: Images,
  directory: str | pathlib.Path,
  options: ExplainOptions | None = None,
  *,
  untrained: Subject | None = None,
  key: jax.Array | None = None,
  records: Sequence[Mapping[str, Any]] = (),
  training: Sequence[health.Indicator] = (),
  title: str | None = None,
  mesh: Mesh | None = None,
  report: Callable[[str], None] = console.print_line,
) -> Report:
  """Analyzes a data set and writes numbers, figures and explorer.

  Removes first what an earlier report left in `directory`. Writes
  `analysis.npz` (every array, among them the joint matrices in float32),
  `captions.csv` (names of bins), `edits.csv` and `interventions.csv` (what
  flips), `figures/*` and `explorer/index.html` under `directory`.

  Args:
    untrained: The same encoder with random weights; see `analyze`.
    key: Random key of the single edits.
    records: Of the training: "step" and numbers, for training curves.
    training: How the training went, for the explorer's overview.
    title: Of the explorer; by default the subject's name.
    mesh: Devices, along axis "data"; by default all local ones.

  Raises:
    UserError: An option does not fit, or see `analyze`.
  """
  options = options or ExplainOptions()
  common: dict[str, Any] = {
    "mesh": mesh or devices.make_mesh(jax.local_devices()),
    "report": report,
  }
  _check(subject, images, options)
  directory = pathlib.Path(directory)
  _remove_former(directory)
  directory.mkdir(parents=True, exist_ok=True)
  analysis = analyze(
    subject, images, options, untrained=untrained, key=key, **common
  )
  analysis.save(directory / ANALYSIS)
  chosen = figure_set.figure_variables(analysis, options.variables)
  pictures = illustrate(
    subject,
    images.batches(),
    analysis,
    directory / EXPLORER / "sprites",
    options,
    keep=figure_set.wanted_images(analysis, chosen),
    **common,
  )
  index = writer.build(
    directory / EXPLORER,
    subject,
    analysis,
    pictures,
    title=title,
    training=training,
    names=images.names,
    links=images.links,
    report=report,
  )
  paths = []
  drawn = figure_set.draw_all(analysis, pictures, chosen, records)
  for name, figure in drawn.items():
    paths.append(directory / "figures" / f"{name}.{options.figure_format}")
    figures.save(figure, paths[-1])
  _tell(analysis, directory, report)
  if analysis.code is None:
    report(no_code_sentence(subject))
  report(f"Open {index}")
  return Report(analysis, index, paths)


def _tell(
  analysis: Analysis,
  directory: pathlib.Path,
  report: Callable[[str], None],
) -> None:
  """Reports the findings in words, and writes those that are tables."""
  lines = factor_lines(analysis)
  if analysis.patches is not None:
    lines += patch_codes.lines(analysis.patches)
  for line in lines:
    report(line)
  if analysis.captions is not None:
    table = analysis.captions.table()
    files.write_whole(directory / CAPTIONS, table.encode())
    report(analysis.captions.line())
  for name, title, found in (
    (INTERVENTIONS, "one factor changes", analysis.interventions),
    (EDITS, "the image is edited in one way", analysis.edits),
  ):
    if found is not None:
      files.write_whole(directory / name, found.table().encode())
      for line in found.lines(f"Flips when {title} and nothing else does"):
        report(line)


def _check(subject: Subject, images: Images, options: ExplainOptions) -> None:
  """Raises UserError where the options do not fit, before any work."""
  lookup(dict.fromkeys(FORMATS), options.figure_format, "figure format")
  if not options.variables:
    return
  first = next(iter(images.batches()))
  q = encoding_shapes(subject, first["image"]).probabilities
  count = 0 if q is None else q.shape[1]
  check_variables(options.variables, count)


def check_variables(variables: Sequence[int], count: int) -> None:
  """Raises UserError where a code of `count` variables lacks one."""
  wrong = [m for m in variables if not 0 <= m < count]
  if wrong:
    known = f"numbered 0..{count - 1}" if count else "none, without a code"
    raise UserError(
      f"There is no variable {wrong[0]}; the variables are {known}."
    )


def _remove_former(directory: pathlib.Path) -> None:
  """Removes what an earlier report wrote there, which may be of other images.

  Removes only files with names of ours, and only where there was a report.
  """
  if not (directory / ANALYSIS).exists():
    return
  for name in ("data", "sprites"):
    shutil.rmtree(directory / EXPLORER / name, ignore_errors=True)
  for path in (directory / "figures").glob("*"):
    if _FIGURE.fullmatch(path.name):
      path.unlink()
  for name in (CAPTIONS, INTERVENTIONS, EDITS):
    (directory / name).unlink(missing_ok=True)
  (directory / ANALYSIS).unlink()  # Last: it says that there was a report.


def factor_lines(analysis: Analysis) -> list[str]:
  """Returns the table of factors as text, empty without factors or codes."""
  rows = health.best_factors(analysis)
  if not rows:
    return []
  width = max(len(row["factor"]) for row in rows)
  lines = [
    "Normalized mutual information of single variables with what is known of"
    " the images"
  ]
  for row in rows:
    best = ", ".join(
      f"v{m} {value:.2f}"
      for m, value in zip(row["variables"], row["nmi"], strict=True)
    )
    beside = f"chance {row['chance']:.3f}"
    if row["untrained"] is not None:
      beside = f"random weights {row['untrained']:.2f}, {beside}"
    lines.append(f"  {row['factor']:<{width}}  {best}  ({beside})")
  return lines
