"""Do other units on the same encoder mean as much as the variables?

  python -m docs.explain_rivals --workdir=runs/shapes

Writes docs/measurements/explain_rivals.json; `python docs/tables.py` makes the
tables of docs/explain.md of it. Takes several runs, too, whose images must be
drawn from factors. Every kind of unit is judged by the functions that `imsvd
explain` uses: names (captions.py), mutual information with factors
(information.py) and interventions (interventions.py).
"""

import argparse
import datetime
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from docs import sparse_autoencoder
from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import captions, run_subject
from imsvd_jax.explain.factors import Factor, known_factors, make_factor
from imsvd_jax.explain.images import Drawing
from imsvd_jax.explain.information import (
  contingency,
  normalized_mutual_information,
)
from imsvd_jax.explain.interventions import intervene
from imsvd_jax.runs.encoder import LoadedEncoder, data_settings, load_encoder

STORED = pathlib.Path(__file__).parent / "measurements" / "explain_rivals.json"
MAX_FLIP_IMAGES = 2048  # The default of `imsvd explain`.
MIN_IMAGES = 20  # Outside of a variable's largest bin, or it is constant.
# A sparse autoencoder's active units: the number of variables over these.
SPARSER = (1, 4, 8, 16)
WHOLE_IMAGE = "another image"
# A name that says at least one of these.
_BY_LABEL = re.compile(r"(^| and )(label|shape|texture) ")


class Outputs(NamedTuple):
  """What an encoder says of N images."""

  features: np.ndarray  # float32 [N, F].
  codes: np.ndarray  # int [N, M].


class Units(NamedTuple):
  """One way to make variables of an encoder's outputs."""

  title: str
  codes_of: Callable[[Outputs], np.ndarray]  # -> int [N, number of variables].
  num_bins: int
  # The first bins, which may have a name. Of a unit that is active or not only
  # "active": that most images lack something is no meaning.
  num_nameable: int
  # Of the features' variance, the share that a sparse autoencoder leaves over.
  unexplained: float | None = None


# --- The rivals ---------------------------------------------------------------


def rivals(
  own: Outputs,
  num_bins: int,
  seed: int,
  steps: int = sparse_autoencoder.STEPS,
) -> Iterator[Units]:
  """Yields the run's own variables, and other units of the same features.

  A sparse autoencoder has as many units as the code has bins in total. With as
  many active ones as the code has variables, both say the same number of things
  about an image; the others are sparser, down to a clustering.
  """
  num_variables = own.codes.shape[1]
  own_title = f"the run's own: {num_variables} variables of {num_bins} bins"
  yield Units(own_title, lambda x: x.codes, num_bins, num_bins)
  num_units = num_variables * num_bins
  for k in sorted({max(1, num_variables // n) for n in SPARSER}, reverse=True):
    weights = sparse_autoencoder.train(
      own.features, num_units, k, seed=seed, steps=steps
    )
    title = f"sparse autoencoder: {num_units} units, {k} active"
    yield _sparse(title, weights, k, own)
    if k == num_variables:
      yield _sparse_levels(title, weights, k, own, num_bins)
  numbers = lambda x: x.features
  yield _cut("features", numbers, own, num_bins)
  center = own.features.mean(axis=0)
  axes = np.linalg.svd(own.features - center, full_matrices=False)[2]
  axes = axes[:num_variables].T
  components = lambda x: (x.features - center) @ axes
  yield _cut("principal components", components, own, num_bins)


def _cut(
  name: str,
  numbers_of: Callable[[Outputs], np.ndarray],
  own: Outputs,
  num_bins: int,
) -> Units:
  """Returns units of numbers [N, n] that are cut into bins of equal share."""
  numbers = numbers_of(own)
  cut = quantiles(numbers, num_bins)
  title = f"{name}: {numbers.shape[1]} of {num_bins} quantiles"
  return Units(title, lambda x: cut(numbers_of(x)), num_bins, num_bins)


def _activity(
  weights: sparse_autoencoder.Autoencoder, k: int
) -> Callable[[Outputs], np.ndarray]:
  compiled = jax.jit(lambda x: sparse_autoencoder.activity(weights, x, k))
  return lambda x: np.asarray(compiled(x.features))


def _sparse(
  title: str, weights: sparse_autoencoder.Autoencoder, k: int, own: Outputs
) -> Units:
  """Returns units that are active (bin 0) or not."""
  activity = _activity(weights, k)
  is_idle = lambda x: (activity(x) == 0).astype(int)
  lost = sparse_autoencoder.unexplained(weights, own.features, k)
  return Units(title, is_idle, 2, 1, lost)


def _sparse_levels(
  title: str,
  weights: sparse_autoencoder.Autoencoder,
  k: int,
  own: Outputs,
  num_bins: int,
) -> Units:
  """Returns the same units by how active they are; the last bin: not at all."""
  activity = _activity(weights, k)
  known = activity(own)
  cut = quantiles(np.where(known > 0, known, np.nan), num_bins - 1)

  def levels(x: Outputs) -> np.ndarray:
    found = activity(x)
    return np.where(found > 0, cut(found), num_bins - 1)

  title += f", activity in {num_bins - 1} quantiles"
  return Units(title, levels, num_bins, num_bins - 1)


def quantiles(
  values: np.ndarray, num_bins: int
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a function that cuts columns [n, F] into bins of equal share.

  NaN does not count; a column without numbers has one bin.
  """
  inner = np.linspace(0, 1, num_bins + 1)[1:-1]
  edges = np.full((values.shape[1], num_bins - 1), np.inf)
  for row, column in zip(edges, values.T, strict=True):
    known = column[~np.isnan(column)]
    if len(known):
      row[:] = np.quantile(known, inner)
  cut = functools.partial(np.searchsorted, side="right")
  return lambda x: np.stack(list(map(cut, edges, x.T)), axis=1)


# --- The tests ----------------------------------------------------------------


def judge(
  units: Units,
  own: Outputs,
  factors: Sequence[Factor],
  facts: Sequence[Factor],
  drawing: Drawing,
) -> dict[str, Any]:
  """Returns what the three tests find.

  Args:
    own: Outputs of all images.
    factors: What is known of the images.
    facts: What pixels tell of them.
    drawing: Draws the outputs, not the images, of rows of factors.
  """
  codes = units.codes_of(own)
  names = captions.name_bins(
    codes, units.num_nameable, [*factors, *facts], np.arange(len(codes))
  )
  return {
    "title": units.title,
    "unexplained": units.unexplained and round(units.unexplained, 4),
    "variables": codes.shape[1],
    "used": names.num_used,
    "named": len(names.confirmed),
    "named_by_label": sum(
      bool(_BY_LABEL.search(name.text)) for name in names.confirmed
    ),
    "nmi": {f.name: round(_best(codes, units.num_bins, f), 3) for f in factors},
    "flips": _flips(units, codes, drawing),
  }


def _best(codes: np.ndarray, num_bins: int, factor: Factor) -> float:
  """Returns the mutual information of the best variable with a factor."""
  return max(
    normalized_mutual_information(
      contingency(column, factor.values, num_bins, len(factor.names))
    )
    for column in codes.T
  )


def _flips(
  units: Units, codes: np.ndarray, drawing: Drawing
) -> dict[str, dict[str, Any]]:
  """Returns the selectivity for each factor, and for all of them together.

  A variable that flips more often than others, whatever changes, has a ratio
  above 1 for every factor, and for another image altogether.
  """
  varies = np.array(
    [len(c) - np.bincount(c).max() >= MIN_IMAGES for c in codes.T]
  )
  found = {}
  whole = [WHOLE_IMAGE] * len(drawing.names)
  for names in (drawing.names, whole):
    result = intervene(
      lambda x: units.codes_of(x)[:, varies],
      drawing.draw,
      drawing.factors,
      names,
    )
    for one in result.selectivity:
      number = int(np.flatnonzero(varies)[one.variable])
      shares = ("flips", "others", "ratio", "low", "high")
      rounded = {name: round(getattr(one, name), 3) for name in shares}
      found[one.factor] = {"variable": number} | rounded
  return found


# --- A run --------------------------------------------------------------------


def study(workdir: str, seed: int) -> Iterator[dict[str, Any]]:
  """Yields a row for each kind of unit; of seed 0 on random weights, too."""
  encoder = load_encoder(workdir)
  settings = data_settings(encoder.config)
  source = data.make_source(settings, "train")
  images = run_subject.images_of(
    source, settings, encoder.config, batch_size=256
  )
  if images.drawing is None:
    raise UserError(
      f"The images of {workdir} are not drawn from factors, so that none can be"
      " changed alone. Give a run on `shapes`."
    )
  indices = np.arange(source.num_examples)
  factors = known_factors(
    indices, source.labels, images.factors, images.label_names
  )
  pixels = captions.pixel_facts(source.images)
  facts = [make_factor(name, values) for name, values in pixels.items()]
  encoders = {"trained": encoder}
  if seed == 0:
    subject = run_subject.subject_of(encoder, workdir)
    random = run_subject.untrained_subject(subject, encoder).variables
    encoders["random"] = LoadedEncoder(encoder.config, random, step=0)
  for weights, one in encoders.items():
    own = outputs_of(one, source.images)
    drawing = drawn_outputs(one, images.drawing)
    for units in rivals(own, num_bins_of(encoder), seed):
      found = judge(units, own, factors, facts, drawing)
      yield {"seed": encoder.config.seed, "weights": weights} | found


def num_bins_of(encoder: LoadedEncoder) -> int:
  """Returns the number of bins of each variable."""
  objective = encoder.config.objective
  return objective[objective.name].num_bins


def outputs_of(encoder: LoadedEncoder, pixels: np.ndarray) -> Outputs:
  """Returns features and codes of images."""
  return Outputs(*encoder.features_and_codes(pixels))


def drawn_outputs(encoder: LoadedEncoder, drawing: Drawing) -> Drawing:
  """Returns a drawing of outputs, which encodes the same factors only once."""
  known: dict[bytes, Outputs] = {}

  def draw(factors: np.ndarray) -> Outputs:
    key = factors.tobytes()
    if key not in known:
      known[key] = outputs_of(encoder, drawing.draw(factors))
    return known[key]

  return Drawing(draw, drawing.factors[:MAX_FLIP_IMAGES], drawing.names)


def write(rows: Sequence[dict[str, Any]], workdirs: Sequence[str]) -> None:
  """Stores rows, a line for each."""
  names = " ".join(f"runs/{pathlib.Path(path).name}" for path in workdirs)
  head = {
    "command": f"python -m docs.explain_rivals --workdir {names}",
    "date": datetime.date.today().isoformat(),
    "versions": f"jax {jax.__version__}",
  }
  lines = ",\n".join(map(json.dumps, rows))
  STORED.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n')


def main() -> None:
  """Writes what is found of all runs."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", nargs="+", required=True)
  workdirs = parser.parse_args().workdir
  rows = []
  for seed, workdir in enumerate(workdirs):
    for row in study(workdir, seed):
      rows.append(row)
      print(json.dumps(row), flush=True)
  write(rows, workdirs)


if __name__ == "__main__":
  main()
