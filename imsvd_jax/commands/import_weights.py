"""Makes a run of somebody else's weights.

  python -m imsvd_jax import_weights --file=resnet50.pth \\
    --config=configs/imagenet_r50.py --workdir=runs/imported

The workdir is one that evaluate, explain, embed and export accept, and that
pretraining starts from (--config.init_from=runs/imported). Reads what
`interop.read_file` reads: torchvision's and timm's ResNets, the official files
of IMSVD, VICReg and Barlow Twins, and every format that export writes. The
network is recognised from the weights; the recipe says the rest: data,
preprocessing, objective.
"""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from imsvd_jax.commands import command_line

_FILE = flags.DEFINE_string("file", None, "The file of weights.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The new run's directory.")
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Recipe file, such as configs/imagenet_r50.py. Not needed for files of"
  " imsvd_jax.export, which hold one.",
  lock_config=True,
)


def main(argv: Sequence[str]) -> None:
  """Imports as the flags say."""
  del argv
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.interop.weight_import import import_weights

  notes = import_weights(_FILE.value, _WORKDIR.value, _CONFIG.value)
  print("\n".join([*notes, f"Wrote {_WORKDIR.value}"]))


def run() -> None:
  """Runs the command line."""
  flags.mark_flags_as_required(["file", "workdir"])
  command_line.run(main)
