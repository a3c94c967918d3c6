"""The lines of metrics.jsonl: one JSON object per step, and their check.

JSON has no NaN and no infinity: such a number is null, and "not_finite" lists
its name. Every checkpoint records how many lines came before it, and their
digest, so that a resumed run notices a line that is missing or has changed.
"""

import hashlib
import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

_NOT_FINITE = "not_finite"
# What is words, for people; `verdict.judge` makes them of the numbers.
_WORDS = (_NOT_FINITE, "verdict", "why", "advice")
_BYTES = "surrogateescape"  # Lines of a damaged file may not be UTF-8.


class Mark(NamedTuple):
  """What a checkpoint records about the lines before it.

  Attributes:
    lines: How many there are.
    sha256: Their digest.
  """

  lines: int
  sha256: str

  def matches(self, lines: Sequence[str]) -> bool:
    """Returns whether the first lines are those of the checkpoint."""
    start = lines[: self.lines]
    return len(start) == self.lines and digest(start) == self.sha256


def digest(lines: Sequence[str]) -> str:
  """Returns the SHA-256 of lines."""
  return hashlib.sha256("".join(lines).encode(errors=_BYTES)).hexdigest()


def encode(
  step: int,
  scalars: Mapping[str, float],
  words: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
  """Returns a line of numbers, and of words, which `decode` leaves out."""
  wrong = [name for name, value in scalars.items() if not math.isfinite(value)]
  line = {"step": step, **words, **scalars, **dict.fromkeys(wrong)}
  if wrong:
    line[_NOT_FINITE] = wrong
  return json.dumps(line, allow_nan=False) + "\n"


def decode(line: str) -> dict[str, float] | None:
  """Returns the numbers of a line; None if it is not a line of a run."""
  try:
    found: Any = json.loads(line) if line.isascii() else None
    for name in _WORDS:
      found.pop(name, None)
    step = found.pop("step")
    numbers = {k: math.nan if v is None else float(v) for k, v in found.items()}
  except (ArithmeticError, AttributeError, LookupError, RecursionError):
    return None
  except (TypeError, ValueError):
    return None
  is_step = type(step) is int and 0 <= step < 2**53
  return {"step": step, **numbers} if is_step else None


def split(content: bytes) -> list[str]:
  """Returns the lines, each with its end; without one that a kill cut short."""
  text = content.decode(errors=_BYTES)
  return [f"{line}\n" for line in text.split("\n")[:-1]]


class Kept(NamedTuple):
  """The lines with which a run continues.

  Attributes:
    lines: Those up to the checkpoint.
    final: Those of the final evaluation at the checkpoint, if it is the last.
    complaint: What is wrong with the file, in words; "" if nothing is.
  """

  lines: list[str]
  final: list[str]
  complaint: str


def keep(lines: Sequence[str], step: int, marks: Sequence[Mark]) -> Kept:
  """Divides the lines of a file into those to keep and those to drop.

  Args:
    lines: From `split`.
    step: The step that the run continues from. Later lines are dropped, to be
      written again. From step 0 all are.
    marks: Of the checkpoints up to the step, oldest first; empty if they are
      unknown.
  """
  if step == 0:
    return Kept([], [], "")
  good = max((m.lines for m in marks if m.matches(lines)), default=0)
  kept, final, foreign = dict.fromkeys(lines[:good]), [], 0
  for line in lines[good:]:
    numbers = decode(line)
    if numbers is None or line in kept:
      foreign += 1
    elif any(name.startswith("final_") for name in numbers):
      final += [line] if numbers["step"] == step else []
    elif numbers["step"] <= step:
      kept[line] = None
  found = list(kept)
  expected = marks[-1] if marks else Mark(len(found), digest(found))
  if expected.matches(found):
    foreign += len(found) - expected.lines
    found = found[: expected.lines]
  complaint = _complaint(step, found, foreign, expected, lines[:good])
  return Kept(found, final, complaint)


def _complaint(
  step: int,
  kept: Sequence[str],
  foreign: int,
  expected: Mark,
  good: Sequence[str],
) -> str:
  """Returns what is wrong with the lines up to a checkpoint; "" if nothing."""
  problems = []
  if not expected.matches(kept):
    missing = max(0, expected.lines - len(kept))
    problems.append(
      f"of the {expected.lines} lines up to step {step},"
      f" {f'{missing} are missing' if missing else 'at least one has changed'},"
      f" after step {_last_step(good)}"
    )
  if foreign:
    problems.append(f"{foreign} lines are doubled or unreadable")
  if not problems:
    return ""
  last = f", the last one of step {_last_step(kept)}" if kept else ""
  return f"{'; '.join(problems)}; {len(kept)} lines are kept{last}"


def _last_step(lines: Sequence[str]) -> int:
  numbers = decode(lines[-1]) if lines else None
  return int(numbers["step"]) if numbers else 0
