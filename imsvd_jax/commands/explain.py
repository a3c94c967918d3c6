"""Shows what a run has learned: `imsvd explain --workdir=RUN`.

Writes into WORKDIR/explain-STEP (or --output), whose name also tells another
split, data set or network: `explorer/index.html`, which opens from disk;
`figures/`, for papers; `analysis.npz`, every number.
"""

from absl import flags

from imsvd_jax.commands import command_line, option_flags
from imsvd_jax.explain.explain_options import RunOptions

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_OPTIONS = option_flags.define_flags(RunOptions)


def main() -> None:
  """Explains the run in --workdir."""
  from imsvd_jax.explain.run_subject import explain_run

  explain_run(_WORKDIR.value, _OPTIONS())


def run() -> None:
  """Runs the command line."""
  command_line.run(main, required={"workdir": "runs/digits"})
