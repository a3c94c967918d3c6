"""Evaluates a run by named protocols.

  python -m imsvd_jax evaluate --workdir=runs/digits \\
    --protocol=knn/imsvd,linear/lbfgs,collapse

Prints a table and adds to results.json and TensorBoard in the run's directory.
--protocol=help lists the protocols with every hyper-parameter; --set=KEY=VALUE
changes one (--set=epochs=5, --set=crops=run, or for one protocol alone
--set=linear/imsvd:epochs=5). docs/evaluation.md says how numbers are made.
"""

from absl import flags

from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_list(
  "workdir", [], "Directory of a run, or a file of weights; or several."
)
_PROTOCOL = flags.DEFINE_list(
  "protocol",
  ["knn/imsvd", "linear/lbfgs"],
  "Protocols, in turn; 'transfer' is the whole suite, 'transfer/dtd' one set"
  " of it; 'help' lists all.",
)
_SET = flags.DEFINE_multi_string(
  "set",
  [],
  "KEY=VALUE: another value of a hyper-parameter, for every protocol that has"
  " it, or PROTOCOL:KEY=VALUE. May be repeated.",
)
_DATA = flags.DEFINE_string(
  "data",
  "",
  "Another data set, NAME or NAME=PATH: tfds:cifar10, folder=~/images. The"
  " run's own by default.",
)
_SPLITS = flags.DEFINE_list(
  "splits", [], "Its train and test split: train,test. The run's by default."
)
_DATA_DIR = flags.DEFINE_string(
  "data_dir", "", "Where the transfer sets lie; by default as TFDS has it."
)
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default: the newest.", lower_bound=0
)
_TARGET = flags.DEFINE_bool(
  "target", False, "Evaluate the EMA target network, if the run has one."
)
_SEED = flags.DEFINE_integer(
  "seed", None, "Of every protocol that has one; default: the protocol's."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 256, "Images that are embedded together.", lower_bound=1
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "Directory of the results. Default: the run's."
)
_CACHE = flags.DEFINE_string(
  "cache", "", "Directory of the features. Default: OUTPUT/features."
)
_REUSE = flags.DEFINE_bool(
  "reuse",
  False,
  "Take measurements that results.json has already for these very weights.",
)
_MARKDOWN = flags.DEFINE_bool(
  "markdown",
  False,
  "Print a Markdown table that compares the runs, mean over seeds.",
)
_join_cluster = command_line.define_cluster_flags()


def main(argv: list[str]) -> None:
  """Evaluates as the flags say."""
  del argv
  if "help" in _PROTOCOL.value:
    from imsvd_jax.evaluation import PROTOCOLS, TRANSFER, protocols

    print("\n".join(protocols.describe(PROTOCOLS)))
    print(f"transfer  linear/lbfgs on each of {', '.join(TRANSFER)}")
    return
  _join_cluster()
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.evaluation import binder

  binder.evaluate_runs(
    _WORKDIR.value,
    binder.Options(
      protocols=_PROTOCOL.value,
      settings=_SET.value,
      step=_STEP.value,
      use_target=_TARGET.value,
      data=_DATA.value,
      splits=_SPLITS.value,
      data_dir=_DATA_DIR.value,
      seed=_SEED.value,
      batch_size=_BATCH_SIZE.value,
      output=_OUTPUT.value,
      cache=_CACHE.value,
      reuse=_REUSE.value,
    ),
    markdown=_MARKDOWN.value,
  )


def run() -> None:
  """Runs the command line."""
  command_line.run(main)
