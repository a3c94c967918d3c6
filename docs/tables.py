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
import sys
from collections.abc import Callable, Iterable, Sequence

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from docs import learning_study  # noqa: E402

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
    ("fashion-imsvd", "Fashion-MNIST, 10 classes"),
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


OBJECTIVES = {
  "imsvd": "IMSVD",
  "music": "MUSIC",
  "mveb": "MVEB",
  "superinfo": "SuperInfo",
  "barlow_twins": "Barlow Twins",
  "vicreg": "VICReg",
  "simclr": "SimCLR",
}


def fashion() -> str:
  """The laptop recipe of Fashion-MNIST with every objective."""
  rows = []
  for encoder in ("raw pixels", "random init"):
    cells = _accuracies("fashion-imsvd", encoder)
    rows.append((ENCODERS[encoder], "", "", *cells, ""))
  names = sorted(_names("fashion"), key=lambda name: -len(_runs(name)))
  for name in (*names, *_names("lightly")):
    group, _, objective = name.partition("-")
    runs = _runs(name)
    # Others measured raw pixels and random weights, too.
    alone = [run["cpu_minutes"] for run in runs if "raw pixels" not in run]
    rows.append(
      (
        OBJECTIVES[objective],
        "lightly, PyTorch" if group == "lightly" else "ours",
        str(len(runs)),
        *_accuracies(name, "trained"),
        f"{statistics.mean(alone):.0f}" if alone else "",
      )
    )
  head = ("features", "trained by", "seeds", "k-NN", "linear", "CPU minutes")
  return markdown(head, rows)


def fashion_tuning() -> str:
  """Settings that were tried for Fashion-MNIST."""
  rows = [
    (row["title"], f"{row['knn']}%", f"{row['linear']}%")
    for row in measured("fashion_tuning")["rows"]
  ]
  return markdown(("settings", "k-NN", "linear"), rows)


def digits() -> str:
  """The digits recipe on each version of JAX."""
  rows = [
    (
      name.removeprefix("digits-jax"),
      str(len(_runs(name))),
      *_accuracies(name, "trained"),
    )
    for name in _names("digits")
  ]
  return markdown(("jax", "seeds", "k-NN", "linear"), rows)


def _names(group: str) -> list[str]:
  """Returns what runs of a group are called, without their seeds."""
  names = {key.rpartition("-")[0] for key in measured("results")["rows"]}
  return sorted(name for name in names if name.startswith(f"{group}-"))


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
    least, most = f"{min(values):.1f}", f"{max(values):.1f}"
    if least != most:
      cell += f" ({least} to {most})"
    cells.append(cell)
  return cells


def learning_scores() -> str:
  """How good a checkpoint each score chooses without labels."""
  stored = learning_study.load()
  chosen_on, held_out = (
    learning_study.report(names, stored)
    for names in learning_study.halves(stored)
  )
  share = lambda row: f"{100 * row['within half a point']:.0f}%"
  lost = lambda row: f"{row['points lost']:.1f}"
  rows = [
    (
      label,
      *(share(chosen_on[label]), lost(chosen_on[label])),
      *(share(row), f"{100 * row['within one point']:.0f}%", lost(row)),
      *(f"{row[name]:.2f}" for name in ("k-NN", "linear", "over runs")),
    )
    for label, row in held_out.items()
  ]
  head = (
    "score",
    "half of the choice: within 0.5",
    "points lost",
    "held-out half: within 0.5",
    "within 1",
    "points lost",
    "rank correlation with k-NN",
    "with linear",
    "over runs",
  )
  return markdown(head, rows)


def learning_not_failed() -> str:
  """The same of held-out runs that did not fail."""
  stored = learning_study.load()
  _, held_out = learning_study.halves(stored)
  verdicts = learning_study.verdicts(stored)
  names = [n for n in held_out if verdicts[n]["outcome"] != "failed"]
  rows = [
    (
      label,
      f"{100 * row['within half a point']:.0f}%",
      f"{100 * row['within one point']:.0f}%",
      *(f"{row[name]:.1f}" for name in ("points lost", "most points lost")),
    )
    for label, row in learning_study.report(names, stored).items()
  ]
  head = ("score", "within 0.5", "within 1", "points lost", "most points lost")
  return markdown(head, rows)


def learning_verdicts() -> str:
  """What the verdict said of runs that failed, and of good ones."""
  found = learning_study.verdicts(learning_study.load()).values()
  rows = []
  for outcome in ("failed", "neither", "good"):
    runs = [row for row in found if row["outcome"] == outcome]
    alarms = [row["alarm"][0] for row in runs if row["alarm"]]
    latest = str(max(alarms)) if alarms else ""
    rows.append((outcome, str(len(runs)), str(len(alarms)), latest))
  return markdown(("run", "runs", "with an alarm", "latest at step"), rows)


# A variable that knows so much of a factor is in bold.
_KNOWS = 0.2


def factors() -> str:
  """What single variables know of all factors of the shapes."""
  return _factors("meaning_shapes")


def scene_factors() -> str:
  """The same of the scenes."""
  return _factors("meaning_scenes")


def _factors(name: str) -> str:
  rows = [
    (
      row["title"],
      ", ".join(format(value, ".2f") for value in row["untrained"]),
      ", ".join(map(_trained, row["trained"])),
      str(row["chance"]),
    )
    for row in measured(name)["rows"]
  ]
  return markdown(("factor", "random weights", "trained", "chance"), rows)


def four_factors() -> str:
  """The same of four of them."""
  numbers = {
    name: (f"{untrained:.2f}", _trained(trained))
    for row in measured("meaning_shapes")["rows"]
    for name, untrained, trained in zip(
      row["factors"], row["untrained"], row["trained"], strict=True
    )
  }
  names = ("label", "texture", "shape", "background red")
  rows = [(name, *numbers[name]) for name in names]
  return markdown(("factor", "random weights", "trained"), rows)


def _trained(value: float) -> str:
  return f"**{value:.2f}**" if value > _KNOWS else f"{value:.2f}"


def names() -> str:
  """Bins with a confirmed name, and patches in one bin beside the object."""
  found = measured("meaning_shapes")
  named, patches = found["names"], found["patches"]
  one = f"v{patches['variable']}, bin {patches['bin']}"
  rows = [
    (
      "bins with a name that the other half of the images confirms",
      f"{named['confirmed']} of {named['used']}"
      f" ({named['confirmed'] / named['used']:.0%})",
    ),
    *(
      (f"mean IoU with the object: {title}", f"{patches[name]:.2f}")
      for title, name in (
        (f"patches in one bin ({one})", "trained"),
        ("patches in one bin, random weights", "untrained"),
        ("all patches", "all"),
        ("the best choice of patches", "best_choice"),
      )
    ),
  ]
  return markdown(("what", "number"), rows)


def selectivity() -> str:
  """Flips of the variable of each factor, and of the others."""
  return _flips("meaning_shapes", "selectivity", "changed factor")


def scene_selectivity() -> str:
  """The same of the scenes."""
  return _flips("meaning_scenes", "selectivity", "changed factor")


def scene_edits() -> str:
  """The same of single edits of the scenes."""
  return _flips("meaning_scenes", "edits", "edit")


def photo_edits() -> str:
  """The same of photos of clothes."""
  return _flips("meaning_fashion_mnist_r8", "edits", "edit")


def _flips(name: str, part: str, what: str) -> str:
  rows = [
    (
      row["factor"],
      f"v{row['variable']}",
      f"{row['flips']:.2f}",
      f"{row['others']:.2f}",
      _ratio(row),
    )
    for row in measured(name)[part]
  ]
  return markdown((what, "variable", "its flips", "others", "ratio"), rows)


def rivals() -> str:
  """Names and mutual information of other units on the same encoder."""
  kinds: dict[str, dict[str, list[dict]]] = {}
  for row in measured("explain_rivals")["rows"]:
    kind = kinds.setdefault(row["title"], {"trained": [], "random": []})
    kind[row["weights"]].append(row)
  rows = []
  for title, found in kinds.items():
    cells = [
      ", ".join(str(row["used"]) for row in found["trained"]),
      *(
        ", ".join(f"{row[key] / row['used']:.0%}" for row in found[weights])
        for weights in ("trained", "random")
        for key in ("named", "named_by_label")
      ),
      *(
        ", ".join(f"{row['nmi'][name]:.2f}" for row in found["trained"])
        for name in ("label", "shape", "texture")
      ),
    ]
    rows.append((title, *cells))
  named = ("named", "by shape or texture")
  head = (
    *("units", "used bins", *named),
    *(f"random weights: {name}" for name in named),
    *("NMI with label", "with shape", "with texture"),
  )
  return markdown(head, rows)


def rival_flips() -> str:
  """Selectivity of other units on the same encoder: one run."""
  found = [
    row
    for row in measured("explain_rivals")["rows"]
    if (row["weights"], row["seed"]) == ("trained", 0)
    and "activity" not in row["title"]
  ]
  rows = [
    (factor, *(_ratio(row["flips"][factor]) for row in found))
    for factor in found[0]["flips"]
  ]
  # "sparse autoencoder, 16 active".
  short = lambda title: re.sub(":.*(?=, )|:.*", "", title)
  return markdown(("changed", *(short(row["title"]) for row in found)), rows)


def _ratio(row: dict) -> str:
  return f"{row['ratio']:.1f} [{row['low']:.1f}, {row['high']:.1f}]"


TABLES: dict[str, Callable[[], str]] = {
  "energy": energy,
  "view_cost": view_cost,
  "laptop": laptop,
  "digits": digits,
  "crops": crops,
  "fashion": fashion,
  "fashion_tuning": fashion_tuning,
  "factors": factors,
  "four_factors": four_factors,
  "names": names,
  "selectivity": selectivity,
  "scene_factors": scene_factors,
  "scene_selectivity": scene_selectivity,
  "scene_edits": scene_edits,
  "photo_edits": photo_edits,
  "rivals": rivals,
  "rival_flips": rival_flips,
  "learning_scores": learning_scores,
  "learning_not_failed": learning_not_failed,
  "learning_verdicts": learning_verdicts,
}


def rewritten(page: str) -> str:
  """Returns a page with its marked tables made anew."""
  return _MARKED.sub(lambda found: found[1] + TABLES[found[2]](), page)


if __name__ == "__main__":
  for path in PAGES:
    path.write_text(rewritten(path.read_text()))
