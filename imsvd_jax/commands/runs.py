"""Lists the runs in a folder: what, step, age, verdict, accuracy.

  imsvd runs
  imsvd runs ~/experiments

The newest run comes first. The verdict says without labels whether a run
learns (docs/learning.md); it is made anew from the run's metrics.
"""

from absl import flags

from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_string(
  "workdir", "runs", "Folder of the runs; or give it without a flag."
)


def main(folder: str = "") -> None:
  """Prints the table."""
  from imsvd_jax.runs import listing

  print(listing.as_text(listing.list_runs(folder or _WORKDIR.value)))


def run() -> None:
  """Runs the command line."""
  command_line.run(main, max_arguments=1)
