"""Writes our tables in the docs from measurements, so that none is stale.

  python docs/tables.py

A line `<!-- tables.py: NAME -->` in a page stands above each of these tables.
docs/measurements/ has the measurements, each with its command and date;
tests/test_tables.py fails where a page differs from them.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence

DOCS = pathlib.Path(__file__).parent
PAGES = (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md")))
_MARKED = re.compile(r"(<!-- tables\.py: (\S+) -->\n\n)((?:\|.*\n)+)")


def measured(name: str) -> dict:
  """Returns what a program has measured."""
  return json.loads((DOCS / "measurements" / f"{name}.json").read_text())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """Returns a table as lines of Markdown."""
  line = lambda cells: f"| {' | '.join(cells)} |\n".replace("|  |", "| |")
  first, *others = map(line, (head, *rows))
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


ENCODERS = {
  "raw pixels": "raw pixels",
  "random init": "random weights",
  "trained": "trained",
}


def laptop() -> str:
  """Accuracy of the recipes for a laptop."""
  rows = []
  for group, title in (
    ("digits", "digits, 10 classes"),
    ("shapes", "shapes, 24 classes"),
  ):
    for encoder, name in ENCODERS.items():
      cells = [name, *_accuracies(group, encoder)]
      if encoder == "trained":
        cells = [f"**{cell}**" for cell in cells]
      rows.append(("" if encoder != "raw pixels" else title, *cells))
  return markdown(("data", "features", "k-NN", "linear"), rows)


def crops() -> str:
  """MVEB with local crops that go through BatchNorm in two ways."""
  names = {
    "together": "all six crops as one batch (ours)",
    "apart": "each crop through by itself (MVEB's reference)",
  }
  rows = [
    (
      title,
      str(len(_runs(f"crops-{n}"))),
      *_accuracies(f"crops-{n}", "trained"),
    )
    for n, title in names.items()
  ]
  return markdown(("local crops", "seeds", "k-NN", "linear"), rows)


def digits() -> str:
  """The digits recipe on each version of JAX."""
  groups = sorted({k.rpartition("-")[0] for k in measured("results")["rows"]})
  rows = [
    (
      name.removeprefix("digits-jax"),
      str(len(_runs(name))),
      *_accuracies(name, "trained"),
    )
    for name in groups
    if name.startswith("digits-")
  ]
  return markdown(("jax", "seeds", "k-NN", "linear"), rows)


def _runs(group: str) -> list[dict]:
  """Returns the runs whose names begin with a group's."""
  rows = measured("results")["rows"]
  return [row for name, row in rows.items() if name.startswith(f"{group}-")]


def _accuracies(group: str, encoder: str) -> list[str]:
  """Returns k-NN and linear accuracy: the mean, and the range of several."""
  found = [run[encoder] for run in _runs(group) if encoder in run]
  cells = []
  for evaluator in ("knn", "lbfgs"):
    values = [run[evaluator] for run in found]
    cell = f"{statistics.mean(values):.1f}%"
    if min(values) < max(values):
      cell += f" ({min(values):.1f} to {max(values):.1f})"
    cells.append(cell)
  return cells


# A variable that knows so much of a factor is in bold.
_KNOWS = 0.2


def factors() -> str:
  """What single variables know of all factors of the shapes."""
  rows = [
    (
      row["title"],
      ", ".join(format(value, ".2f") for value in row["untrained"]),
      ", ".join(map(_trained, row["trained"])),
      str(row["chance"]),
    )
    for row in measured("shapes_factors")["rows"]
  ]
  return markdown(("factor", "random weights", "trained", "chance"), rows)


def four_factors() -> str:
  """The same of four of them."""
  numbers = {
    name: (f"{untrained:.2f}", _trained(trained))
    for row in measured("shapes_factors")["rows"]
    for name, untrained, trained in zip(
      row["factors"], row["untrained"], row["trained"], strict=True
    )
  }
  names = ("label", "texture", "shape", "background red")
  rows = [(name, *numbers[name]) for name in names]
  return markdown(("factor", "random weights", "trained"), rows)


def _trained(value: float) -> str:
  return f"**{value:.2f}**" if value > _KNOWS else f"{value:.2f}"


TABLES: dict[str, Callable[[], str]] = {
  "energy": energy,
  "view_cost": view_cost,
  "laptop": laptop,
  "digits": digits,
  "crops": crops,
  "factors": factors,
  "four_factors": four_factors,
}


def rewritten(page: str) -> str:
  """Returns a page with its marked tables made anew."""
  return _MARKED.sub(lambda found: found[1] + TABLES[found[2]](), page)


if __name__ == "__main__":
  for path in PAGES:
    path.write_text(rewritten(path.read_text()))
