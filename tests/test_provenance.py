"""Numbers have a source: others' a record, ours a command."""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = json.loads((ROOT / "docs/provenance.json").read_text())
KEYS = {
  "value",
  "method",
  "setting",
  "title",
  "section",
  "address",
  "date_read",
}
EVALUATION = (ROOT / "docs/evaluation.md").read_text()
# Protocols of our own.
OURS = {"linear/lbfgs", "linear/probe", "transfer", "collapse"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(text: str, title: str) -> str:
  """The lines below a heading, up to the next one of its level or above."""
  found = re.search(rf"^(#+) {re.escape(title)}\n", text, re.MULTILINE)
  assert found, title
  rest = text[found.end() :]
  end = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
  return rest[: end.start()] if end else rest


def tables(text: str) -> list[list[list[str]]]:
  """Tables of rows of cells, the head first, without the rule."""
  found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
  rows = [re.sub(r"[`*]", "", table).splitlines() for table in found]
  return [
    [[c.strip() for c in row.strip("|").split("|")] for row in (t[0], *t[2:])]
    for t in rows
  ]


def has_record(value: str, method: str, *settings: str) -> bool:
  """Whether a record has all of these words in its setting."""
  return any(
    record["value"] == value
    and record["method"] == method
    and all(words in record["setting"] for words in settings)
    for record in RECORDS
  )


def epochs(column: str) -> str:
  """What a record's setting says for the head of a column."""
  return " epochs" if "-" in column else f" {column.split()[0]} epochs"


def published() -> list[tuple[str, ...]]:
  """(value, method, words of its setting) of every published number."""
  numbers = []
  imagenet, cifar = tables(section(EVALUATION, "Published numbers"))
  for data, (head, *rows) in (("ImageNet", imagenet), ("CIFAR-10", cifar)):
    for row in rows:
      for column, cell in zip(head[1:], row[1:], strict=True):
        for value in re.findall(r"\d+\.\d+", cell if column[0] != "s" else ""):
          method = row[0].split(",")[0]
          numbers.append((value, method, data, epochs(column)))
  return numbers


def protocols() -> list[tuple[str, str, str]]:
  """(hyper-parameters, protocol, "protocol") of others' protocols."""
  rows = tables(section(EVALUATION, "Protocols"))[0][1:]
  return [
    (row[2], name, "protocol")
    for row in rows
    for name in re.findall(r"[\w/]+", row[0].split(" (")[0])
    if name not in OURS and not re.search("/(?:online|SET)$", name)
  ]


def recipes() -> list[tuple[str, str, str]]:
  """(number, recipe, "recipe") of others' results and machines."""
  unit = r"(?:%| (?:V100 |A100 )?GPUs| TPUs| hours| days)"
  numbers = []
  for path in sorted((ROOT / "configs").glob("*.py")):
    text = " ".join(
      (ast.get_docstring(ast.parse(path.read_text())) or "").split()
    )
    for value in re.findall(rf"\d[\d.,]*{unit}", text):
      numbers.append((value, path.stem, "recipe"))
  return numbers


@pytest.mark.parametrize("find", [published, protocols, recipes])
def test_numbers_of_others_have_a_record(find):
  numbers = find()
  assert len(numbers) > 3
  missing = [number for number in numbers if not has_record(*number)]
  assert not missing, "add these to docs/provenance.json"


def test_records_are_complete_and_used():
  numbers = [*published(), *protocols(), *recipes()]
  for record in RECORDS:
    assert record.keys() == KEYS
    assert all(isinstance(v, str) and v for v in record.values()), record
    assert re.fullmatch(r"https://\S+", record["address"]), record
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", record["date_read"]), record
    assert any(
      (record["value"], record["method"]) == number[:2] for number in numbers
    ), f"no page has {record['value']} of {record['method']}"


# Tables that define something, or that hold the numbers of others.
DEFINITIONS = {
  "The objectives",
  "Protocols",
  "Published numbers",
  "Definitions",
}
# With a decimal point or a unit.
NUMBER = r"[+-]?\d[\d,]*(?:\.\d|%| (?:s|ms|min|[kMG]i?B)\b)"
# Names a command and a date, or is made by docs/tables.py.
DATED = {
  *(ROOT / "README.md", ROOT / "docs/evaluation.md", ROOT / "docs/explain.md")
}
DATE = r"\b[A-Z][a-z]+ 20\d\d\b"
MADE_BY_TABLES = re.compile(r"<!-- tables\.py: \S+ -->\n\n(?:\|.*\n)+")
COMMAND = r"(?:^|`)(?:imsvd|pytest|python(?: -m)?) [a-z-]"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_measurements_name_their_command(page):
  without = []
  for title, part in re.findall(
    r"^#+ (.*)\n((?:(?!#+ ).*\n)*)", page.read_text(), re.MULTILINE
  ):
    if title in DEFINITIONS:
      continue
    found = re.search(COMMAND, part, re.MULTILINE)
    if found and (page not in DATED or re.search(DATE, part)):
      continue
    part = MADE_BY_TABLES.sub("", part)
    for head, *rows in tables(part):
      cells = [cell for row in rows for cell in row[1:]]
      measured = [c for c in cells if re.match(NUMBER, c)]
      if len(measured) > 2 and not {"default", "meaning"} & {*head}:
        without.append(f"{title}: {head}")
  assert not without
