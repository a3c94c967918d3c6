"""Evaluates a run by named protocols.

  imsvd evaluate --workdir=runs/digits \\
    --protocol=knn/imsvd,linear/lbfgs,collapse

Prints a table and adds to results.json and TensorBoard in the run's directory.
--protocol=help lists the protocols with every hyper-parameter; --set=KEY=VALUE
changes one (--set=epochs=5, --set=crops=run, or for one protocol alone
--set=linear/imsvd:epochs=5). docs/evaluation.md says how numbers are made.
"""

from imsvd_jax.commands import command_line, option_flags, shared_flags
from imsvd_jax.evaluation.evaluate_options import Options

_options = option_flags.define_flags(Options)
_join_cluster = shared_flags.define_cluster()


def main() -> None:
  """Evaluates as the flags say."""
  options = _options()
  if "help" in options.protocol:
    from imsvd_jax.evaluation import protocols

    print("\n".join(protocols.describe(protocols.PROTOCOLS)))
    return
  if not options.workdir:
    command_line.fail(
      "--workdir is missing. Give it, for example --workdir=runs/digits."
    )
  _join_cluster()
  from imsvd_jax.evaluation import offline
  from imsvd_jax.runs import interruption

  with interruption.sigterm_stops():
    offline.evaluate_runs(options)


def run() -> None:
  """Runs the command line."""
  command_line.run(main)
