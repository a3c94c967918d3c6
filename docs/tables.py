"""Writes our tables in the docs from measurements, so that none is stale.

  python docs/tables.py

A line `<!-- tables.py: NAME -->` in a page stands above each of these tables.
Programs write the measurements into docs/measurements/; tests/test_tables.py
fails where a page differs from them.
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

DOCS = pathlib.Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
_MARKED = re.compile(r"(<!-- tables\.py: (\S+) -->\n\n)((?:\|.*\n)+)")


def measured(name: str) -> dict:
  """Returns what a program has measured."""
  return json.loads((DOCS / "measurements" / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table as lines of Markdown."""
  first, *others = (f"| {' | '.join(cells)} |\n" for cells in (head, *rows))
  return "".join([first, f"|{'---|' * len(head)}\n", *others])


def energy() -> str:
  """Sharpness of training views beside PIL's."""
  return _of_views("energy", ".2f", "plain", "antialiased")


def view_cost() -> str:
  """CPU time of training views beside PIL's."""
  return _of_views("ms", ".1f", "plain", "antialiased", "PIL")


def _of_views(number: str, form: str, *contenders: str) -> str:
  rows = []
  for row in measured("sharpness")["rows"]:
    low, high = (f"{100 * share:.0f}%" for share in row["area"])
    view = f"{row['size']} pixels of {low} to {high} of the area"
    cells = (format(row[f"{number} {name}"], form) for name in contenders)
    rows.append((view, row["filter"], *cells))
  return markdown(("view", "filter", *contenders), rows)


TABLES: dict[str, Callable[[], str]] = {
  "energy": energy,
  "view_cost": view_cost,
}


def rewritten(page: str) -> str:
  """Returns a page with its marked tables made anew."""
  return _MARKED.sub(lambda found: found[1] + TABLES[found[2]](), page)


if __name__ == "__main__":
  for path in PAGES:
    path.write_text(rewritten(path.read_text()))
