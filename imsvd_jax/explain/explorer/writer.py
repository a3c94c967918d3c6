"""Writes the explorer: a folder of static files that opens from disk.

A page opened from disk may not fetch, but it may add script elements. So the
data are scripts that call one function, loaded when a page needs them:

  index.html              loads the scripts of static/ in their order
  static/                 style sheet and scripts, one for each page
  data/core.js            tables of the overview
  data/images.js          names, labels and codes of the shown images
  data/variable_M.js      bins, best images and attribution of a variable
  data/joint_M.js         one row of blocks of the joint matrix
  data/map.js             the 2-D maps
  data/neighbors.js       nearest neighbors
  data/duplicates.js      groups of images with nearly the same features
  data/outliers.js        images of rare codes
  sprites/0.jpg ...       sheets of 8 x 8 thumbnails
"""

import base64
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import matplotlib.colors
import matplotlib.image
import numpy as np

from imsvd_jax.base import console, files
from imsvd_jax.explain import embedding_map, health
from imsvd_jax.explain.analysis import Analysis, Code, Features, Pairs, Views
from imsvd_jax.explain.explorer import findings
from imsvd_jax.explain.illustrations import (
  PER_SHEET,
  SHEET_SIDE,
  Illustrations,
  sheet_extension,
)
from imsvd_jax.explain.subject import Subject, no_code_sentence

ASSETS = pathlib.Path(__file__).parent
# Ratios P / (p p) are stored as 255 steps of their binary logarithm.
RATIO_RANGE = 8.0
NUM_NEIGHBORS = 12  # Of each sampled image.


def script_json(value: Any) -> str:
  """Returns JSON that is safe inside a script, whatever the strings hold.

  Everything outside ASCII is escaped (U+2028 ends a line in old engines), and
  so are <, > and &, which could end the script element.
  """
  text = json.dumps(value, ensure_ascii=True, allow_nan=False)
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def packed(array: np.ndarray) -> str:
  """Returns Base64 of an array's little-endian bytes."""
  little = array.astype(array.dtype.newbyteorder("<"), copy=False)
  return base64.b64encode(little.tobytes()).decode()


def deflated(array: np.ndarray) -> str:
  """Returns Base64 of an array's little-endian bytes, zlib-compressed."""
  little = array.astype(array.dtype.newbyteorder("<"), copy=False)
  return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode()


def _write(directory: pathlib.Path, name: str, value: Any) -> None:
  text = f"receive({script_json(name)}, {script_json(value)});\n"
  files.write_whole(directory / "data" / f"{name}.js", text.encode("ascii"))


def _rounded(array: np.ndarray, digits: int = 4) -> list:
  return np.round(np.asarray(array, np.float64), digits).tolist()


def build(
  directory: str | pathlib.Path,
  subject: Subject,
  analysis: Analysis,
  illustrations: Illustrations,
  *,
  title: str | None = None,
  training: Sequence[health.Indicator] = (),
  names: Callable[[int], str] | None = None,
  links: Callable[[int], str] | None = None,
  report: Callable[[str], None] = console.print_line,
) -> pathlib.Path:
  """Writes the folder; the sprites are there already (see `illustrate`).

  Args:
    directory: The folder; its "sprites" holds the sheets.
    title: By default the subject's name.
    training: How the training went, for the overview.
    names: Image index -> what to call the image, such as its path; asked for
      the shown images only.
    links: Image index -> where its file is, relative to index.html or as
      file://; "" if it is in none of its own.

  Returns:
    The path of index.html.
  """
  directory = pathlib.Path(directory)
  (directory / "data").mkdir(parents=True, exist_ok=True)
  title = title or subject.name
  core = _core(subject, analysis, illustrations, title)
  core["health"] = [i._asdict() for i in training] + core["health"]
  core["views"] = _write_views(directory, analysis.views)
  report("explorer: tables and images")
  _write(directory, "images", _images(analysis, illustrations, names, links))
  shown = analysis.features.sampled_from(illustrations.indices)
  report("explorer: maps and neighbors")
  core["hasMap"] = _write_map(directory, shown, illustrations.indices)
  neighbors = _write_neighbors(directory, shown, illustrations.indices)
  core["hasNeighbors"] = neighbors is not None
  if neighbors is not None and analysis.factors:
    indicator = health.neighbor_indicator(
      analysis.factors[0], analysis.rows(shown.sample_indices), neighbors
    )
    core["health"].append(indicator._asdict())
  if analysis.code is not None:
    report("explorer: variables")
    _write_variables(directory, analysis, analysis.code, illustrations)
    rare = findings.outliers(
      analysis.code, analysis.rows(illustrations.indices)
    )
    _write(directory, "outliers", rare)
    if analysis.pairs is not None and analysis.num_variables > 1:
      report("explorer: joint matrix")
      _write_joint(directory, analysis.code, analysis.pairs)
  _write(directory, "core", core)
  return _write_page(directory, title)


def _write_page(directory: pathlib.Path, title: str) -> pathlib.Path:
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS), autoescape=True
  )
  page = environment.get_template("index.html.j2").render(title=title)
  path = directory / "index.html"
  files.write_whole(path, page.encode())
  shutil.copytree(
    ASSETS / "static",
    directory / "static",
    copy_function=shutil.copyfile,
    dirs_exist_ok=True,
  )
  return path


# Color tables by stops: places, colors. Both sequential tables start at the
# page's background. In the ratio tables independence has the color of the
# background, pairs of bins that occur together stand out, and absent pairs
# recede, because most pairs of a code that works are absent.
_EVEN, _RATIO = (0, 0.25, 0.5, 0.75, 1), (0, 0.5, 0.66, 0.8, 1)
COLORS = {
  "light": (_EVEN, "#fbfaf7 #c3dcd8 #57a5a4 #0e5f6b #06232e"),
  "dark": (_EVEN, "#1b1f23 #1d454b #2f8a86 #8fd6b8 #f6f2d2"),
  "ratioLight": (_RATIO, "#b3c5d6 #fbfaf7 #eb9a6c #b5382b #4d0b14"),
  "ratioDark": (_RATIO, "#36506a #1b1f23 #8a4526 #e58c4f #fff0cf"),
  "heat": ((0, 0.4, 0.7, 1), "#000004 #8f2469 #f1605d #fcf3b0"),
}


def color_table(name: str) -> np.ndarray:
  """Returns [256, 3] uint8, one of the explorer's color tables."""
  places, names = COLORS[name]
  colors = matplotlib.colors.to_rgba_array(names.split())
  at = np.linspace(0, 1, 256)
  channels = [np.interp(at, places, colors[:, k]) for k in range(3)]
  return np.rint(np.stack(channels, 1) * 255).astype(np.uint8)


def _core(
  subject: Subject, analysis: Analysis, illustrations: Illustrations, title: str
) -> dict[str, Any]:
  size = illustrations.thumbnail_size
  code = analysis.code
  core = {
    "title": title,
    "summary": health.summary(analysis),
    "sentence": "" if code is not None else no_code_sentence(subject),
    "numImages": analysis.num_images,
    "numShown": len(illustrations.indices),
    "numVariables": analysis.num_variables,
    "numBins": 0 if code is None else code.num_bins,
    "hasCodes": code is not None,
    "seconds": round(analysis.seconds, 1),
    "sprite": {
      "size": size,
      "side": SHEET_SIDE,
      "perSheet": PER_SHEET,
      "extension": sheet_extension(size),
    },
    "health": [i._asdict() for i in health.indicators(analysis)],
    "factors": [
      {"name": f.name, "values": list(f.names)} for f in analysis.factors
    ],
    "best": health.best_factors(analysis),
    "colors": {name: packed(color_table(name)) for name in COLORS},
    "ratioRange": RATIO_RANGE,
  }
  covariance = analysis.features.feature_covariance
  if covariance is not None:
    share = embedding_map.spectrum(covariance)
    core["spectrum"] = _rounded(share[:256], 6)
    core["numFeatures"] = len(share)
  if code is not None:
    core["variables"] = _variable_table(analysis, code)
    core["usage"] = code.usage.tolist()
    core["captions"] = _captions(analysis)
    for name in ("interventions", "edits"):
      if (flips := getattr(analysis, name)) is not None:
        core[name] = findings.intervention_table(flips)
    core["overlays"] = list(_overlays(illustrations))
    if analysis.pairs is not None and code.num_variables > 1:
      core |= _pair_tables(code, analysis.pairs, analysis.views)
  return core


def _captions(analysis: Analysis) -> dict[str, list[Any]]:
  """Returns [text, precision, lift] of the bins that have a name."""
  if analysis.captions is None:
    return {}
  return {
    f"{c.variable}/{c.bin}": [c.text, round(c.precision, 3), round(c.lift, 2)]
    for c in analysis.captions.confirmed
  }


def _pair_tables(
  code: Code, pairs: Pairs, views: Views | None
) -> dict[str, Any]:
  tables = {
    "information": packed(pairs.mutual_information.astype(np.float32)),
    "floor": packed(pairs.floor.astype(np.float32)),
    "marginal": packed(code.marginal.astype(np.float32)),
    "pairs": [
      [a, c, float(pairs.mutual_information[a, c]), float(pairs.floor[a, c])]
      for a, c in pairs.most_redundant(12)
    ],
  }
  if views is not None and views.cross_mutual_information is not None:
    cross = views.cross_mutual_information.astype(np.float32)
    tables["crossInformation"] = packed(cross)
  return tables


def _variable_table(analysis: Analysis, code: Code) -> dict[str, Any]:
  scores, views = analysis.scores, analysis.views
  table = {
    "entropy": _rounded(code.entropies()),
    "effectiveBins": _rounded(health.effective_bins(code), 2),
    "usedBins": (code.usage > 0).sum(1).tolist(),
    "largest": _rounded(code.usage.max(1) / analysis.num_images),
    "confidence": _rounded(code.confidence),
    "agreement": None if views is None else _rounded(views.agreement),
    "nmi": None if scores is None else _rounded(scores.nmi.T),
    "chance": None if scores is None else _rounded(scores.nmi_chance.T),
  }
  if analysis.pairs is not None and code.num_variables > 1:
    excess = analysis.pairs.excess()
    np.fill_diagonal(excess, -np.inf)
    table["partner"] = excess.argmax(1).tolist()
    table["shared"] = _rounded(excess.max(1))
  return table


def _images(
  analysis: Analysis,
  illustrations: Illustrations,
  names: Callable[[int], str] | None,
  links: Callable[[int], str] | None,
) -> dict[str, Any]:
  indices = illustrations.indices
  rows = analysis.rows(indices)
  factors = []
  for factor in analysis.factors:
    small = len(factor.names) < 32_767
    values = factor.values[rows].astype(np.int16 if small else np.int32)
    factors.append({"wide": not small, "values": deflated(values)})
  result = {
    "indices": deflated(indices.astype(np.int32)),
    "names": None if names is None else [str(names(int(i))) for i in indices],
    "links": None if links is None else [links(int(i)) for i in indices],
    "factors": factors,
  }
  if analysis.code is not None:
    # Variable by variable: a search reads a few whole columns.
    codes = analysis.code.codes[rows].T
    result["codes"] = deflated(codes)
    result["wide"] = codes.dtype.itemsize == 2
  return result


def _overlays(illustrations: Illustrations) -> dict[str, np.ndarray]:
  """Returns the maps that there are, by the page's name for their kind."""
  maps = {
    "cam": illustrations.grad_cam,
    "fine": illustrations.integrated,
    "patches": illustrations.patches,
    "attention": illustrations.attention,
  }
  return {name: found for name, found in maps.items() if found is not None}


def _write_variables(
  directory: pathlib.Path,
  analysis: Analysis,
  code: Code,
  illustrations: Illustrations,
) -> None:
  slots = np.searchsorted(illustrations.indices, code.top_indices)
  slots = np.where(code.top_indices < 0, -1, slots)
  scores = analysis.scores
  class_counts = {} if scores is None else scores.class_counts
  for m in range(code.num_variables):
    data = {
      "slots": slots[m].tolist(),
      "scores": _rounded(code.top_scores[m], 3),
      "counts": {
        name: counts[m].tolist()
        for name, counts in class_counts.items()
        if counts.shape[2] <= 2000
      },
    }
    for name, maps in _overlays(illustrations).items():
      data[name] = {
        "perBin": maps.shape[2],
        "height": maps.shape[3],
        "width": maps.shape[4],
        "maps": deflated(maps[m]),
      }
    _write(directory, f"variable_{m}", data)


def ratio_levels(
  joint: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
  """Encodes P / (p p) as a byte: 0 for P = 0, else 255 steps of its log2.

  Args:
    joint: [r, c].
    rows: [r] marginal.
    columns: [c] marginal.

  Returns:
    [r, c] uint8; level k >= 1 means 2^((k - 128) * 8 / 127).
  """
  joint = np.asarray(joint, np.float64)
  independent = np.outer(rows, columns)
  positive = (joint > 0) & (independent > 0)
  ratio = np.divide(joint, independent, out=np.ones_like(joint), where=positive)
  steps = np.log2(ratio) * 127 / RATIO_RANGE + 128
  levels = np.clip(np.rint(steps), 1, 255).astype(np.uint8)
  return np.where(positive, levels, 0).astype(np.uint8)


def _write_joint(directory: pathlib.Path, code: Code, pairs: Pairs) -> None:
  """Writes row m: the blocks (m, m), (m, m + 1), ..., one after another."""
  bins = code.num_bins
  marginal = code.marginal.reshape(-1)
  for m in range(code.num_variables):
    start = m * bins
    rows = slice(start, start + bins)
    levels = ratio_levels(
      pairs.joint[rows, start:], marginal[rows], marginal[start:]
    )
    blocks = levels.reshape(bins, -1, bins).transpose(1, 0, 2)
    _write(directory, f"joint_{m}", {"blocks": deflated(blocks)})


def _write_map(
  directory: pathlib.Path, features: Features, indices: np.ndarray
) -> bool:
  """Writes where the sampled images that are shown lie: PCA and t-SNE."""
  covariance = features.feature_covariance
  few = len(features.sample_indices) < 3
  if few or covariance is None or len(covariance) < 2:
    return False
  position, explained = embedding_map.principal_components(features)
  slots = np.searchsorted(indices, features.sample_indices).astype(np.int32)
  maps: dict[str, Any] = {
    "pca": _points(slots, position),
    "explained": _rounded(explained),
  }
  near = embedding_map.t_sne(features)
  if near is not None:
    rows, position = near
    maps["tsne"] = _points(slots[rows], position)
  _write(directory, "map", maps)
  return True


def _points(slots: np.ndarray, position: np.ndarray) -> dict[str, str]:
  """Returns images and their places, scaled to fill a square."""
  low, high = position.min(0), position.max(0)
  unit = (position - low) / np.maximum(high - low, 1e-12)
  return {
    "slots": deflated(slots),
    "points": deflated(np.rint(unit * 65_535).astype(np.uint16)),
  }


def _write_neighbors(
  directory: pathlib.Path, features: Features, indices: np.ndarray
) -> np.ndarray | None:
  """Writes nearest neighbors and duplicates.

  Returns:
    The rows of the neighbors, or None without any.
  """
  if len(features.sample_indices) < 2:
    return None
  rows, cosines = embedding_map.nearest_neighbors(
    features.sample_features, NUM_NEIGHBORS
  )
  slots = np.searchsorted(indices, features.sample_indices).astype(np.int32)
  levels = np.rint(np.clip(cosines, 0, 1) * 255).astype(np.uint8)
  _write(
    directory,
    "neighbors",
    {
      "count": rows.shape[1],
      "slots": deflated(slots),
      "neighbors": deflated(slots[rows]),
      "cosines": deflated(levels),
    },
  )
  groups = findings.duplicate_groups(
    slots, features.sample_features, rows, cosines
  )
  _write(directory, "duplicates", groups)
  return rows


def _write_views(
  directory: pathlib.Path, views: Views | None
) -> dict[str, Any] | None:
  """Writes example images as PNG files; returns their codes as bytes."""
  if views is None:
    return None
  folder = directory / "views"
  folder.mkdir(exist_ok=True)
  for row, pair in enumerate(views.example_views):
    for number, image in enumerate(pair):
      pixels = np.broadcast_to(image, (*image.shape[:2], 3))
      matplotlib.image.imsave(folder / f"{row}_{number}.png", pixels)
  levels = np.rint(np.clip(views.example_probabilities, 0, 1) * 255)
  return {
    "indices": views.example_indices.tolist(),
    "probabilities": deflated(levels.astype(np.uint8)),
  }
