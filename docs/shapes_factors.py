"""What single variables know of the factors of the shapes, for docs/explain.md.

  imsvd train --config=shapes --workdir=runs/shapes
  imsvd explain --workdir=runs/shapes --output=runs/explain-shapes
  python docs/shapes_factors.py --output=runs/explain-shapes

Writes docs/measurements/shapes_factors.json; `python docs/tables.py` makes the
tables of it.
"""

import argparse
import datetime
import json
import pathlib

import jax
import numpy as np

from imsvd_jax.explain import Analysis, patch_codes

STORED = pathlib.Path(__file__).parent / "measurements" / "shapes_factors.json"
# Rows of the table: a title, and the factors in it.
ROWS = {
  "label: shape and texture, 24 classes": ["label"],
  "shape, 6": ["shape"],
  "texture, 4": ["texture"],
  "foreground red, green, blue": [
    f"foreground {color}" for color in ("red", "green", "blue")
  ],
  "background red, green, blue": [
    f"background {color}" for color in ("red", "green", "blue")
  ],
  "x, y, size": ["x", "y", "size"],
  "rotation": ["rotation"],
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


def main() -> None:
  """Writes the numbers of an explained run."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
    for title, factors in ROWS.items()
  ]
  selectivity = analysis.interventions.selectivity
  head = {
    "command": "imsvd explain --workdir=runs/shapes",
    "recipe": "configs/shapes.py, seed 0",
    "date": datetime.date.today().isoformat(),
    "versions": f"jax {jax.__version__}",
    "rows": rows,
    "names": {
      "confirmed": len(analysis.captions.confirmed),
      "used": analysis.captions.num_used,
    },
    "selectivity": [one._asdict() for one in selectivity],
    "patches": patches_of(analysis),
  }
  STORED.write_text(json.dumps(head, indent=1) + "\n")


if __name__ == "__main__":
  main()
