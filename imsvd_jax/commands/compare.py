"""Trains recipes side by side, over seeds, and compares them in tables.

  imsvd compare --workdir=runs/comparison --seeds=0,1,2 \\
    comparison:digits-{imsvd,barlow_twins}

The arguments that are no flags are recipes, FILE.py[:MODE]. Trains every recipe
with every seed, one run after the other, and writes Markdown tables of all runs
to WORKDIR/comparison.md. A finished run is not repeated, and an interrupted one
resumes.
"""

import sys

from absl import flags

from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of the comparison, with one folder for each run."
)
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds that every recipe runs with.")
_TIMING_STEPS = flags.DEFINE_integer(
  "timing_steps",
  5,
  "Steps in each of three rounds that measure a step's time; 0: none.",
  lower_bound=0,
)


def main(*recipes: str) -> int:
  """Compares the recipes; 1 if a run failed."""
  from imsvd_jax.evaluation import recipe_comparison

  return recipe_comparison.compare(
    recipes,
    seeds=recipe_comparison.parse_seeds(_SEEDS.value),
    workdir=_WORKDIR.value,
    timing_steps=_TIMING_STEPS.value,
  )


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main, required={"workdir": "runs/comparison"}, max_arguments=sys.maxsize
  )
