"""The options of `evaluate`: each field is a flag of the command."""

import dataclasses

from imsvd_jax.base.options import STEP, TRUST_WORKDIR, option


@dataclasses.dataclass(frozen=True)
class Options:
  """What to evaluate, and how."""

  workdir: tuple[str, ...] = option(
    (), "Directory of a run, or a file of weights; or several."
  )
  protocol: tuple[str, ...] = option(
    ("knn/imsvd", "linear/lbfgs"),
    "Protocols, in turn; 'transfer' is the whole suite, 'transfer/dtd' one set"
    " of it; 'help' lists all.",
  )
  set: tuple[str, ...] = option(
    (),
    "KEY=VALUE: another value of a hyper-parameter, for every protocol that has"
    " it, or PROTOCOL:KEY=VALUE. May be repeated.",
    repeated=True,
  )
  data: str = option(
    "",
    "Another data set: folder:DIR, arrays:FILE, tar:DIR, pack:DIR, tfds:NAME,"
    " digits. The run's own by default.",
  )
  trust_workdir: bool = TRUST_WORKDIR
  splits: tuple[str, ...] = option(
    (),
    "Its train and test split: train,test. The run's by default; where --data"
    " have no such split, train and the first of validation, val, test.",
  )
  holdout: float | None = option(
    None,
    "Share of every class of a folder without a test split to measure on, as"
    " data.holdout. The run's own data keep that by default.",
  )
  data_dir: str = option(
    "", "Directory of the transfer sets; that of TFDS by default."
  )
  step: str | None = STEP
  target: bool = option(
    False, "Evaluate the EMA target network, if the run has one."
  )
  seed: int | None = option(
    None, "Of every protocol that has one; the protocol's by default."
  )
  batch_size: int = option(
    256, "Images that are embedded together, over all devices.", lower_bound=1
  )
  output: str = option("", "Directory of the results; the run's by default.")
  cache: str = option(
    "", "Directory of the features; OUTPUT/features by default."
  )
  reuse: bool = option(
    False,
    "Take measurements that results.json already has for these very weights.",
  )
  markdown: bool = option(
    False, "Print a Markdown table that compares the runs, mean over seeds."
  )
