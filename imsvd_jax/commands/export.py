"""Writes a run's encoder to a file that other programs read.

  imsvd export --workdir=runs/mine --format=torchvision --output=encoder.pth

The file contains metadata, and a model card is written beside it.
"""

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run, or a file of weights to convert."
)
_FORMAT = flags.DEFINE_string(
  "format",
  None,
  "torchvision, timm, detectron2, safetensors, numpy, stablehlo, onnx, or hub"
  " (a folder for the Hugging Face Hub and timm).",
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "File to write, such as encoder.pth. Its model card is encoder.pth.md."
  " For --format=hub a folder.",
)
_step = shared_flags.define_step()
_TARGET = shared_flags.define_target()
_WITH_PROJECTOR = flags.DEFINE_bool(
  "with_projector", False, "Write the projector too, not the backbone alone."
)
_CLASSIFIER = flags.DEFINE_string(
  "classifier",
  "",
  ".npz with kernel [F, K] and bias [K], to write as the last layer.",
)
_LICENSE = flags.DEFINE_string(
  "license", "", "License of the weights, for the metadata and the card."
)
_ABSOLUTE_PATHS = flags.DEFINE_bool(
  "absolute_paths",
  False,
  "Write the full path of the data into the file and the card, not the name of"
  " its folder alone.",
)


def main() -> None:
  """Exports as the flags say."""
  from imsvd_jax.interop import weight_export

  files, note = weight_export.export_encoder(
    _WORKDIR.value,
    _FORMAT.value,
    _OUTPUT.value,
    step=_step(),
    use_target=_TARGET.value,
    with_projector=_WITH_PROJECTOR.value,
    classifier=weight_export.read_classifier(_CLASSIFIER.value),
    license_name=_LICENSE.value,
    absolute_paths=_ABSOLUTE_PATHS.value,
  )
  if note:
    print(note)
  print(f"Wrote {', '.join(files)}")


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main,
    required={
      "workdir": "runs/mine",
      "format": "torchvision",
      "output": "encoder.pth",
    },
  )
