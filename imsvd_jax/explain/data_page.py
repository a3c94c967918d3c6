"""What a recipe sees of its data: a report in text, and a page of pictures."""

import html
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
from ml_collections import ConfigDict

from imsvd_jax import data
from imsvd_jax.base import console, files
from imsvd_jax.base.errors import UserError, counted, listing
from imsvd_jax.data import evaluation_batches, host_pipeline, part
from imsvd_jax.data.source import Source
from imsvd_jax.data.survey import Survey, survey
from imsvd_jax.training import augment
from imsvd_jax.training import experiment as experiment_lib

NUM_IMAGES = 10
_GAP = 4  # Pixels between pictures.


def check_data(config: ConfigDict, output: str) -> list[str]:
  """Reads the data of a recipe once, and writes the page.

  Args:
    config: A recipe.
    output: Folder for index.html and views.png; "" for none.

  Returns:
    The report, line by line.

  Raises:
    UserError: There are no images, or the folder cannot be written.
  """
  if output:
    files.check_directory(output)
  experiment_lib.check(config)
  source = data.make_source(config.data, "train")
  lines, train = report_of(source)
  try:
    test_source = data.make_source(config.data, "eval")
  except UserError as error:
    test_source = None
    lines.append(f"Evaluation: WARNING: {error}")
  if test_source is not None:
    more, test = report_of(test_source)
    lines += ["", *more, _leaks(train, test)]
  if output:
    picture = views_of(source, config)
    page = write_page(output, picture, lines, config.views.num_local)
    lines.append(f"Pictures: {page}")
  return lines


def data_stats(config: ConfigDict) -> list[str]:
  """Returns lines with the mean and std of the training images."""
  source = data.make_source(config.data, "train")
  _, found = report_of(source)
  return _statistics(found)


def report_of(source: Source) -> tuple[list[str], Survey]:
  """Reads a source once; returns what to say about it, and all of it."""
  progress = console.Progress("Reading", source.num_examples)
  found = survey(source, progress.add)
  lines = [
    f"{source.summary()}.",
    f"Kinds: {_counts(found.kinds)}.",
    f"Sizes: {_sizes(found.sides)}.",
    *_bad(found),
    *_flat(found),
    *_duplicates(found),
    *_balance(found),
    *_statistics(found),
    f"Speed: {progress.rate():.0f} images/s, read and decoded whole;"
    " `imsvd benchmark data` measures the crops of training.",
  ]
  return lines, found


def _counts(counts: Any) -> str:
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  return ", ".join(f"{name} {count}" for name, count in ordered)


def _sizes(sides: np.ndarray) -> str:
  parts = []
  for name, column in (("height", sides[:, 0]), ("width", sides[:, 1])):
    parts.append(
      f"{name} {column.min()} to {column.max()}, median {np.median(column):.0f}"
    )
  return "; ".join(parts)


def _bad(found: Survey) -> list[str]:
  if not found.bad:
    return ["Bad files: none."]
  count = sum(map(len, found.bad.values()))
  lines = [f"Bad files: {count}, replaced in training, left out elsewhere:"]
  for reason, names in sorted(found.bad.items()):
    lines.append(f"  {len(names)} x {reason}: {listing(names, 3)}")
  return lines


def _flat(found: Survey) -> list[str]:
  if not found.flat:
    return []
  return [
    f"Of one color only: {counted(len(found.flat), 'image')}:"
    f" {listing(found.flat, 3)}"
  ]


def _duplicates(found: Survey) -> list[str]:
  groups = found.duplicates
  if not groups:
    return ["Exact duplicates: none."]
  extra = sum(len(group) - 1 for group in groups)
  what = "repeats" if extra == 1 else "repeat"
  lines = [
    f"Exact duplicates: {counted(extra, 'image')} {what} another's content:"
  ]
  lines += [f"  {listing(group, 4)}" for group in groups[:5]]
  return lines + ["  ..."] * (len(groups) > 5)


def _leaks(train: Survey, test: Survey) -> str:
  pairs = train.shared_with(test)
  if not pairs:
    return "Leaks: no image of train is in the evaluation part."
  shown = [f"{a} = {b}" for a, b in pairs]
  return (
    f"Leaks: WARNING: {counted(len(pairs), 'image')} in both parts:"
    f" {listing(shown, 3)}"
  )


def _balance(found: Survey) -> list[str]:
  counts = found.class_counts
  if not counts:
    return []
  least, most = (f(counts, key=counts.__getitem__) for f in (min, max))
  if counts[least] == counts[most]:
    each = f"of {counted(counts[least], 'image')} each"
  else:
    each = (
      f"from {counted(counts[least], 'image')} ({least}) to"
      f" {counts[most]} ({most})"
    )
  return [f"Classes: {len(counts)}, {each}."]


def _statistics(found: Survey) -> list[str]:
  text = lambda values: (
    f"({', '.join(f'{v:.4f}' for v in values)}{',' * (len(values) == 1)})"
  )
  return [
    "Mean and std of each channel, for the recipe:",
    f'  --config.data.mean="{text(found.mean)}"'
    f' --config.data.std="{text(found.std)}"',
    "Smallest and largest value of each channel, as shares of the range:",
    f"  {text(found.least)} {text(found.most)}",
  ]


# --- Pictures -----------------------------------------------------------------


def views_of(source: Source, config: ConfigDict) -> np.ndarray:
  """Returns a picture of images, one a row, and of their views in training.

  The columns are the center as evaluation sees it, the two global views and
  the local ones, all without normalization.
  """
  count = min(NUM_IMAGES, source.num_examples)
  batches = host_pipeline.train_batches(
    source, views=config.views, batch_size=count, seed=config.seed
  )
  batch = next(batches)
  recipes = experiment_lib.augmentation(config)
  recipes = recipes._replace(mean=(0.0,), std=(1 / 255,))
  wanted = {name: batch[name] for name in ("views", "index", "epoch")}
  augmented = jax.jit(
    lambda batch: augment.augment_views(
      recipes, jax.random.key(config.seed), batch
    )
  )(jax.tree.map(jnp.asarray, wanted))
  columns = [view for group in augmented for view in np.asarray(group)]
  return _sheet([_centers(source, config, batch["index"]), *columns])


def _centers(
  source: Source, config: ConfigDict, indices: np.ndarray
) -> np.ndarray:
  """Returns the images as evaluation sees them, [n, crop, crop, C]."""
  chosen = np.unique(indices)
  batch = next(
    evaluation_batches.eval_batches(
      part.take(source, chosen),
      batch_size=len(chosen),
      resize=config.data.resize,
      crop=config.data.crop,
    )
  )
  return batch["image"][np.searchsorted(chosen, indices)]


def _sheet(columns: list[np.ndarray]) -> np.ndarray:
  """Returns one picture uint8 of columns [n, h, w, C] of pictures."""
  height = max(column.shape[1] for column in columns)
  strips = []
  for column in columns:
    count, own, width, channels = column.shape
    if channels != 3:
      column = column.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    padding = [(0, 0), (0, height - own + _GAP), (0, _GAP), (0, 0)]
    padded = np.pad(column, padding, constant_values=255)
    strips.append(padded.reshape(count * (height + _GAP), width + _GAP, 3))
  return np.clip(np.round(np.concatenate(strips, 1)), 0, 255).astype(np.uint8)


def write_page(
  output: str, picture: np.ndarray, lines: list[str], num_local: int = 0
) -> str:
  """Writes views.png and index.html, and returns the path of the latter."""
  local = f", then {counted(num_local, 'local one')}" if num_local else ""
  folder = pathlib.Path(output).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  with files.in_place_when_done(folder / "views.png") as unfinished:
    matplotlib.image.imsave(unfinished, picture, format="png")
  report = html.escape("\n".join(lines))
  text = (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    "<title>Data</title>"
    "<style>:root { color-scheme: light dark }"
    " body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem;"
    " margin: 2rem auto; padding: 0 1rem }"
    " pre { white-space: pre-wrap; overflow-wrap: anywhere }"
    " img { max-width: 100% }</style>"
    "<h1>Data of a recipe</h1>"
    f"<pre>{report}</pre>"
    "<p>Each row: an image as evaluation sees it, and its views in training:"
    f" two global ones{local}.</p>"
    '<img src="views.png" alt="Images and their views"></html>\n'
  )
  files.write_whole(folder / "index.html", text.encode())
  return str(folder / "index.html")
