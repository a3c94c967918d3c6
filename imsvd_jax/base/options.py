"""Options of a command as one dataclass, from which its flags are made."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(
  default: Any,
  help_text: str,
  *,
  choices: Sequence[str] = (),
  lower_bound: int | None = None,
  repeated: bool = False,
  form: tuple[str, str] | None = None,
) -> Any:
  """Returns a field of a dataclass of options; its name is the flag's.

  Args:
    help_text: What --help says.
    choices: The values that a string may have, if not any.
    lower_bound: The least value of a number.
    repeated: For a tuple of strings: one flag per value, not a list with
      commas.
    form: Pattern that a string matches, and what it is in words.
  """
  metadata = {
    "help": help_text,
    "choices": choices,
    "lower_bound": lower_bound,
    "repeated": repeated,
    "form": form,
  }
  return dataclasses.field(default=default, metadata=metadata)


STEP = option(
  None,
  "Which checkpoint: a step, or best (docs/learning.md); the newest by"
  " default.",
  form=("[0-9]+|best", "a non-negative integer or best"),
)
# `runs.ownership` says when it is needed.
TRUST_WORKDIR = option(
  False,
  "Read the data that the run's recipe names, though the run is not signed as"
  " yours.",
)
