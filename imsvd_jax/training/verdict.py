"""Is the run learning? A verdict in words, from label-free numbers alone.

Pure functions of the lines of metrics.jsonl: those of steps, which have a
"loss", and those of online evaluations, whose names begin with "online/".
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Line = Mapping[str, float]

WARMING_UP = "warming up"
TOO_SHORT = "too short to judge"  # Of a run that has ended.
LEARNING = "learning"
SLOWING = "slowing"
CONVERGED = "converged"
COLLAPSING = "collapsing"
DIVERGED = "diverged"
STATES = (WARMING_UP, LEARNING, SLOWING, CONVERGED, COLLAPSING, DIVERGED)

LABEL_FREE = "label_free"
# What `checkpoint.keep_best_by` may name, and the number that it stands for.
SCORES = {
  LABEL_FREE: "",
  "online/knn": "online/knn",
  "online/linear": "online/linear",
}

_RANK = "online/collapse/rank_me/embeddings"
_ALIGNMENT = "online/collapse/alignment"
_UNIFORMITY = "online/collapse/uniformity"
_KAPPA = "online/collapse/codes/kappa"

MIN_STEPS = 50  # Before, a random network may look collapsed.
_MIN_LINES = 10  # Logged steps, after which the loss has a trend.
_SLOWING = 0.06  # Share of all that the loss moved, in the last fifth.
_CONVERGED = 0.02
_CLEAR = 8.0  # Pure noise has about 3.
# Measured on digits with random ResNets and projectors (a last layer without
# bias after BatchNorm and ReLU): embedding_std 0.80-0.82, information 0.02
# at b = 16 (it goes as 1 / log b), marginal entropy 0.99. A run well below its
# own random start has lost what an untrained network gives for nothing.
_LEAST_STD = 0.05  # Mean cosine between different images above 0.9975.
_LEAST_MARGINAL_ENTROPY = 0.5  # A variable in sqrt(b) of its b bins.
_LEAST_INFORMATION = 0.005  # At b = 80: 0.02 nats about the image.
_DEAD_BINS = 0.5
_LEAST_RANK = 2.5  # Dimensions of the embedding in use.
_MOST_ALIGNMENT = 1.6  # Of views of one image; unrelated images have 2.
# Minus uniformity, as a share of its best while views agreed at least halfway.
# No good run of docs/learning.md's study kept less than 0.71, twice in a row.
_LEAST_SPREAD = 0.5
_CLEAR_SPREAD = 0.5  # Best below it: there was nothing to lose.
_LEAST_KAPPA = 0.02  # Agreement of two views beyond chance.
_BLOW_UP = 10.0  # Of the loss beyond its start, in ranges of the loss so far.


class Verdict(NamedTuple):
  """What a run does, why one thinks so, and what to try.

  Attributes:
    state: One of `STATES`.
    kind: Of a collapse: "constant", "dead bins", "dimensional" or "views
      disagree"; else "".
    numbers: Those that led to it.
    advice: What to try, or "".
  """

  state: str
  kind: str
  numbers: dict[str, float]
  advice: str

  @property
  def is_bad(self) -> bool:
    """Whether the run has failed, so far."""
    return self.state in (COLLAPSING, DIVERGED)

  @property
  def name(self) -> str:
    """The state, with the kind of a collapse."""
    return f"{self.state} ({self.kind})" if self.kind else self.state

  @property
  def why(self) -> str:
    """The numbers in words."""
    return ", ".join(f"{k} {v:.3g}" for k, v in self.numbers.items())

  def __str__(self) -> str:
    advice = f" {self.advice}" if self.advice else ""
    return f"{self.name} [{self.why}]{advice}"


def judge(lines: Sequence[Line]) -> Verdict | None:
  """Returns the verdict on a run; None where it has logged no step.

  Args:
    lines: The numbers of metrics.jsonl so far, oldest first.
  """
  steps = [line for line in lines if "loss" in line]
  if not steps:
    return None
  return _diverged(steps) or _collapsing(lines, steps) or _progress(steps)


def at_end(found: Verdict) -> Verdict:
  """Returns the verdict on a run that has ended: it no longer warms up."""
  if found.state != WARMING_UP or found.advice:
    return found
  advice = (
    f"That needs {MIN_STEPS} steps and {_MIN_LINES} logged ones"
    " (log.every_steps)."
  )
  return found._replace(state=TOO_SHORT, advice=advice)


def score(lines: Sequence[Line]) -> float | None:
  """Returns the label-free score of the latest state; larger is better.

  Spread less distance: minus uniformity minus twice the alignment of the
  embeddings (docs/learning.md). None where they were not measured, and of a
  state that collapses or diverges.
  """
  alignment = _latest(lines, _ALIGNMENT)
  uniformity = _latest(lines, _UNIFORMITY)
  verdict = judge(lines)
  if alignment is None or uniformity is None or verdict is None:
    return None
  return None if verdict.is_bad else -uniformity - 2 * alignment


def scores(lines: Sequence[Line]) -> dict[str, float]:
  """Returns the scores of the latest state, by their names in `SCORES`."""
  found = {
    name: _latest(lines, number) if number else score(lines)
    for name, number in SCORES.items()
  }
  return {
    name: value
    for name, value in found.items()
    if value is not None and math.isfinite(value)
  }


def _latest(lines: Sequence[Line], name: str) -> float | None:
  """Returns a number of the latest step, if it has been measured there."""
  last = lines[-1]["step"] if lines else None
  for line in reversed(lines):
    if line["step"] != last:
      return None
    if name in line:
      return line[name]
  return None


def _recent(lines: Sequence[Line], name: str) -> float | None:
  """Returns the newest value of a number, of whatever step."""
  return next((line[name] for line in reversed(lines) if name in line), None)


# --- Divergence ---------------------------------------------------------------


def _diverged(steps: Sequence[Line]) -> Verdict | None:
  last = steps[-1]
  numbers = {"loss": last["loss"]}
  if "gradient_norm" in last:
    numbers["gradient norm"] = last["gradient_norm"]
  if "skipped" in last:
    numbers["skipped updates"] = last["skipped"]
  if math.isfinite(last["loss"]) and not _blew_up([x["loss"] for x in steps]):
    return None
  return Verdict(
    DIVERGED,
    "",
    numbers,
    "Try a third of optimizer.base_learning_rate, or a longer"
    " optimizer.warmup_epochs.",
  )


def _blew_up(losses: Sequence[float]) -> bool:
  """Returns whether the last losses are far above all that came before."""
  before = [x for x in losses[:-2] if math.isfinite(x)]
  if len(before) < 3:
    return False
  scale = max(max(before) - min(before), 0.05 * abs(before[0]))
  return min(losses[-2:]) > before[0] + _BLOW_UP * max(scale, 0.1)


# --- Collapse -----------------------------------------------------------------


def _collapsing(lines: Sequence[Line], steps: Sequence[Line]) -> Verdict | None:
  if steps[-1]["step"] < MIN_STEPS:
    return None
  found = _collapsed_batch(steps[-1])
  # Embeddings of a network that has hardly begun to learn prove nothing.
  return found if found or _is_rising(steps) else _collapsed_space(lines)


def _is_rising(steps: Sequence[Line]) -> bool:
  """Returns whether the learning rate warms up."""
  rates = [x["learning_rate"] for x in steps[-2:] if "learning_rate" in x]
  return len(rates) == 2 and rates[1] > rates[0]


def _collapsed_batch(last: Line) -> Verdict | None:
  """Judges the diagnostics of a training step."""
  std = last.get("embedding_std", 1.0)
  marginal = last.get("marginal_entropy_mean", 1.0)
  information = last.get("information", 1.0)
  dead = last.get("dead_bins", 0.0)
  if std < _LEAST_STD:
    numbers = {"embedding std": std}
  elif marginal < _LEAST_MARGINAL_ENTROPY or dead > _DEAD_BINS:
    return Verdict(
      COLLAPSING,
      "dead bins",
      {"marginal entropy / log b": marginal, "dead bins": dead},
      "Try fewer bins, a larger diagonal_weight or a lower"
      " optimizer.base_learning_rate.",
    )
  elif information < _LEAST_INFORMATION:
    numbers = {"information / log b": information}
    numbers["largest probability"] = last.get("max_probability", math.nan)
  else:
    return None
  return Verdict(
    COLLAPSING,
    "constant",
    numbers,
    "Every image gets the same embedding. Try a lower"
    " optimizer.base_learning_rate, a larger batch_size, or a larger weight of"
    " the term that spreads the embeddings.",
  )


def _collapsed_space(lines: Sequence[Line]) -> Verdict | None:
  """Judges the latest online evaluation."""
  rank, start = (
    _recent(lines, _RANK),
    next((line[_RANK] for line in lines if _RANK in line), None),
  )
  if rank is not None and start is not None and rank < min(_LEAST_RANK, start):
    return Verdict(
      COLLAPSING,
      "dimensional",
      {"RankMe of embeddings": rank, "at the start": start},
      "The embedding uses few of its dimensions. Try a larger weight of the"
      " term that makes them independent, or a lower"
      " optimizer.base_learning_rate.",
    )
  spread = [
    -line[_UNIFORMITY]
    for line in lines
    if line.get(_ALIGNMENT, 2.0) <= 1.0 and _UNIFORMITY in line
  ]
  best = max(spread, default=0.0)
  # Twice in a row: a high rate can throw a good run back once.
  if best > _CLEAR_SPREAD and max(spread[-2:]) < _LEAST_SPREAD * best:
    return Verdict(
      COLLAPSING,
      "constant",
      {"uniformity": -spread[-1], "at best": -best},
      "Embeddings of different images come closer and closer. Try a larger"
      " weight of the term that spreads the embeddings.",
    )
  alignment, kappa = _recent(lines, _ALIGNMENT), _recent(lines, _KAPPA)
  numbers = {}
  if alignment is not None and alignment > _MOST_ALIGNMENT:
    numbers["distance of views"] = alignment
  if kappa is not None and kappa < _LEAST_KAPPA:
    numbers["agreement beyond chance"] = kappa
  if not numbers:
    return None
  return Verdict(
    COLLAPSING,
    "views disagree",
    numbers,
    "Two views of an image have nothing in common. Try a larger"
    " invariance_weight, or weaker augmentation (views.*.crop_scale).",
  )


# --- Progress -----------------------------------------------------------------


def _progress(steps: Sequence[Line]) -> Verdict:
  losses = [line["loss"] for line in steps]
  numbers = {"loss": losses[-1]}
  is_early = len(losses) < _MIN_LINES or steps[-1]["step"] < MIN_STEPS
  if is_early or _is_rising(steps):
    return Verdict(WARMING_UP, "", numbers, "")
  moved, signal = trend(losses)
  numbers["moved in the last fifth"] = moved
  if signal < _CLEAR:
    advice = (
      "The loss has hardly moved: try three times optimizer.base_learning_rate."
    )
    return Verdict(WARMING_UP, "", numbers, advice)
  if moved > _SLOWING:
    return Verdict(LEARNING, "", numbers, "")
  if moved > _CONVERGED:
    return Verdict(SLOWING, "", numbers, "The end is near.")
  return Verdict(
    CONVERGED,
    "",
    numbers,
    "More steps at this learning rate change little.",
  )


def trend(values: Sequence[float]) -> tuple[float, float]:
  """Returns how much of its way a series went lately, and how clear its way is.

  Args:
    values: At least five.

  Returns:
    The distance between the medians of the last fifth and the fifth before, as
    a share of the range of the start and the medians of all fifths; and the way
    in standard errors, of which pure noise goes about 3.
  """
  values = [x for x in values if math.isfinite(x)]
  size = max(1, len(values) // 5)
  ends = range(len(values) - 4 * size, len(values) + 1, size)
  medians = [statistics.median(values[max(0, e - size) : e]) for e in ends]
  start = statistics.median(values[:3])
  extent = max(*medians, start) - min(*medians, start)
  if extent == 0:
    return 0.0, 0.0
  moved = abs(medians[-1] - medians[-2]) / extent
  changes = [abs(b - a) for a, b in itertools.pairwise(values)]
  noise = statistics.median(changes)  # Of one value.
  if noise == 0:
    return moved, math.inf
  way = max(medians) - min(medians)
  jump = abs(start - medians[0])
  return moved, max(way / noise * math.sqrt(size), jump / noise)
