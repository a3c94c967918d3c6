"""Tables of the docs are those that docs/tables.py makes of measurements."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("tables", ROOT / "docs/tables.py")
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_no_table_is_stale(page):
  text = page.read_text()
  assert tables.rewritten(text) == text, "run: python docs/tables.py"


def test_every_table_is_in_a_page():
  text = "".join(page.read_text() for page in tables.PAGES)
  for name in tables.TABLES:
    assert text.count(f"<!-- tables.py: {name} -->\n\n|") == 1


def test_measurements_say_when_and_by_what():
  files = [*(ROOT / "docs/measurements").glob("*.json")]
  assert files
  for path in files:
    found = tables.measured(path.stem)
    assert all(found[key] for key in ("date", "command", "rows")), path


def test_a_changed_number_is_noticed():
  page = (ROOT / "docs/data.md").read_text()
  changed = page.replace("| bilinear | 1.", "| bilinear | 2.", 1)
  assert changed != page
  assert tables.rewritten(changed) == page
