"""The docs name what exists: files, headings, modules, commands and flags."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from imsvd_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
  *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
  *sorted((ROOT / "docs").rglob("*.md")),
]
FOLDERS = "imsvd_jax|configs|docs|launch|tests"
# Pages with a table of the flags of a command.
TABLES = {
  command: ROOT / "docs" / page
  for command, page in {
    "evaluate": "evaluation.md",
    "explain": "explain.md",
    "export": "interop.md",
    "preflight": "preflight.md",
  }.items()
}
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def without_code(text: str) -> str:
  return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)


def headings(page: pathlib.Path) -> set[str]:
  """The anchors of a page, as GitHub makes them."""
  titles = re.findall(
    r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE
  )
  plain = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
  return {title.replace(" ", "-") for title in plain}


@every_page
def test_links_lead_somewhere(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
    if target.startswith("https://"):
      continue
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    assert path.exists(), target
    assert not anchor or anchor in headings(path), target


@every_page
def test_no_page_of_the_site_has_the_name_of_one_of_sphinx(page):
  """Sphinx writes its own search.html over that of a search.md."""
  assert page.stem not in {"search", "genindex", "py-modindex"}


@every_page
def test_named_files_exist(page):
  text = page.read_text()
  new = set(re.findall(r"New file `([^`]+)`", text))
  for name in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w/.-]*\w", text):
    placeholder = pathlib.Path(name).stem.isupper()
    assert placeholder or name in new or (ROOT / name).exists(), name


@every_page
def test_named_modules_exist(page):
  """`imsvd_jax.room.module`, or a name in it."""
  text = page.read_text()
  new = re.findall(r"New file `([^`]+)\.py`", text)
  new = {name.replace("/", ".") for name in new}
  for name in set(re.findall(r"\bimsvd_jax(?:\.\w+)+", text)):
    if name in new or (ROOT / name).exists():  # Such as imsvd_jax.egg-info.
      continue
    parts = name.split(".")
    length = len(parts)
    while not is_module(parts[:length]):
      length -= 1
    thing = importlib.import_module(".".join(parts[:length]))
    for part in parts[length:]:
      assert hasattr(thing, part), name
      thing = getattr(thing, part)


def is_module(parts: list[str]) -> bool:
  path = ROOT.joinpath(*parts)
  return path.is_dir() or path.with_suffix(".py").exists()


def uses() -> list[tuple[str, str]]:
  """(command, the rest of the line) of every command in the docs.

  Each benchmark, look at data and search is a command of its own here.
  """
  text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
  found = re.findall(
    r"\b(?:imsvd|-m imsvd_jax) ((?:benchmark|data|search) [a-z]+|[a-z_]+)"
    r"((?: [^`\n]*)?)",
    text,
  )
  return sorted(set(found))


def flags() -> dict[str, set[str]]:
  """The flags of every command in the docs: in commands and in tables."""
  found: dict[str, set[str]] = {command: set() for command, _ in uses()}
  for command, rest in uses():
    found[command] |= set(re.findall(r"--(\w+)", rest))
  for command, page in TABLES.items():
    rows = re.findall(r"^\| (`--.+?) \|", page.read_text(), re.MULTILINE)
    found[command] |= set(re.findall(r"`--(\w+)", "\n".join(rows)))
  return found


def test_every_command_is_documented_and_exists():
  assert {command.split()[0] for command in flags()} == set(COMMANDS)


@pytest.mark.parametrize(("command", "names"), sorted(flags().items()))
def test_flags_exist(command, names):
  page = subprocess.run(
    [sys.executable, "-m", "imsvd_jax", *command.split(), "--help"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  ).stdout
  known = set(re.findall(r"--(?:\[no\])?(\w+)", page))
  known |= {f"no{name}" for name in known} | {"help"}
  assert names <= known, names - known
