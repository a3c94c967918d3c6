"""Everything at once: analysis, figures and explorer in one folder."""

import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import (
  analysis,
  embedding_map,
  explorer,
  figures,
  health,
  illustrations,
  probes,
)
from imsvd_jax.explain.subject import Subject, no_code_sentence

Batches = Callable[[], Iterable[Mapping[str, np.ndarray]]]
ANALYSIS = "analysis.npz"
_FIGURE = re.compile(
  r"(joint|cross_joint|mutual_information|factors|samples_variable_\d+"
  r"|attribution|embedding_vectors|embedding_map|training_curves)"
  rf"\.({'|'.join(figures.FORMATS)})"
)
_EXAMPLES = 6  # Images shown with two views, and with attribution.


class Report(NamedTuple):
  """What was written.

  Attributes:
    analysis: The numbers.
    index: The explorer's index.html.
    figures: Paths of the figures.
  """

  analysis: analysis.Analysis
  index: pathlib.Path
  figures: list[pathlib.Path]


def explain(
  subject: Subject,
  batches: Batches,
  directory: str | pathlib.Path,
  *,
  num_images: int | None = None,
  views: tuple[Callable, Callable] | None = None,
  key: jax.Array | None = None,
  untrained: Subject | None = None,
  factors: Mapping[str, Any] | None = None,
  label_names: Sequence[str] | None = None,
  names: Callable[[int], str] | None = None,
  augmentations: Mapping[str, probes.Probe] | None = None,
  max_flip_images: int = 2048,
  some_batches: Callable[[int], Iterable] | None = None,
  num_top: int = 12,
  joint: bool = True,
  max_images: int = 50_000,
  thumbnail_size: int = 64,
  grad_cam_per_bin: int = 12,
  integrated_per_bin: int = 2,
  figure_format: str = "pdf",
  figure_variables: Sequence[int] | None = None,
  metrics: str | pathlib.Path | None = None,
  title: str | None = None,
  mesh: Mesh | None = None,
  progress: Callable[[str], None] | None = print,
) -> Report:
  """Analyses a data set and writes numbers, figures and explorer.

  What an earlier report left in `directory` is removed first. Writes
  `analysis.npz` (every array, the joint matrices in float32 among
  them), `figures/*` and `explorer/index.html` under `directory`.

  Args:
    subject: The functions of images.
    batches: Called two to five times; each call gives the data set from the
      start, as for `analysis.analyse`.
    directory: Where to write.
    num_images: For the time left.
    views: Two augmentations, for cross-joint and agreement; see `analyse`.
    key: Random key of views and augmentations.
    untrained: The same encoder with random weights: where factors are known,
      what its variables tell of them is measured too.
    factors: Known factors by name; see `analyse`.
    label_names: Names of the classes.
    names: Image index -> what to call the image, such as its path.
    augmentations: For the flip rates; by default `probes.PROBES`, none: {}.
    max_flip_images: Images of the flip rates.
    some_batches: From a number n to batches of n images from everywhere in the
      data set, for the flip rates; by default one more pass over `batches`,
      of which images are chosen by the hash of their index.
    num_top: Best images of each bin.
    joint: Whether to accumulate the joint matrices.
    max_images: Images shown in the explorer.
    thumbnail_size: Side in pixels.
    grad_cam_per_bin: See `illustrations.illustrate`.
    integrated_per_bin: Same.
    figure_format: "pdf", "svg" or "png".
    figure_variables: Variables of the figures; by default the 8 that know
      most of a factor, or of highest entropy.
    metrics: A metrics.jsonl, for training curves.
    title: Of the explorer.
    mesh: Devices.
    progress: Called with lines of text; None: silent.

  Returns:
    The report.
  """
  if figure_format not in figures.FORMATS:
    raise UserError(
      f"Unknown figure format {figure_format!r}. Known: "
      + ", ".join(figures.FORMATS)
      + "."
    )
  directory = pathlib.Path(directory)
  _remove_former(directory)
  (directory / "explorer").mkdir(parents=True, exist_ok=True)
  say = progress or (lambda line: None)
  known = dict(
    num_images=num_images,
    factors=factors,
    label_names=label_names,
    mesh=mesh,
    progress=progress,
  )
  result = analysis.analyse(
    subject,
    batches(),
    num_top=num_top,
    joint=joint,
    views=views,
    key=key,
    **known,
  )
  check_variables(result.num_variables, figure_variables)
  if untrained is not None and result.nmi is not None:
    result.nmi_untrained = _nmi(untrained, batches(), known)
  augmentations = probes.PROBES if augmentations is None else augmentations
  if result.has_codes and augmentations:
    count = min(max_flip_images, result.num_images)
    if some_batches is None:
      some = only(batches(), analysis.some_of(result.indices, count))
    else:
      some = some_batches(count)
    result.flip_rates = probes.flip_rates(
      subject,
      some,
      probes=augmentations,
      key=key,
      num_images=count,
      mesh=mesh,
      progress=progress,
    )
  if not result.has_codes:
    say(no_code_sentence(subject))
  result.save(directory / ANALYSIS)
  chosen = _figure_variables(result, figure_variables)
  keep = _wanted_images(result, chosen)
  pictures = illustrations.illustrate(
    subject,
    batches(),
    result,
    directory / "explorer" / "sprites",
    max_images=max_images,
    thumbnail_size=thumbnail_size,
    grad_cam_per_bin=grad_cam_per_bin,
    integrated_per_bin=integrated_per_bin,
    keep=keep,
    mesh=mesh,
    progress=progress,
  )
  examples = _view_examples(subject, result, pictures, views, key)
  index_page = explorer.build(
    directory / "explorer",
    subject,
    result,
    pictures,
    title=title,
    names=names,
    views=examples,
    progress=progress,
  )
  drawn = _draw(result, pictures, examples, chosen, metrics)
  paths = _save_figures(drawn, directory / "figures", figure_format)
  for line in factor_lines(result):
    say(line)
  say(f"Open {index_page}")
  return Report(result, index_page, paths)


def _remove_former(directory: pathlib.Path) -> None:
  """Removes what an earlier report wrote there, which may be of other images.

  Only by the names of our own files, and only where there was a report.
  """
  if not (directory / ANALYSIS).exists():
    return
  for name in ("data", "sprites"):
    shutil.rmtree(directory / "explorer" / name, ignore_errors=True)
  for path in (directory / "figures").glob("*"):
    if _FIGURE.fullmatch(path.name):
      path.unlink()
  (directory / ANALYSIS).unlink()  # Last: it says that there was one.


def _nmi(untrained, batches, known):
  """What variables of random weights tell of the factors, and nothing else."""
  return analysis.analyse(
    untrained,
    batches,
    num_top=1,
    joint=False,
    covariance=False,
    sample_size=1,
    what="random weights",
    **known,
  ).nmi


def only(
  batches: Iterable[Mapping[str, np.ndarray]], chosen: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the images of chosen indices, in batches of the first one's size."""
  size, images, indices = 0, [], []
  for batch in batches:
    size = size or len(batch["image"])
    keep = np.isin(batch["index"], chosen)
    if "mask" in batch:
      keep &= batch["mask"]
    images.extend(batch["image"][keep])
    indices.extend(batch["index"][keep])
    while len(images) >= size:
      yield _batch(images[:size], indices[:size])
      images, indices = images[size:], indices[size:]
  if images:
    yield _batch(images, indices)


def _batch(images, indices):
  return {"image": np.stack(images), "index": np.array(indices)}


def _examples(result) -> np.ndarray:
  """Indices of the images that are shown with two views."""
  return analysis.some_of(result.sample_indices, _EXAMPLES)


def _view_examples(subject, result, pictures, views, key):
  """A few images with two views each, or None without views or codes."""
  if views is None or not result.has_codes:
    return None
  index = _examples(result)
  images = np.stack([pictures.kept[int(i)] for i in index])
  return illustrations.view_examples(subject, images, index, views, key)


def _save_figures(drawn, directory, figure_format) -> list[pathlib.Path]:
  paths = []
  for name, figure in drawn.items():
    paths.append(directory / f"{name}.{figure_format}")
    figures.save(figure, paths[-1])
  return paths


def _figure_variables(result, chosen) -> list[int]:
  if not result.has_codes:
    return []
  if chosen is not None:
    return list(chosen)
  score = result.entropies() if result.nmi is None else result.nmi.max(1)
  order = np.argsort(-score, kind="stable")[:8]
  return sorted(int(m) for m in order)


def check_variables(count: int, chosen: Sequence[int] | None) -> None:
  """Raises UserError if one of the chosen variables is not in 0..count - 1."""
  wrong = [m for m in chosen or () if not 0 <= m < count]
  if wrong:
    known = f"numbered 0..{count - 1}" if count else "none, without a code"
    raise UserError(
      f"There is no variable {wrong[0]}; the variables are {known}."
    )


def _busiest(result, m, count=10) -> list[int]:
  """The bins of a variable that its sample grid shows."""
  order = np.argsort(-result.usage[m], kind="stable")
  return sorted(int(d) for d in order[:count])


def _wanted_images(result, chosen) -> list[int]:
  """Images that the figures need whole."""
  wanted = {int(i) for i in _examples(result)}
  for m in chosen:
    best = result.top_indices[m, _busiest(result, m), :8]
    wanted |= {int(i) for i in best.ravel() if i >= 0}
  return sorted(wanted)


def _draw(result, pictures, examples, chosen, metrics):
  """Every figure that the run allows, by file name."""
  drawn = {}
  if chosen:
    drawn |= _code_figures(result, pictures, chosen)
  if examples is not None:
    drawn["embedding_vectors"] = figures.embedding_vectors(
      examples.images, examples.probabilities
    )
  if result.feature_covariance is not None and len(result.feature_mean) > 1:
    components = embedding_map.principal_components(
      result.feature_mean, result.feature_covariance
    )
    values, value_names = None, ()
    if result.factors:
      rows = np.searchsorted(result.indices, result.sample_indices)
      values = result.factors[0].values[rows]
      value_names = result.factors[0].names
    drawn["embedding_map"] = figures.embedding_map(
      components.project(result.sample_features),
      values,
      value_names,
      explained=components.explained,
    )
  if metrics is not None:
    drawn["training_curves"] = figures.training_curves(metrics)
  return drawn


def _code_figures(result, pictures, chosen):
  drawn = {}
  bins = result.num_bins
  if result.joint is not None:
    drawn["joint"] = figures.joint_matrix(result.joint, bins, chosen)
    if result.num_variables > 1:
      drawn["mutual_information"] = figures.information_matrix(result)
  if result.cross_joint is not None:
    drawn["cross_joint"] = figures.joint_matrix(
      result.cross_joint, bins, chosen, title="Cross-joint probability"
    )
  if result.nmi is not None:
    names = [f.name for f in result.factors]
    tables = {"trained": result.nmi}
    if result.nmi_untrained is not None:
      tables = {"random weights": result.nmi_untrained, **tables}
    drawn["factors"] = figures.factor_table(tables, names)
  for m in chosen:
    busiest = _busiest(result, m)
    rows = [
      [pictures.kept[int(i)] for i in result.top_indices[m, d, :8] if i >= 0]
      for d in busiest
    ]
    titles = [f"bin {d}" for d in busiest]
    drawn[f"samples_variable_{m}"] = figures.sample_grid(rows, titles)
  if pictures.grad_cam is not None or pictures.integrated is not None:
    drawn["attribution"] = _attribution_figure(result, pictures, chosen)
  return drawn


def _attribution_figure(result, pictures, chosen):
  """The best image of a busy bin of each chosen variable.

  Of the k-th variable it is the k-th busiest bin: the busiest of all of them
  often means the same, and shows the same image.
  """
  variables = np.array(chosen[:_EXAMPLES])
  ranks = np.arange(len(variables)) % result.num_bins
  order = np.argsort(-result.usage[variables], axis=1, kind="stable")
  bins = order[np.arange(len(variables)), ranks]
  best = result.top_indices[variables, bins, 0]
  maps = {
    "Grad-CAM": pictures.grad_cam,
    "integrated gradients": pictures.integrated,
  }
  return figures.attribution_rows(
    np.stack([pictures.kept[int(i)] for i in best]),
    {
      name: found[variables, bins, 0].astype(np.float32)
      for name, found in maps.items()
      if found is not None
    },
    [f"v{m}, bin {d}" for m, d in zip(variables, bins, strict=True)],
  )


def factor_lines(result: analysis.Analysis) -> list[str]:
  """The table of factors as text: who knows most, and what is to be expected.

  Returns:
    Lines with a heading, or none without factors or codes.
  """
  rows = health.best_factors(result)
  if not rows:
    return []
  width = max(len(row["factor"]) for row in rows)
  lines = [
    "Normalized mutual information of single variables with what is known of "
    "the images"
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
