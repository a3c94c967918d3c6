"""Writes the explorer: a folder of static files that opens from disk.

A page opened from disk may not fetch, but it may add script elements. So the
data are scripts that call one function, loaded when a page needs them:

  index.html              loads the scripts of static/ in their order
  static/                 style sheet and scripts, one for each page
  data/core.js            tables of the overview
  data/images.js          names, labels and codes of the shown images
  data/variable_M.js      bins, best images and attribution of a variable
  data/joint_M.js         one row of blocks of the joint matrix
  data/map.js             the 2-D map;  data/neighbours.js
  sprites/0.jpg ...       sheets of 8 x 8 thumbnails
"""

import base64
import json
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib.colors
import matplotlib.image
import numpy as np

from imsvd_jax.explain import embedding_map, health
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.illustrations import (
  PER_SHEET,
  SHEET_SIDE,
  Illustrations,
  ViewExamples,
)
from imsvd_jax.explain.subject import Subject, no_code_sentence

ASSETS = pathlib.Path(__file__).parent
# Ratios P / (p p) are stored as 255 steps of their binary logarithm.
RATIO_RANGE = 8.0


def script_json(value: Any) -> str:
  """JSON that is safe inside a script, whatever the strings hold.

  Everything outside ASCII is escaped (U+2028 ends a line in old engines), and
  so are <, > and &, which could end the script element.
  """
  text = json.dumps(value, ensure_ascii=True, allow_nan=False)
  for character in "<>&":
    text = text.replace(character, f"\\u{ord(character):04x}")
  return text


def packed(array: np.ndarray) -> str:
  """Base64 of an array's little-endian bytes."""
  array = np.ascontiguousarray(array)
  little = array.astype(array.dtype.newbyteorder("<"), copy=False)
  return base64.b64encode(little.tobytes()).decode()


def deflated(array: np.ndarray) -> str:
  """Base64 of an array's little-endian bytes, zlib-compressed."""
  array = np.ascontiguousarray(array)
  little = array.astype(array.dtype.newbyteorder("<"), copy=False)
  return base64.b64encode(zlib.compress(little.tobytes(), 6)).decode()


def _write(directory: pathlib.Path, name: str, value: Any) -> None:
  text = f"explorer.receive({script_json(name)}, {script_json(value)});\n"
  (directory / "data" / f"{name}.js").write_text(text, encoding="ascii")


def _rounded(array: np.ndarray | None, digits: int = 4) -> list | None:
  if array is None:
    return None
  return np.round(np.asarray(array, np.float64), digits).tolist()


def build(
  directory: str | pathlib.Path,
  subject: Subject,
  analysis: Analysis,
  illustrations: Illustrations,
  *,
  title: str | None = None,
  names: Callable[[int], str] | None = None,
  views: ViewExamples | None = None,
  num_neighbours: int = 12,
  joint_detail: bool = True,
  progress: Callable[[str], None] | None = None,
) -> pathlib.Path:
  """Writes the folder; the sprites are there already (see `illustrate`).

  Args:
    directory: The folder; its "sprites" holds the sheets.
    subject: For its name and objective.
    analysis: The first pass.
    illustrations: The second pass.
    title: By default the subject's name.
    names: Image index -> what to call the image, such as its path; asked for
      the shown images only.
    views: Examples of two views beside their codes.
    num_neighbours: Nearest neighbours of each sampled image; 0: none.
    joint_detail: Whether to store every cell of the joint matrix (one byte
      per cell of its upper half, compressed), or only its blocks' totals.
    progress: Called with a line of text for each part.

  Returns:
    The path of index.html.
  """
  directory = pathlib.Path(directory)
  (directory / "data").mkdir(parents=True, exist_ok=True)
  say = progress or (lambda line: None)
  title = title or subject.name
  core = _core(subject, analysis, illustrations, title)
  core["views"] = _views(directory, views)
  core["hasJointDetail"] = bool(
    joint_detail and analysis.joint is not None and analysis.num_variables > 1
  )
  say("explorer: tables and images")
  _write(directory, "images", _images(analysis, illustrations, names))
  core["hasMap"] = _write_map(directory, analysis, illustrations)
  neighbours = _write_neighbours(
    directory, analysis, illustrations, num_neighbours
  )
  core["hasNeighbours"] = neighbours is not None
  if neighbours is not None and analysis.factors:
    core["health"].append(_alike(analysis, *neighbours))
  if analysis.has_codes:
    say("explorer: variables")
    _write_variables(directory, analysis, illustrations)
  if core["hasJointDetail"]:
    say("explorer: joint matrix")
    _write_joint(directory, analysis)
  _write(directory, "core", core)
  return _write_page(directory, title)


def _write_page(directory, title):
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(ASSETS), autoescape=True
  )
  page = environment.get_template("index.html.j2").render(title=title)
  path = directory / "index.html"
  path.write_text(page, encoding="utf-8")
  shutil.copytree(
    ASSETS / "static",
    directory / "static",
    copy_function=shutil.copyfile,
    dirs_exist_ok=True,
  )
  return path


# --- Parts --------------------------------------------------------------------


# Colour tables by stops (place, colour). Both sequential tables start at the
# page's own ground. In the ratio tables independence is the ground, pairs of
# bins that occur together stand out and absent ones recede: most of a code
# that works is absent pairs.
COLOURS = {
  "light": [
    (0, "#fbfaf7"),
    (0.25, "#c3dcd8"),
    (0.5, "#57a5a4"),
    (0.75, "#0e5f6b"),
    (1, "#06232e"),
  ],
  "dark": [
    (0, "#1b1f23"),
    (0.25, "#1d454b"),
    (0.5, "#2f8a86"),
    (0.75, "#8fd6b8"),
    (1, "#f6f2d2"),
  ],
  "ratioLight": [
    (0, "#b3c5d6"),
    (0.5, "#fbfaf7"),
    (0.66, "#eb9a6c"),
    (0.8, "#b5382b"),
    (1, "#4d0b14"),
  ],
  "ratioDark": [
    (0, "#36506a"),
    (0.5, "#1b1f23"),
    (0.66, "#8a4526"),
    (0.8, "#e58c4f"),
    (1, "#fff0cf"),
  ],
  "heat": [
    (0, "#000004"),
    (0.4, "#8f2469"),
    (0.7, "#f1605d"),
    (1, "#fcf3b0"),
  ],
}


def colour_table(name: str) -> np.ndarray:
  """[256, 3] uint8, one of the explorer's colour tables."""
  stops = COLOURS[name]
  places = [place for place, _ in stops]
  colours = np.array([matplotlib.colors.to_rgb(c) for _, c in stops])
  at = np.linspace(0, 1, 256)
  channels = [np.interp(at, places, colours[:, k]) for k in range(3)]
  return np.rint(np.stack(channels, 1) * 255).astype(np.uint8)


def _core(subject, analysis, illustrations, title):
  size = illustrations.thumbnail_size
  core = {
    "title": title,
    "objective": subject.objective,
    "summary": health.summary(analysis),
    "sentence": "" if analysis.has_codes else no_code_sentence(subject),
    "numImages": analysis.num_images,
    "numShown": len(illustrations.indices),
    "numVariables": analysis.num_variables,
    "numBins": analysis.num_bins,
    "hasCodes": analysis.has_codes,
    "imagesPerSecond": round(analysis.images_per_second, 1),
    "seconds": round(analysis.seconds, 1),
    "sprite": {
      "size": size,
      "side": SHEET_SIDE,
      "perSheet": PER_SHEET,
      "extension": "png" if size <= 32 else "jpg",
    },
    "health": [i._asdict() for i in health.indicators(analysis)],
    "factors": [
      {"name": f.name, "values": list(f.names)} for f in analysis.factors
    ],
    "best": health.best_factors(analysis),
    "colours": {name: packed(colour_table(name)) for name in COLOURS},
    "ratioRange": RATIO_RANGE,
  }
  if analysis.feature_covariance is not None:
    share = embedding_map.spectrum(analysis.feature_covariance)
    core["spectrum"] = _rounded(share[:256], 6)
    core["numFeatures"] = len(share)
  if analysis.has_codes:
    core["variables"] = _variable_table(analysis)
    core["usage"] = analysis.usage.tolist()
    core["overlays"] = {
      "cam": illustrations.grad_cam is not None,
      "fine": illustrations.integrated is not None,
    }
  if analysis.mutual_information is not None and analysis.num_variables > 1:
    core["information"] = packed(analysis.mutual_information.astype(np.float32))
    core["floor"] = packed(analysis.floor.astype(np.float32))
    core["marginal"] = packed(analysis.marginal.astype(np.float32))
    core["pairs"] = [
      [p.first, p.second, p.mutual_information, p.floor]
      for p in analysis.redundant_pairs(12)
    ]
    if analysis.cross_mutual_information is not None:
      cross = analysis.cross_mutual_information.astype(np.float32)
      core["crossInformation"] = packed(cross)
  return core


def _variable_table(analysis):
  largest = analysis.usage.max(1) / analysis.num_images
  table = {
    "entropy": _rounded(analysis.entropies()),
    "effectiveBins": _rounded(health.effective_bins(analysis), 2),
    "usedBins": (analysis.usage > 0).sum(1).tolist(),
    "largest": _rounded(largest),
    "confidence": _rounded(analysis.confidence),
    "doubt": _rounded(analysis.conditional_entropy),
    "agreement": _rounded(analysis.agreement),
    "flips": {n: _rounded(r) for n, r in analysis.flip_rates.items()},
    "nmi": _rounded(None if analysis.nmi is None else analysis.nmi.T),
    "chance": _rounded(
      None if analysis.nmi_chance is None else analysis.nmi_chance.T
    ),
  }
  if analysis.mutual_information is not None and analysis.num_variables > 1:
    excess = analysis.mutual_information - analysis.floor
    np.fill_diagonal(excess, -np.inf)
    partner = excess.argmax(1)
    table["partner"] = partner.tolist()
    table["shared"] = _rounded(excess.max(1))
  return table


def _images(analysis, illustrations, names):
  indices = illustrations.indices
  rows = np.searchsorted(analysis.indices, indices)
  factors = []
  for factor in analysis.factors:
    small = len(factor.names) < 32_767
    values = factor.values[rows].astype(np.int16 if small else np.int32)
    factors.append({"wide": not small, "values": deflated(values)})
  result = {
    "indices": deflated(indices.astype(np.int32)),
    "names": None if names is None else [str(names(int(i))) for i in indices],
    "factors": factors,
  }
  if analysis.has_codes:
    # Variable by variable: a search reads a few whole columns.
    codes = np.ascontiguousarray(analysis.codes[rows].T)
    result["codes"] = deflated(codes)
    result["wide"] = codes.dtype.itemsize == 2
  return result


def _write_variables(directory, analysis, illustrations):
  slots = np.searchsorted(illustrations.indices, analysis.top_indices)
  slots = np.where(analysis.top_indices < 0, -1, slots)
  for m in range(analysis.num_variables):
    data = {
      "slots": slots[m].tolist(),
      "scores": _rounded(analysis.top_scores[m], 3),
      "counts": {
        name: counts[m].tolist()
        for name, counts in analysis.class_counts.items()
        if counts.shape[2] <= 2000
      },
    }
    for name, maps in (
      ("cam", illustrations.grad_cam),
      ("fine", illustrations.integrated),
    ):
      if maps is not None:
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
  """Encodes P / (p p) in a byte: 0 for P = 0, else 255 steps of its log2.

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


def _write_joint(directory, analysis):
  """Row m holds the blocks (m, m), (m, m + 1), ..., one after another."""
  bins = analysis.num_bins
  marginal = analysis.marginal.reshape(-1)
  for m in range(analysis.num_variables):
    start = m * bins
    rows = slice(start, start + bins)
    levels = ratio_levels(
      analysis.joint[rows, start:], marginal[rows], marginal[start:]
    )
    blocks = levels.reshape(bins, -1, bins).transpose(1, 0, 2)
    _write(directory, f"joint_{m}", {"blocks": deflated(blocks)})


def _write_map(directory, analysis, illustrations):
  """Two principal components of the sampled images that are shown."""
  if analysis.feature_covariance is None or len(analysis.sample_indices) < 3:
    return False
  components = embedding_map.principal_components(
    analysis.feature_mean, analysis.feature_covariance
  )
  if len(components.variances) < 2:
    return False
  shown = np.isin(analysis.sample_indices, illustrations.indices)
  position = components.project(analysis.sample_features[shown])
  low, high = position.min(0), position.max(0)
  unit = (position - low) / np.maximum(high - low, 1e-12)
  slots = np.searchsorted(illustrations.indices, analysis.sample_indices[shown])
  _write(
    directory,
    "map",
    {
      "slots": deflated(slots.astype(np.int32)),
      "points": deflated(np.rint(unit * 65_535).astype(np.uint16)),
      "explained": _rounded(components.explained),
    },
  )
  return True


def _write_neighbours(directory, analysis, illustrations, count):
  shown = np.isin(analysis.sample_indices, illustrations.indices)
  if not count or shown.sum() < 2:
    return None
  features = analysis.sample_features[shown]
  rows, cosines = embedding_map.nearest_neighbours(
    features, np.arange(len(features)), count=count
  )
  slots = np.searchsorted(
    illustrations.indices, analysis.sample_indices[shown]
  ).astype(np.int32)
  _write(
    directory,
    "neighbours",
    {
      "count": rows.shape[1],
      "slots": deflated(slots),
      "neighbours": deflated(slots[rows]),
      "cosines": deflated(
        np.rint(np.clip(cosines, 0, 1) * 255).astype(np.uint8)
      ),
    },
  )
  return analysis.sample_indices[shown], rows


def _alike(analysis, indices, neighbours):
  factor = analysis.factors[0]
  values = factor.values[np.searchsorted(analysis.indices, indices)]
  agreement, chance = embedding_map.neighbour_agreement(neighbours, values)
  return health.neighbour_indicator(factor.name, agreement, chance)._asdict()


def _views(directory, views):
  """Examples: images as PNG files, probabilities as bytes."""
  if views is None:
    return None
  folder = directory / "views"
  folder.mkdir(exist_ok=True)
  for row, pair in enumerate(views.images):
    for number, image in enumerate(pair):
      pixels = np.broadcast_to(image, (*image.shape[:2], 3))
      matplotlib.image.imsave(folder / f"{row}_{number}.png", pixels)
  levels = np.rint(np.clip(views.probabilities, 0, 1) * 255)
  return {
    "indices": views.indices.tolist(),
    "probabilities": deflated(levels.astype(np.uint8)),
  }
