"""Names for bins: what is known of their images, chosen and then confirmed.

For each bin a proposition such as "shape star and size 0.38 to 0.42" is chosen
on one half of the images, and tested on the other half, which had no part in
the choice. A bin whose proposition fails the test has no name.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from imsvd_jax.base import hashing
from imsvd_jax.explain.factors import Factor

MIN_PRECISION = 0.5
MIN_LIFT = 1.5
MAX_P_VALUE = 0.01  # Corrected for the number of tries.
_MIN_IMAGES = 10  # Of a bin or a proposition in each half.
_MAX_PROPOSITIONS = 2000  # Single ones, the most common first.


class Caption(NamedTuple):
  """A confirmed name of a bin, with numbers of the confirming half."""

  variable: int
  bin: int
  text: str
  images: int  # Of the bin.
  precision: float  # Share of the bin's images of which the text is true.
  recall: float  # Share of these images that are in the bin.
  lift: float  # Precision over the share among all images.
  p_value: float  # Of the hypergeometric test, times the number of tries.


class Captions(NamedTuple):
  """The names that were found, and how many bins could have had one."""

  confirmed: tuple[Caption, ...]
  num_used: int  # Bins of at least ten images in each half.

  def line(self) -> str:
    """Returns a sentence for the log."""
    share = len(self.confirmed) / max(self.num_used, 1)
    return (
      f"Names: {len(self.confirmed)} of {self.num_used} bins ({share:.0%}) have"
      " one that the other half of the images confirms."
    )

  def table(self) -> str:
    """Returns the names as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Caption._fields)
    for caption in self.confirmed:
      rounded = [f"{x:.4g}" if isinstance(x, float) else x for x in caption]
      writer.writerow(rounded)
    return file.getvalue()


class _Propositions(NamedTuple):
  """Statements about images, each true or false of every image."""

  texts: list[str]
  factors: np.ndarray  # [P], the factor that each one is about.
  true: np.ndarray  # float32 [N, P], 1 where true.
  both: np.ndarray  # [P, P], images of the first half of which two are true.


def name_bins(
  codes: np.ndarray,
  num_bins: int,
  factors: Sequence[Factor],
  indices: np.ndarray,
) -> Captions:
  """Returns the confirmed names of bins.

  Args:
    codes: [N, M], the bin of each variable.
    num_bins: b.
    factors: What is known of the images, each of N values.
    indices: int64 [N], numbers of the images, which split them in halves.
  """
  half = hashing.mix(indices.astype(np.uint64)) % np.uint64(2) == 0
  facts = _propositions(factors, half)
  if not facts.texts:
    return Captions((), 0)
  confirmed = []
  used = [
    (m, d)
    for m, column in enumerate(codes.T)
    for d in range(num_bins)
    if min(np.bincount(half[column == d], minlength=2)) >= _MIN_IMAGES
  ]
  # One proposition, and each with a second one: of every bin.
  num_tries = 2 * len(facts.texts) * len(used)
  for m, d in used:
    member = codes[:, m] == d
    text, is_true = _chosen(facts, half, member)
    caption = _tested(m, d, text, member[~half], is_true[~half], num_tries)
    if caption is not None:
      confirmed.append(caption)
  return Captions(tuple(confirmed), len(used))


def _propositions(factors: Sequence[Factor], half: np.ndarray) -> _Propositions:
  """Returns every value of every factor, and every range of ordered ones."""
  texts, owners, columns = [], [], []
  for number, factor in enumerate(factors):
    for first, last in _ranges(factor):
      is_true = (factor.values >= first) & (factor.values <= last)
      if min(is_true[half].sum(), (~is_true)[half].sum()) >= _MIN_IMAGES:
        texts.append(f"{factor.name} {_range_name(factor, first, last)}")
        owners.append(number)
        columns.append(is_true)
  order = np.argsort([-c.sum() for c in columns], kind="stable")
  order = order[:_MAX_PROPOSITIONS]
  true: np.ndarray = np.zeros((len(half), len(order)), np.float32)
  for place, number in enumerate(order):
    true[:, place] = columns[number]
  return _Propositions(
    [texts[number] for number in order],
    np.array(owners, int)[order],
    true,
    true[half].T @ true[half],
  )


def _ranges(factor: Factor) -> Iterable[tuple[int, int]]:
  count = len(factor.names)
  if not factor.ordered:
    return [(k, k) for k in range(count)]
  return [(i, j) for i in range(count) for j in range(i, count)]


def _range_name(factor: Factor, first: int, last: int) -> str:
  if first == last:
    return factor.names[first]
  low = factor.names[first].partition(" to ")[0]
  return f"{low} to {factor.names[last].rpartition(' to ')[2]}"


def _chosen(
  facts: _Propositions, half: np.ndarray, member: np.ndarray
) -> tuple[str, np.ndarray]:
  """Returns the proposition that tells most of a bin, on the first half.

  One, or two about different factors if both together tell more.

  Args:
    facts: All propositions.
    half: bool [N], the first half.
    member: bool [N], the images of the bin.
  """
  count = int(half.sum())
  inside = facts.true[member & half]
  size = len(inside)
  scores = _information(inside.sum(axis=0), facts.both.diagonal(), size, count)
  best = int(scores.argmax())
  hits = inside[inside[:, best] > 0].sum(axis=0)
  pair_scores = _information(hits, facts.both[best], size, count)
  pair_scores[facts.factors == facts.factors[best]] = -1
  second = int(pair_scores.argmax())
  if pair_scores[second] <= scores[best]:
    return facts.texts[best], facts.true[:, best] > 0
  return (
    f"{facts.texts[best]} and {facts.texts[second]}",
    facts.true[:, best] * facts.true[:, second] > 0,
  )


def _information(
  hits: np.ndarray, all_true: np.ndarray, inside: int, count: int
) -> np.ndarray:
  """Returns [P], the mutual information of propositions with a bin, in nats.

  Negative for those that are more often false of the bin than of others: their
  negation is no name.

  Args:
    hits: [P], images of the bin of which each one is true.
    all_true: [P], images of which it is true.
    inside: Images of the bin.
    count: All images.
  """
  cells = np.stack(
    [hits, inside - hits, all_true - hits, count - inside - all_true + hits]
  )
  rows = np.array([inside, inside, count - inside, count - inside])[:, None]
  columns = np.stack([all_true, count - all_true] * 2)
  independent = rows * columns / count
  ratio = np.maximum(cells, 1e-9) / np.maximum(independent, 1e-9)
  found = (cells * np.log(ratio)).sum(axis=0) / count
  return np.where(hits > independent[0], found, -found)


def _tested(
  variable: int,
  d: int,
  text: str,
  member: np.ndarray,
  is_true: np.ndarray,
  num_tries: int,
) -> Caption | None:
  """Returns the caption if the second half confirms it."""
  hits = int((member & is_true).sum())
  images, all_true = int(member.sum()), int(is_true.sum())
  if not hits:
    return None
  precision = hits / images
  lift = precision * len(member) / all_true
  chance = stats.hypergeom.sf(hits - 1, len(member), all_true, images)
  p_value = min(1.0, float(chance) * num_tries)
  if precision < MIN_PRECISION or lift < MIN_LIFT or p_value > MAX_P_VALUE:
    return None
  recall = hits / all_true
  return Caption(variable, d, text, images, precision, recall, lift, p_value)


# --- What pixels tell ---------------------------------------------------------


def pixel_facts(images: np.ndarray) -> dict[str, np.ndarray]:
  """Returns statistics [B] of images [B, H, W, C] of levels 0 to 255, by name.

  Color: brightness, and the share of red, green and blue where there are three
  channels; texture: contrast (standard deviation) and edges (mean difference of
  neighbors); position: the center of what differs from the border.
  """
  levels = images.astype(np.float32) / 255
  gray = levels.mean(axis=-1)
  found = {"brightness": gray.mean((1, 2)), "contrast": gray.std((1, 2))}
  edges = np.abs(np.diff(gray, axis=1)).mean((1, 2))
  found["edges"] = edges + np.abs(np.diff(gray, axis=2)).mean((1, 2))
  if levels.shape[-1] == 3:
    total = np.maximum(levels.sum((1, 2, 3)), 1e-6)
    for channel, name in enumerate(("red", "green", "blue")):
      found[f"share of {name}"] = levels[..., channel].sum((1, 2)) / total
  border = np.median(
    np.concatenate(
      [levels[:, 0], levels[:, -1], levels[:, :, 0], levels[:, :, -1]], 1
    ),
    axis=1,
  )
  weight = np.abs(levels - border[:, None, None]).sum(-1) + 1e-6
  found["size of the object"] = (weight > 0.15 * levels.shape[-1]).mean((1, 2))
  for axis, name in ((2, "x"), (1, "y")):
    place = (np.arange(weight.shape[axis]) + 0.5) / weight.shape[axis]
    along = weight.sum(3 - axis)
    found[f"{name} of the object"] = along @ place / along.sum(1)
  return found
