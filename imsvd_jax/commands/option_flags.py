"""Flags from a dataclass of options, so that no option is written twice."""

import dataclasses
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from absl import flags

from imsvd_jax.base.errors import UserError

Options = TypeVar("Options")


def define_flags(
  options: type[Options], flag_values: flags.FlagValues = flags.FLAGS
) -> Callable[[], Options]:
  """Defines one flag per field of a dataclass.

  Args:
    options: A dataclass whose fields are made by `base.options.option` and
      have one of the types str, bool, int, float, tuple[str, ...] and
      tuple[int, ...], or one of them and None.
    flag_values: Where the flags are defined.

  Returns:
    A function that returns the options once the flags are parsed.
  """
  hints = typing.get_type_hints(options)
  for field in dataclasses.fields(options):  # type: ignore[arg-type]
    _define_flag(field, _without_none(hints[field.name]), flag_values)

  def parsed() -> Options:
    return options(
      **{
        name: _parsed_value(name, _without_none(hint), flag_values[name].value)
        for name, hint in hints.items()
      }
    )

  return parsed


def _define_flag(
  field: dataclasses.Field, hint: Any, flag_values: flags.FlagValues
) -> None:
  default: Any = field.default
  how = field.metadata
  arguments = (field.name, default, how["help"])
  if how["choices"]:
    flags.DEFINE_enum(
      field.name, default, how["choices"], how["help"], flag_values
    )
  elif how["form"]:
    parser = _Form(*how["form"])
    flags.DEFINE(parser, *arguments, flag_values=flag_values)
  elif typing.get_origin(hint) is tuple:
    define = flags.DEFINE_multi_string if how["repeated"] else flags.DEFINE_list
    values = None if default is None else [str(value) for value in default]
    define(field.name, values, how["help"], flag_values=flag_values)
  elif hint in (int, float):
    define = flags.DEFINE_integer if hint is int else flags.DEFINE_float
    define(*arguments, how["lower_bound"], flag_values=flag_values)
  else:
    define = {str: flags.DEFINE_string, bool: flags.DEFINE_bool}[hint]
    define(*arguments, flag_values=flag_values)


class _Form(flags.ArgumentParser):
  """Parses text that matches a pattern."""

  def __init__(self, pattern: str, what: str) -> None:
    self._pattern, self.syntactic_help = pattern, what

  def parse(self, argument: str) -> str:
    if not re.fullmatch(self._pattern, argument):
      raise ValueError(f"expected {self.syntactic_help}")
    return argument


def _without_none(hint: Any) -> Any:
  """Returns the type T of `T | None`, and every other type as it is."""
  if isinstance(hint, types.UnionType):
    (hint,) = (t for t in typing.get_args(hint) if t is not type(None))
  return hint


def _parsed_value(name: str, hint: Any, value: Any) -> Any:
  """Returns a flag's value as the field of the options has it."""
  if value is None or typing.get_origin(hint) is not tuple:
    return value
  kind = typing.get_args(hint)[0]
  try:
    return tuple(kind(item) for item in value)
  except ValueError as error:
    raise UserError(
      f"--{name}={','.join(value)}; expected whole numbers, such as 3,7."
    ) from error
