"""What single variables of some recipes mean, for docs/explain.md.

  imsvd train --config=scenes --workdir=runs/scenes
  imsvd explain --workdir=runs/scenes --output=runs/explain-scenes
  python docs/meaning.py --of=scenes --output=runs/explain-scenes

`--of=shapes` and `--of=fashion_mnist_r8` are for those recipes. Writes
docs/measurements/meaning_RECIPE.json; `python docs/tables.py` makes the tables
of it.
"""

import argparse
import datetime
import json
import pathlib
from typing import Any

import jax
import numpy as np

from imsvd_jax.explain import Analysis, patch_codes
from imsvd_jax.explain.interventions import Interventions

MEASUREMENTS = pathlib.Path(__file__).parent / "measurements"
RGB = ("red", "green", "blue")
# Rows of the tables: a title, and the factors in it.
ROWS = {
  "shapes": {
    "label: shape and texture, 24 classes": ["label"],
    "shape, 6": ["shape"],
    "texture, 4": ["texture"],
    "foreground red, green, blue": [f"foreground {c}" for c in RGB],
    "background red, green, blue": [f"background {c}" for c in RGB],
    "x, y, size": ["x", "y", "size"],
    "rotation": ["rotation"],
  },
  "scenes": {
    "label: both shapes, 36 classes": ["label"],
    **{
      title: [f"{side} {name}" for side in ("left", "right") for name in names]
      for title, names in {
        "shape, left and right": ["shape"],
        "texture, left and right": ["texture"],
        "color, left and right": [f"color {c}" for c in RGB],
        "x, y, size, left and right": ["x", "y", "size"],
        "rotation, left and right": ["rotation"],
      }.items()
    },
    "pattern of the ground, 4": ["ground pattern"],
    "color of the ground": [f"ground color {c}" for c in RGB],
    "light: direction, strength": ["light direction", "light strength"],
  },
  "fashion_mnist_r8": {"label, 10 classes": ["label"]},
}


def patches_of(analysis: Analysis) -> dict[str, float | int]:
  """Returns how well the patches of the best bin cover the objects."""
  variable, chosen, iou = patch_codes.best(analysis.patches.patch_iou)
  everything, most = analysis.patches.patch_limits[1]
  return {
    "variable": variable,
    "bin": chosen,
    "trained": iou,
    "untrained": patch_codes.best(analysis.patches.patch_iou_untrained)[2],
    "all": float(everything),
    "best_choice": float(most),
  }


def selectivity_of(found: Interventions) -> list[dict[str, Any]]:
  """Returns the variable of each factor or edit."""
  return [one._asdict() for one in found.selectivity]


def main() -> None:
  """Writes the numbers of an explained run."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--of", choices=ROWS, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  flags = parser.parse_args()
  analysis = Analysis.load(flags.output / "analysis.npz")
  scores = analysis.scores
  names = [factor.name for factor in analysis.factors]
  best, untrained, chance = (
    dict(zip(names, np.max(values, axis=0), strict=True))
    for values in (scores.nmi, scores.nmi_untrained, scores.nmi_chance)
  )
  of = lambda values, factors: [round(float(values[f]), 3) for f in factors]
  rows = [
    {
      "title": title,
      "factors": factors,
      "untrained": of(untrained, factors),
      "trained": of(best, factors),
      "chance": max(of(chance, factors)),
    }
    for title, factors in ROWS[flags.of].items()
  ]
  head = {
    "command": f"imsvd explain --workdir=runs/{flags.of}",
    "recipe": f"configs/{flags.of}.py, seed 0",
    "date": datetime.date.today().isoformat(),
    "versions": f"jax {jax.__version__}",
    "rows": rows,
    "names": {
      "confirmed": len(analysis.captions.confirmed),
      "used": analysis.captions.num_used,
    },
    "edits": selectivity_of(analysis.edits),
  }
  if analysis.interventions is not None:  # The images were drawn.
    head["selectivity"] = selectivity_of(analysis.interventions)
    head["patches"] = patches_of(analysis)
  stored = MEASUREMENTS / f"meaning_{flags.of}.json"
  stored.write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
  main()
