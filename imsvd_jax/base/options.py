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
) -> Any:
  """Returns a field of a dataclass of options; its name is the flag's.

  Args:
    help_text: What --help says.
    choices: The values that a string may have, if not any.
    lower_bound: The least value of a number.
    repeated: For a tuple of strings: one flag per value, not a list with
      commas.
  """
  metadata = {
    "help": help_text,
    "choices": choices,
    "lower_bound": lower_bound,
    "repeated": repeated,
  }
  return dataclasses.field(default=default, metadata=metadata)


# `runs.ownership` says when it is needed.
TRUST_WORKDIR = option(
  False,
  "Read the data that the run's recipe names, though the run is not signed as"
  " yours.",
)
