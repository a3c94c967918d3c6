"""Options of the command that builds an index."""

import dataclasses

from imsvd_jax.base.options import STEP, TRUST_WORKDIR, option


@dataclasses.dataclass(frozen=True)
class BuildOptions:
  """Which images are added to an index, and by which encoder."""

  workdir: str = option("", "Directory of a run, or a file of weights.")
  data: str = option("", "The images, as of `imsvd embed`.")
  split: str = option("", "Of the run's data or of --data: train, eval, ...")
  step: str | None = STEP
  target: bool = option(False, "Use the EMA target network.")
  trust_workdir: bool = TRUST_WORKDIR
  batch_size: int = option(
    256, "Images that are embedded together.", lower_bound=1
  )
