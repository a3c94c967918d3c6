"""Publication figures as PDF, SVG or PNG.

By Matplotlib's object-oriented API, without the global state of pyplot, so
that they are safe in a server or a thread. Every function returns a Figure;
`save` writes it.
"""

import functools
import math
import pathlib
import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from imsvd_jax.base import console, files, metric_groups
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import attribution
from imsvd_jax.explain.analysis import Pairs
from imsvd_jax.explain.explain_options import FORMATS

_MAX_LEGEND = 12  # Names that a legend has room for.
_STYLE = {
  "font.size": 8,
  "font.family": "sans-serif",
  "axes.titlesize": 9,
  "image.cmap": "viridis",
  "image.interpolation": "nearest",
  "axes.linewidth": 0.6,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "xtick.major.width": 0.6,
  "ytick.major.width": 0.6,
  "legend.frameon": False,
  "pdf.fonttype": 42,  # Text stays text in the PDF.
  "svg.fonttype": "none",
  "svg.hashsalt": "imsvd",  # The same figure gives the same file.
  # A label may hold a dollar sign; it is not mathematics.
  "text.parse_math": False,
}


_styled = matplotlib.rc_context(_STYLE)  # A decorator.


def _figure(width: float, height: float) -> Figure:
  """Returns a figure in inches, with the Agg canvas and tight layout."""
  figure = Figure(figsize=(width, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


@_styled
def save(figure: Figure, path: str | pathlib.Path, *, dpi: int = 200) -> None:
  """Writes a figure; the suffix chooses PDF, SVG or PNG."""
  path = pathlib.Path(path)
  suffix = path.suffix.lower().lstrip(".")
  if suffix not in FORMATS:
    known = ", ".join(f".{f}" for f in FORMATS)
    raise UserError(
      f"A figure cannot be written as {path.name!r}; the name must end in"
      f" {known}."
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  # No dates: the same figure gives the same file.
  metadata = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
  _choose_fonts(figure)
  with files.in_place_when_done(path) as unfinished, warnings.catch_warnings():
    warnings.filterwarnings("ignore", r"Glyph .* missing from")
    figure.savefig(
      unfinished, format=suffix, dpi=dpi, metadata=metadata.get(suffix)
    )


def _panels(figure: Figure, rows: int, columns: int) -> list[list[Axes]]:
  return figure.subplots(rows, columns, squeeze=False).tolist()


def _set_row_title(axes: Axes, title: str) -> None:
  axes.set_ylabel(title, rotation=0, ha="right", va="center", labelpad=6)


def _bare(axes: Axes) -> None:
  axes.set_xticks([])
  axes.set_yticks([])
  for spine in axes.spines.values():
    spine.set_visible(False)


def _rgb(image: np.ndarray) -> np.ndarray:
  return np.broadcast_to(image, (*image.shape[:2], 3))


def _choose_fonts(figure: Figure) -> None:
  """Lets names in any script be drawn, where an installed font has it."""
  for text in figure.findobj(Text):
    content = text.get_text()
    if not content.isascii():
      fonts = _fonts_for(frozenset(c for c in content if not c.isspace()))
      text.set_fontfamily(["sans-serif", *fonts])


@functools.cache  # Reading the fonts of a machine takes a while.
def _fonts_for(characters: frozenset[str]) -> tuple[str, ...]:
  """Returns the fonts to use after the usual one; says what none of them has.

  A name appears in many figures, and is complained of once.
  """
  left = {ord(c) for c in characters}
  left -= _characters_of(findfont(FontProperties(family=["sans-serif"])))
  chosen = []
  for font in fontManager.ttflist:
    if not left:
      break
    if font.style != "normal" or font.name.startswith("Last Resort"):
      continue  # The latter has a box for everything.
    covered = left & _characters_of(font.fname)
    if covered:
      chosen.append(font.name)
      left -= covered
  if left:
    lacking = "".join(map(chr, sorted(left)[:10]))
    console.print_line(
      f"No font of this machine has {lacking!r}: the plots show boxes in their"
      " place. Install one, such as the package fonts-noto-cjk, and remove"
      " Matplotlib's cache of fonts."
    )
  return tuple(chosen)


@functools.cache
def _characters_of(path: str) -> frozenset[int]:
  try:
    return frozenset(FT2Font(path).get_charmap())
  except (OSError, RuntimeError):
    return frozenset()


@_styled
def joint_matrix(
  matrix: np.ndarray,
  num_bins: int,
  variables: Sequence[int],
  *,
  title: str = "Joint probability",
) -> Figure:
  """Draws the blocks of chosen variables of a joint or cross-joint matrix.

  Probabilities are on a logarithmic scale; zeros are blank.
  """
  rows = np.concatenate(
    [np.arange(m * num_bins, (m + 1) * num_bins) for m in variables]
  )
  part = np.asarray(matrix[np.ix_(rows, rows)], np.float64)
  top = part.max()
  norm = LogNorm(max(top * 1e-4, 1e-12), max(top, 1e-11))
  figure = _figure(4.4, 3.9)
  axes = figure.add_subplot()
  shown = axes.imshow(
    np.ma.masked_less_equal(part, 0), norm=norm, rasterized=True
  )
  _mark_blocks(axes, num_bins, variables)
  axes.set_title(title)
  figure.colorbar(
    shown,
    ax=axes,
    label="probability",
    shrink=0.85,
    # Plain numbers: the default is mathematics, which is not parsed.
    format=FuncFormatter(lambda value, _: f"{value:g}"),
  )
  return figure


def _mark_blocks(axes: Axes, num_bins: int, variables: Sequence[int]) -> None:
  """Labels the blocks of a matrix and draws lines between them."""
  centers = np.arange(len(variables)) * num_bins + (num_bins - 1) / 2
  names = [f"{m}" for m in variables]
  axes.set_xticks(centers, names, rotation=90 if len(names) > 12 else 0)
  axes.set_yticks(centers, names)
  axes.tick_params(length=0)
  for edge in np.arange(1, len(variables)) * num_bins - 0.5:
    axes.axhline(edge, color="white", linewidth=0.7)
    axes.axvline(edge, color="white", linewidth=0.7)
  axes.set_xlabel("variable")
  axes.set_ylabel("variable")


@_styled
def information_matrix(pairs: Pairs) -> Figure:
  """Draws mutual information above its floor for all pairs of variables."""
  excess = np.maximum(pairs.excess(), 0)
  np.fill_diagonal(excess, np.nan)
  figure = _figure(4.4, 3.7)
  axes = figure.add_subplot()
  shown = axes.imshow(excess, rasterized=True)
  axes.set_xlabel("variable")
  axes.set_ylabel("variable")
  axes.set_title("Mutual information above the finite-sample floor")
  figure.colorbar(shown, ax=axes, label="nats", shrink=0.85)
  return figure


@_styled
def embedding_vectors(
  views: np.ndarray, probabilities: np.ndarray, *, max_images: int = 4
) -> Figure:
  """Draws two views of each image beside their soft codes.

  Columns are variables and rows are bins; a mark below each variable says
  whether all views fall in the same bin. `views` are uint8 [n, V, H, W, C], and
  `probabilities` [n, V, M, b].
  """
  count = min(len(views), max_images)
  num_views = views.shape[1]
  figure = _figure(7.0, 0.85 * count * num_views + 0.3)
  grid = figure.add_gridspec(
    count * num_views, 2, width_ratios=[1, 7], wspace=0.02
  )
  for row in range(count):
    codes = probabilities[row].argmax(-1)  # [V, M]
    same = np.flatnonzero((codes == codes[0]).all(0))
    for view in range(num_views):
      place = row * num_views + view
      axes = figure.add_subplot(grid[place, 0])
      axes.imshow(_rgb(views[row, view]))
      _bare(axes)
      axes = figure.add_subplot(grid[place, 1])
      is_last = view == num_views - 1
      _draw_code(axes, probabilities[row, view], same if is_last else same[:0])
      axes.set_ylabel(f"view {view + 1}")
  figure.supxlabel("variable (rows: bins); a dot: the views agree", fontsize=8)
  return figure


def _draw_code(
  axes: Axes, probabilities: np.ndarray, marked: np.ndarray
) -> None:
  """Draws [M, b] as columns of gray cells, with a dot below marked columns."""
  axes.imshow(
    probabilities.T,
    aspect="auto",
    cmap="Greys",
    vmin=0,
    vmax=1,
    rasterized=True,
  )
  axes.set_yticks([])
  axes.set_xticks(marked, ["•"] * len(marked))
  axes.tick_params(length=0, pad=1, labelsize=6)


@_styled
def sample_grid(
  images: Sequence[Sequence[np.ndarray]], titles: Sequence[str]
) -> Figure:
  """Draws rows of images uint8 [H, W, C], which may differ in length."""
  width = max(1, *(len(row) for row in images))
  figure = _figure(0.62 * width + 1.1, 0.64 * len(images) + 0.1)
  grid = _panels(figure, len(images), width)
  for row, (pictures, title) in enumerate(zip(images, titles, strict=True)):
    for column, axes in enumerate(grid[row]):
      _bare(axes)
      if column < len(pictures):
        axes.imshow(_rgb(pictures[column]))
    _set_row_title(grid[row][0], title)
  return figure


@_styled
def attribution_rows(
  images: np.ndarray, maps: Mapping[str, np.ndarray], titles: Sequence[str]
) -> Figure:
  """Draws images uint8 [n, H, W, C] beside their attribution, one row each.

  `maps` are [n, h, w] by method; each becomes a column of overlays.
  """
  colormap = matplotlib.colormaps["inferno"](np.arange(256), bytes=True)
  columns = {"image": [_rgb(image) for image in images]}
  for name, values in maps.items():
    columns[name] = attribution.overlay(
      images, np.asarray(values), colormap=colormap[:, :3]
    )
  figure = _figure(1.15 * len(columns) + 1.2, 1.15 * len(images) + 0.25)
  grid = _panels(figure, len(images), len(columns))
  for column, (name, pictures) in enumerate(columns.items()):
    grid[0][column].set_title(name)
    for row, picture in enumerate(pictures):
      _bare(grid[row][column])
      grid[row][column].imshow(picture)
  for row, title in enumerate(titles):
    _set_row_title(grid[row][0], title)
  return figure


@_styled
def factor_table(
  tables: Mapping[str, np.ndarray], factors: Sequence[str]
) -> Figure:
  """Draws NMI of variables and factors, before and after training.

  `tables` are [M, number of factors] by name. Variables are sorted by their
  best factor, then by NMI.
  """
  width = 1.6 + 0.24 * len(factors) * len(tables)
  figure = _figure(max(width, 4.4), 3.6)  # The title needs 4.4.
  all_axes = _panels(figure, 1, len(tables))[0]
  top = max(float(np.max(t)) for t in tables.values())
  for axes, (name, table) in zip(all_axes, tables.items(), strict=True):
    order = np.lexsort((-table.max(1), table.argmax(1)))
    shown = axes.imshow(
      table[order], aspect="auto", norm=Normalize(0, max(top, 1e-9))
    )
    axes.set_xticks(range(len(factors)), factors, rotation=60, ha="right")
    axes.set_yticks([])
    axes.set_title(name)
  all_axes[0].set_ylabel("variables, by their best factor")
  figure.colorbar(shown, ax=all_axes, label="NMI", shrink=0.85)
  figure.suptitle(
    "Normalized mutual information with known factors", fontsize=9
  )
  return figure


@_styled
def embedding_map(
  points: np.ndarray,
  values: np.ndarray | None = None,
  names: Sequence[str] = (),
  *,
  explained: Sequence[float] = (),
) -> Figure:
  """Draws a 2-D map of the features, colored by a factor.

  `points` are [n, 2], `values` int [n], 0..K-1 or -1 where unknown, `names` the
  K names of values, and `explained` the share of variance of each axis.
  """
  figure = _figure(4.2, 3.4)
  axes = figure.add_subplot()
  size = float(np.clip(4000 / max(len(points), 1), 0.6, 9))
  style = dict[str, Any](s=size, linewidths=0, alpha=0.8, rasterized=True)
  if values is None:
    axes.scatter(*points.T, color="0.4", **style)
  else:
    _scatter_groups(axes, points, values, names, style)
  axes.set_xticks([])
  axes.set_yticks([])
  for axis, label in enumerate(explained[:2]):
    text = f"component {axis + 1} ({label:.0%} of variance)"
    (axes.set_xlabel, axes.set_ylabel)[axis](text)
  if values is not None and 0 < len(names) <= _MAX_LEGEND:
    axes.legend(
      loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3 / size**0.5
    )
  return figure


def _scatter_groups(
  axes: Axes,
  points: np.ndarray,
  values: np.ndarray,
  names: Sequence[str],
  style: Mapping[str, Any],
) -> None:
  """Draws the points of each value in a color of its own; unknown: gray."""
  few = len(names) <= 10
  wheel = matplotlib.colormaps["tab10" if few else "hsv"]
  for k in range(-1, len(names)):
    members = values == k
    if not members.any():
      continue
    color = "0.4" if k < 0 else wheel(k if few else k / len(names))
    label = names[k] if 0 <= k < len(names) <= _MAX_LEGEND else None
    axes.scatter(*points[members].T, color=color, label=label, **style)


def curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Turns logged records into curves.

  Args:
    records: Each with "step" and numbers; anything else is left out.

  Returns:
    By name, [n, 2] float64: step and value, by step; of a step written twice
    (by a resumed run) the later record counts.
  """
  values: dict[str, dict[float, float]] = {}
  for record in records:
    for name, value in record.items():
      is_number = isinstance(value, int | float)
      is_number &= not isinstance(value, bool)
      if name != "step" and is_number:
        values.setdefault(name, {})[float(record["step"])] = float(value)
  return {
    name: np.array(sorted(points.items())) for name, points in values.items()
  }


class Panel(NamedTuple):
  """A plot of the training curves.

  Attributes:
    title: Of the plot.
    names: Numbers that share it, by what the legend calls them.
    lines: Values that are drawn as lines across it, by their names.
  """

  title: str
  names: Mapping[str, str]
  lines: Mapping[str, float] = types.MappingProxyType({})


_IDEAL = {"ideal": 1.0}
_COLLAPSE = "online/collapse/"
_MAX_TERMS, _MAX_PANELS = 4, 12
# After the loss and its terms.
_PANELS = (
  Panel(
    "Entropy of a variable / log b",
    {"mean": "marginal_entropy_mean", "least": "marginal_entropy_min"},
    _IDEAL,
  ),
  Panel("Information / log b", {"information": "information"}, _IDEAL),
  Panel("Views in the same bin", {"share": "argmax_agreement"}, _IDEAL),
  Panel("Spread of the embeddings", {"std": "embedding_std"}, _IDEAL),
  Panel("Dead bins", {"share": "dead_bins"}),
  Panel(
    "RankMe, dimensions in use",
    {
      "features": f"{_COLLAPSE}rank_me/features",
      "embeddings": f"{_COLLAPSE}rank_me/embeddings",
    },
  ),
  Panel("Distance of two views", {"alignment": f"{_COLLAPSE}alignment"}),
  Panel("Accuracy", {"k-NN": "online/knn", "linear": "online/linear"}),
  Panel("Learning rate", {"learning rate": "learning_rate"}),
  Panel("Gradient norm", {"gradient norm": "gradient_norm"}),
)


def panels_of(curves: Mapping[str, np.ndarray]) -> list[Panel]:
  """Returns the panels that have a curve: no constants, no single values."""
  shown = {
    name for name, points in curves.items() if len(set(points[:, 1])) > 1
  }
  terms = [n for n in sorted(shown) if metric_groups.group(n) == "terms"]
  floor = curves.get("off_diagonal_floor")
  lines = {} if floor is None else {"floor": float(floor[-1, 1])}
  panels = [
    Panel("Loss", {"loss": "loss"}),
    *(
      Panel(f"Term {n}", {n: n}, lines if n == "off_diagonal" else {})
      for n in terms[:_MAX_TERMS]
    ),
    *_PANELS,
  ]
  panels = [
    p._replace(names={k: n for k, n in p.names.items() if n in shown})
    for p in panels
  ]
  return [p for p in panels if p.names][:_MAX_PANELS]


@_styled
def training_curves(curves: Mapping[str, np.ndarray]) -> Figure:
  """Draws the `panels_of` curves; there must be one."""
  panels = panels_of(curves)
  columns = min(4, len(panels))
  rows = math.ceil(len(panels) / columns)
  figure = _figure(2.4 * columns, 1.7 * rows)
  grid = [axes for row in _panels(figure, rows, columns) for axes in row]
  for axes, panel in zip(grid, panels, strict=False):
    _draw_panel(axes, panel, curves)
  for axes in grid[len(panels) :]:
    axes.set_visible(False)
  figure.supxlabel("step", fontsize=8)
  return figure


def _draw_panel(
  axes: Axes, panel: Panel, curves: Mapping[str, np.ndarray]
) -> None:
  """Draws the curves of a panel, and its lines across."""
  for label, name in panel.names.items():
    axes.plot(*curves[name].T, linewidth=1.1, label=label)
  for label, value in panel.lines.items():
    axes.axhline(value, color="gray", linewidth=0.8, linestyle=":", label=label)
  if len(panel.names) + len(panel.lines) > 1:
    axes.legend(fontsize=6)
  axes.set_title(panel.title)
  axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
