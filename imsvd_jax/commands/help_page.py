"""The text of --help: what a command does, and its flags without absl's."""

import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict

_WIDTH = 80


def commands_page(
  program: str,
  commands: Mapping[str, str],
  about: str = "",
  *,
  has_version: bool = False,
) -> str:
  """Returns the list of a program's commands, one line each."""
  rows = _rows(commands)
  text = f"{about.strip()}\n\n" if about else ""
  return (
    f"{text}Usage: {program} COMMAND [flags]\n\nCommands:\n{rows}\n\n"
    f"{program} COMMAND --help describes a command and its flags."
    + (f"\n{program} --version prints the version." if has_version else "")
  )


def flags_page(about: str, required: Collection[str] = ()) -> str:
  """Returns what a command does, and every flag that it defines."""
  rows = {
    _shown_name(flag): _description(flag, flag.name in required)
    for flag in _own_flags()
  }
  listed = f"\n\nFlags:\n{_rows(rows)}" if rows else ""
  return about.strip() + listed


def own_names() -> list[str]:
  """Returns the names of the flags that this package defines."""
  return [flag.name for flag in _own_flags()]


def expected(name: str) -> str:
  """Returns what a flag takes, such as "an integer"; "" for any text."""
  if name not in flags.FLAGS:
    return ""
  flag = flags.FLAGS[name]
  if flag.boolean:
    return "true or false"
  choices = getattr(flag.parser, "enum_values", None)
  if choices:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"
  return flag.parser.syntactic_help


def _own_flags() -> list[flags.Flag]:
  """Returns the flags of this package's modules, in order of definition."""
  libraries = ("absl", "ml_collections")
  own = {
    flag.name
    for module, members in flags.FLAGS.flags_by_module_dict().items()
    if not module.startswith(libraries)
    for flag in members
  }
  return [flags.FLAGS[name] for name in flags.FLAGS if name in own]


def _shown_name(flag: flags.Flag) -> str:
  return (
    f"--[no]{flag.name}" if flag.boolean and flag.value else f"--{flag.name}"
  )


def _description(flag: flags.Flag, is_required: bool) -> str:
  """Returns a flag's own text, its values and its default."""
  text = flag.help or ""
  text = text.partition(";\n")[0]  # absl's "repeat this option ...".
  choices: list[str] | None = getattr(flag.parser, "enum_values", None)
  if choices:
    text = f"{text.partition('>: ')[2]} One of {', '.join(choices)}."
  if is_required:
    return f"{text} Required."
  default: Any = flag.default
  if default in (None, "", [], False) or isinstance(default, ConfigDict):
    return text
  shown = ",".join(default) if isinstance(default, list) else default
  return f"{text} Default: {str(shown).lower() if flag.boolean else shown}."


def _rows(texts: Mapping[str, str]) -> str:
  """Returns two columns, the second one wrapped."""
  column = max(map(len, texts)) + 4
  lines = []
  for name, text in texts.items():
    wrapped = textwrap.wrap(
      " ".join(text.split()), _WIDTH - column, break_on_hyphens=False
    )
    first, *rest = wrapped or [""]
    lines.append(f"  {name}".ljust(column) + first)
    lines += [" " * column + line for line in rest]
  return "\n".join(lines)
