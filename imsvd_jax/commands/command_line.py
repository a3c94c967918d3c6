"""What all commands share: picking one, parsing its flags, one-line errors.

Every command goes through `run`, which turns a `UserError` (and a wrong flag)
into one line on standard error and an exit code.
"""

import difflib
import logging
import os
import pathlib
import re
import select
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TextIO, cast

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from imsvd_jax.base import (
  cpu_devices,
  distributed,
  interrupts,
  recipe_files,
  tensorflow_notes,
)
from imsvd_jax.base.errors import EXIT_AT_ONCE, Stopped, UserError, suggestion
from imsvd_jax.commands import decoder_lines, help_page

EXIT_NO_READER = 141  # As shells report SIGPIPE.
# What JAX says of a value of one of its environment variables.
_JAX_DOES_NOT_START = (
  "for environment 'JAX_",
  "for JAX flag jax_",
  "Unable to initialize backend",
)
HELP = ("--help", "-h", "-help", "--helpshort", "--helpfull")


def pick(
  program: str,
  commands: Mapping[str, str],
  *,
  about: str = "",
  version: str = "",
) -> str:
  """Returns the command that the first word names, and removes the word.

  Without a word, or with --help, lists the commands and exits. Call it before
  the command's flags are defined: ml_collections reads sys.argv while --config
  is defined.

  Args:
    program: What the user types in front of the command: "imsvd".
    commands: What each does, in one line.
    about: What to print above the list.
    version: What --version prints.
  """
  word = sys.argv[1] if len(sys.argv) > 1 else ""
  if word in ("", "help", *HELP):
    _print_and_exit(
      help_page.commands_page(
        program, commands, about, has_version=bool(version)
      )
    )
  if version and word == "--version":
    _print_and_exit(version)
  name = word.replace("-", "_")
  if name not in commands:
    begins = [command for command in commands if command.startswith(name)]
    hint = suggestion(name, commands)
    if len(begins) == 1:
      hint = f" Did you mean {begins[0]!r}?"
    fail(f"Unknown command {word!r}.{hint} Known: {', '.join(commands)}.")
  sys.argv[:2] = [f"{program} {name}"]
  return name


def run(
  main: Callable[..., int | None],
  *,
  required: Mapping[str, str] | None = None,
  about: str | None = None,
  max_arguments: int = 0,
) -> None:
  """Parses the flags, calls `main` and exits with its result.

  Args:
    main: Receives the arguments that are no flags.
    required: Flags without which there is nothing to do, each with a value for
      the error message to show.
    about: What --help prints above the flags; by default the docstring of
      `main`'s module.
    max_arguments: The largest number of arguments that are no flags.
  """
  tensorflow_notes.hide(2)  # `decoder_lines` hides the others.
  cpu_devices.spare_threads()
  required = required or {}

  def guarded(argv: list[str]) -> int | None:
    _quiet_libraries()
    print_any_name(sys.stdout)
    try:
      result = main(*argv[1:])
      sys.stdout.flush()
      return result
    except Stopped as stopped:
      if distributed.has_peers():
        raise
      # A signal may have stopped JAX within anything, and the interpreter's
      # exit crash there. All that is to be kept is on disk.
      distributed.end(int(stopped.code or 0))
    except UserError as error:
      _print_error(str(error))
      distributed.leave(error.exit_code)
    except Exception as error:
      if isinstance(error, BrokenPipeError) and _has_no_reader():
        distributed.leave(EXIT_NO_READER)
      if any(words in str(error) for words in _JAX_DOES_NOT_START):
        _print_error(f"JAX does not start: {_one_line(error)}")
        distributed.leave(UserError.exit_code)
      traceback.print_exc()
      distributed.leave(1)

  def parse(argv: Sequence[str]) -> list[str]:
    if not set(HELP).isdisjoint(argv[1:]):
      text = about or sys.modules[main.__module__].__doc__ or ""
      _print_and_exit(help_page.flags_page(text, required))
    rest = _parse([argv[0], *map(_with_underscores, argv[1:])])
    if len(rest) - 1 > max_arguments:
      extra = rest[1 + max_arguments]
      fail(f"Unexpected argument {extra!r}; flags start with --.")
    _check_required(required)
    return rest

  interrupts.raise_outside_imports()
  try:
    app.run(guarded, flags_parser=parse)
  except KeyboardInterrupt:
    print("Interrupted.", file=sys.stderr, flush=True)
    # After an interrupted compilation the interpreter's exit crashes in JAX.
    distributed.end(EXIT_AT_ONCE)


def fail(message: str) -> NoReturn:
  """Prints one line and exits as after any wrong flag."""
  _print_error(message)
  sys.exit(UserError.exit_code)


def print_any_name(stream: TextIO) -> None:
  """Makes a stream escape what it cannot encode, such as names of files."""
  cast(Any, stream).reconfigure(errors="backslashreplace")


def _print_and_exit(text: str) -> NoReturn:
  """Prints to a reader that may stop early, such as `head`."""
  try:
    print(text, flush=True)
  except BrokenPipeError:
    _has_no_reader()
  sys.exit(0)


def _has_no_reader() -> bool:
  """Returns whether the reader of standard output ended, as `head` does.

  If so, what is still to be printed is dropped: the interpreter would complain
  when it exits.
  """
  output = sys.stdout.fileno()
  poll = select.poll()
  poll.register(output, 0)
  if not any(event & select.POLLERR for _, event in poll.poll(0)):
    return False
  os.dup2(os.open(os.devnull, os.O_WRONLY), output)
  return True


def _print_error(message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)


def _quiet_libraries() -> None:
  """Shows our notes but only warnings of libraries; --verbosity=0 shows all."""
  if not flags.FLAGS["verbosity"].present:
    decoder_lines.hide()
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("imsvd_jax").setLevel(logging.INFO)
    # What these log with a traceback reaches us as an exception, too.
    handler = absl_logging.get_absl_handler()
    handler.addFilter(_is_news)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def _is_news(record: logging.LogRecord) -> bool:
  parts = pathlib.PurePath(record.pathname).parts
  return not (record.exc_info and {"asyncio", "clu", "orbax"} & set(parts))


# --- Parsing -----------------------------------------------------------------


def _with_underscores(word: str) -> str:
  """Returns --batch_size=8 for --batch-size=8."""
  name, equals, value = word.partition("=")
  known = name.lstrip("-").replace("-", "_")
  if not name.startswith("-") or known not in flags.FLAGS:
    return word
  return f"--{known}{equals}{value}"


def _check_required(required: Mapping[str, str]) -> None:
  """Exits with one line where a flag is missing."""
  for name, example in required.items():
    if flags.FLAGS[name].value is None:
      fail(f"--{name} is missing. Give it, for example --{name}={example}.")


def _parse(argv: Sequence[str]) -> list[str]:
  """Parses the flags; exits with one line where one is wrong."""
  try:
    if "config" in flags.FLAGS:
      for recipe in _recipes(argv):
        recipe_files.load(recipe)
    rest = flags.FLAGS(list(argv))
    if "config" in flags.FLAGS:
      # A missing file shows only when its config is looked at.
      _ = getattr(flags.FLAGS["config"].value, "keys", None)
    return rest
  except flags.UnrecognizedFlagError as error:
    fail(_unknown_flag(error.flagname))
  except (AttributeError, KeyError) as error:
    fail(_unknown_key(error))
  except flags.IllegalFlagValueError as error:
    fail(_wrong_value(error))
  except (flags.Error, OSError, TypeError, ValueError) as error:
    fail(_one_line(error))


def _recipes(argv: Sequence[str]) -> list[str]:
  """Returns the values of `--config=X` and `--config X`."""
  found = re.compile("--?config(?:=(.*))?")
  values = []
  for word, following in zip(argv, [*argv[1:], None], strict=True):
    match = found.fullmatch(word)
    if match:
      values.append(following if match[1] is None else match[1])
  return [value for value in values if value is not None]


def _unknown_flag(name: str) -> str:
  if name.startswith("config.") and "config" in flags.FLAGS:
    return (
      f"--{name} changes a key of a recipe, and there is none; give one, for"
      f" example --config={recipe_files.EXAMPLE}."
    )
  known = name.replace("-", "_")
  hint = suggestion(known, help_page.own_names())
  return (
    f"Unknown flag --{name}.{hint or _as_key(known)} --help lists the flags."
  )


def _as_key(name: str) -> str:
  """Returns what to write where the name of a flag is a key of the recipe."""
  if "config" not in flags.FLAGS:
    return ""
  keys = _recipe_keys()
  of_name = [key for key in keys if key.rpartition(".")[2] == name]
  close = of_name or difflib.get_close_matches(name, keys, 1) or ["KEY=VALUE"]
  shown = " or ".join(f"--config.{key}" for key in close[:3])
  return f" Keys of a recipe are flags, too: {shown}."


def _recipe_keys() -> list[str]:
  """Returns the keys of the recipe, if one was given."""
  if "config" not in flags.FLAGS:
    return []
  flag = flags.FLAGS["config"]
  config = flag.value
  for recipe in _recipes(sys.argv):
    config = config or flag.parser.parse(recipe)  # A change of it was refused.
  return _leaves(config) if config else []


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
  """Returns the keys that hold values: "optimizer.name"."""
  found: list[str] = []
  for key, value in config.items():
    is_part = isinstance(value, ConfigDict)
    found += _leaves(value, f"{prefix}{key}.") if is_part else [prefix + key]
  return found


def _unknown_key(error: Exception) -> str:
  """Returns the message for ConfigDict's error, which names key and hint."""
  text = _one_line(error).replace("\\n", " ").replace("\\'", "'")
  key = re.search(r"'([\w.]+)'", text)
  close = re.search(r'Did you mean "([^"]+)"', text)
  hint = f" Did you mean {close[1]!r}?" if close else ""
  if key and not close:
    name = key[1].rpartition(".")[2]
    keys = [k for k in _recipe_keys() if k.rpartition(".")[2] == name]
    hint = f" Did you mean {' or '.join(map(repr, keys[:3]))}?" if keys else ""
  return (
    f"Unknown config key {key[1] if key else text!r}.{hint} `imsvd recipes show"
    " common` describes every key."
  )


def _wrong_value(error: Exception) -> str:
  """Returns what absl says of a value, with the type that is expected."""
  text = _one_line(error).removeprefix("flag ")
  # A recipe that raised: its own message is what the user needs.
  text = re.sub(r"Error whilst parsing config file: (ValueError: )?", "", text)
  name, _, value = text.removeprefix("--").partition("=")
  if name == "config":
    recipe, _, why = value.partition(": ")
    return f"--config={recipe_files.shown(recipe)}: {why}"
  expected = help_page.expected(name)
  if not expected:
    return text
  return f"--{name}={value.partition(': ')[0]}: expected {expected}."


def _one_line(error: Exception) -> str:
  text = str(error.args[0] if error.args else error).strip()
  if "Traceback (most recent call last)" in text:
    # A recipe that raised: its own last line says what and why.
    text = f"{text.splitlines()[0]} {text.splitlines()[-1]}"
    text = text.replace("Traceback (most recent call last):", "")
  return re.sub(r"\s+", " ", text)
