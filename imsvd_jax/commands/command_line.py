"""What all command lines share: one clear line for a user's mistake.

Every `python -m imsvd_jax.<command>` goes through `run`, which turns a
`UserError` (and a bad flag) into one line on standard error and its exit code.
"""

import dataclasses
import logging
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from absl import app, flags
from absl import logging as absl_logging

from imsvd_jax.base import cpu_devices, distributed, recipe_files
from imsvd_jax.base.errors import UserError, suggestion
from imsvd_jax.base.options import REQUIRED

# A flag belongs to the command that has it defined here.
flags.disclaim_key_flags()

EXIT_USAGE = UserError.exit_code

Options = TypeVar("Options")


def command(known: Iterable[str]) -> str:
  """Returns the command line's first word, before its flags are defined.

  For mains with several commands, each with flags of its own. Where the first
  word is none of them, exits: with the module's docstring after --help, else
  with one line.

  Args:
    known: The commands.
  """
  known = list(known)
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word in known:
    return word
  if word in ("--help", "-h", "--helpfull", "--helpshort"):
    print(sys.modules["imsvd_jax.commands.benchmark"].__doc__)
    sys.exit(0)
  found = f"Unknown command {word!r}." if word else "The command is missing."
  hint = suggestion(word, known)
  sys.exit(_fail(f"{found}{hint} Give one of {', '.join(known)}, or --help."))


def run(
  main: Callable[[Sequence[str]], int | None], *, max_arguments: int = 0
) -> None:
  """Parses the flags, calls `main(argv)` and exits with its result.

  Args:
    main: Given the program's name and what is not a flag.
    max_arguments: How many of the latter there may be.
  """
  # TensorFlow's start-up notes drown ours; the user's own setting wins.
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
  # Nothing here runs on oneDNN, and it announces itself whatever the level.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

  cpu_devices.spare_threads()

  def guarded(argv):
    _quieten()
    if len(argv) - 1 > max_arguments:
      extra = argv[1 + max_arguments]
      return _fail(f"Unexpected argument {extra!r}; flags start with --.")
    try:
      return main(argv)
    except UserError as error:
      distributed.leave(_fail(str(error), error.exit_code))
    except Exception:
      if not distributed.has_peers():
        raise
      traceback.print_exc()
      distributed.leave(1)

  def parse(argv):
    if {"--help", "-h", "--helpshort"} & set(argv[1:]):
      _print_help(sys.modules[main.__module__].__doc__)
      sys.exit(0)
    return _parse(argv)

  app.run(guarded, flags_parser=parse)


def _print_help(about: str) -> None:
  """Prints what a command does, and every flag of this package's modules."""
  print(about)
  for module in flags.FLAGS.flags_by_module_dict():
    if module.partition(".")[0] == "imsvd_jax" or module == sys.argv[0]:
      print(flags.FLAGS.module_help(module))


def print_line(text: str) -> None:
  """Prints names of files too that are not UTF-8, whatever stdout takes."""
  encoding = sys.stdout.encoding or "utf-8"
  print(text.encode(encoding, "backslashreplace").decode(encoding))


def define_cluster_flags() -> Callable[[], None]:
  """Defines the flags of a run of several processes.

  Returns:
    A function that joins the other processes, to be called before anything
    touches a device; alone, it does nothing.
  """
  address = flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0, for a run of several processes. Found by itself on"
    " TPU pods and under SLURM and Open MPI, like the two that follow.",
  )
  count = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run.", lower_bound=1
  )
  number = flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
  )
  seconds = flags.DEFINE_float(
    "join_seconds", 300.0, "How long to wait for the other processes."
  )
  return lambda: distributed.initialize(
    address.value,
    count.value,
    number.value,
    timeout_seconds=seconds.value,
  )


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
  how = field.metadata
  required = field.default is REQUIRED
  default: Any = None if required else field.default
  arguments = (field.name, default, how["help"])
  if how["choices"]:
    flags.DEFINE_enum(
      field.name, default, how["choices"], how["help"], flag_values
    )
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
  if required:
    flags.mark_flag_as_required(field.name, flag_values)


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


def require_config() -> None:
  """Makes --config required, and says what it wants where it is missing."""
  flags.register_validator(
    "config",
    lambda config: config is not None,
    message=f"Give a recipe, for example --config={recipe_files.EXAMPLE}.",
  )


def _quieten() -> None:
  """Shows our own notes but only warnings of libraries; --verbosity=0: all."""
  if not flags.FLAGS["verbosity"].present:
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("imsvd_jax").setLevel(logging.INFO)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    if "config" in flags.FLAGS:
      for recipe in _recipes(argv):
        recipe_files.locate(recipe)
    rest = flags.FLAGS(list(argv))
    if "config" in flags.FLAGS:
      # A missing file shows only when its config is looked at.
      _ = getattr(flags.FLAGS["config"].value, "keys", None)
    return rest
  except BrokenPipeError:
    sys.exit(EXIT_USAGE)  # `--help | head`.
  except flags.UnrecognizedFlagError as error:
    known = list(flags.FLAGS)
    message = (
      f"Unknown flag --{error.flagname}.{suggestion(error.flagname, known)}"
      " See --help."
    )
  except (AttributeError, KeyError) as error:
    # ConfigDict's own message has the key, and a suggestion for a near miss.
    key = _one_line(error).replace("\\n", " ").replace("\\'", "'").strip("'")
    message = (
      f"Unknown config key '{key} Every key is described in configs/common.py."
    )
  except ImportError as error:
    message = recipe_files.import_failed(error)
  except (flags.Error, OSError, TypeError, ValueError, SyntaxError) as error:
    message = _one_line(error)
  sys.exit(_fail(message))


def _recipes(argv: Sequence[str]) -> list[str]:
  """What --config is given as: `--config=X` or `--config X`."""
  found = re.compile("--?config(?:=(.*))?")
  values = []
  for word, following in zip(argv, [*argv[1:], None], strict=True):
    match = found.fullmatch(word)
    if match:
      values.append(following if match[1] is None else match[1])
  return [value for value in values if value is not None]


def _one_line(error: Exception) -> str:
  text = str(error.args[0] if error.args else error).strip()
  if "Traceback (most recent call last)" in text:
    # A recipe that raised: its own last line says what and why.
    text = f"{text.splitlines()[0]} {text.splitlines()[-1]}"
    text = text.replace("Traceback (most recent call last):", "")
  return re.sub(r"\s+", " ", text)


def _fail(message: str, code: int = EXIT_USAGE) -> int:
  print(f"error: {message}", file=sys.stderr, flush=True)
  return code
