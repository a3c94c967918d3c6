"""How a program ends early, and look-ups with helpful messages.

Exit codes:

2    user error: config, data, disk (one line says what)
3    the numbers went wrong: too many non-finite updates
4    in a run of several processes, this one or a peer failed or did not join;
     or the storage did not answer in time
75   SIGTERM or SIGINT: saved; the same command resumes
130  a second SIGINT: ended at once, nothing saved
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


EXIT_NOT_FINITE = 3
EXIT_SAVED = 75  # EX_TEMPFAIL: worth another try.
EXIT_AT_ONCE = 130


class Stopped(SystemExit):
  """The run ended early and in order; `code` says why."""


class UserError(ValueError):
  """A mistake in the input: command lines print it as one line and exit 2.

  The message says what was found, what was expected and what to do.
  """

  exit_code = 2


class PeerError(UserError):
  """Another process of the run did not join: one line and exit code 4.

  Unlike a mistake in the input it may pass, so launchers try again.
  """

  exit_code = 4


class Damage(Exception):
  """What was read cannot be trusted; another copy may be good."""


def suggestion(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean 'x'?" for a near miss, else an empty string."""
  close = difflib.get_close_matches(name, list(known), n=1)
  return f" Did you mean {close[0]!r}?" if close else ""


def pair(name: str, value: Any) -> tuple[float, float]:
  """Returns a range as two numbers.

  Args:
    name: The key in the config, for the message.
    value: Its value.

  Raises:
    UserError: They are not two numbers.
  """
  numbers = list(value) if isinstance(value, list | tuple) else [value]
  if len(numbers) != 2 or not all(isinstance(n, int | float) for n in numbers):
    raise UserError(
      f"{name} is {value!r}; expected two numbers, smallest and largest, such"
      ' as "(0.1,1.0)".'
    )
  return numbers[0], numbers[1]


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
  """Returns `registry[name]`.

  Args:
    registry: Known entries by name.
    name: The entry to find.
    kind: What the registry holds, for the message ("objective", "source").

  Raises:
    UserError: The name is unknown; the message lists the known ones.
  """
  if name not in registry:
    known = ", ".join(sorted(registry))
    raise UserError(
      f"Unknown {kind} {name!r}.{suggestion(name, registry)} Known: {known}."
    )
  return registry[name]


def counted(count: int, noun: str) -> str:
  """Returns "1 image", or "2 images"."""
  return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listing(names: Sequence[str], limit: int = 5) -> str:
  """Returns "a; b; c", and how many more there are beyond the limit."""
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return "; ".join(names[:limit]) + more
