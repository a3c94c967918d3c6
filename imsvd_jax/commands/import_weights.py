"""Makes a run from a file of weights.

  imsvd import_weights --file=resnet50.pth \\
    --config=imagenet_r50 --workdir=runs/imported

The commands evaluate, explain, embed and export accept the new workdir, and
training can start from it (--config.init_from=runs/imported). Reads ResNets,
ViTs and ConvNeXts of torchvision and timm, the official files of IMSVD, VICReg
and Barlow Twins, and every format that export writes except stablehlo and onnx;
and the backbone of files of MVEB, SwAV, DINO, DINOv2, MAE, MoCo, SimSiam,
solo-learn and lightly, or below --prefix. The
network is recognized from the weights. The recipe provides the rest: data,
preprocessing, objective.
"""

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

_FILE = flags.DEFINE_string("file", None, "The file of weights.")
_PREFIX = flags.DEFINE_string(
  "prefix",
  "",
  "How the names of the backbone's tensors begin, in a file of another project:"
  " --prefix=model.encoder. The other tensors are left out.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The new run's directory.")
_CONFIG = shared_flags.define_config(
  "Recipe, a name or FILE.py, such as imagenet_r50. Not needed for"
  " files of `imsvd export`, which contain one."
)


def main() -> None:
  """Imports as the flags say."""
  from imsvd_jax.interop.weight_import import import_weights

  notes = import_weights(
    _FILE.value, _WORKDIR.value, _CONFIG.value, prefix=_PREFIX.value
  )
  print("\n".join([*notes, f"Wrote {_WORKDIR.value}"]))


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main, required={"file": "resnet50.pth", "workdir": "runs/imported"}
  )
