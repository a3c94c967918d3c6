"""Writes a run's encoder for other programs to read.

  python -m imsvd_jax export --workdir=runs/mine --format=torchvision \\
    --output=encoder.pth

The file says what it is (metadata), and a model card beside it says it to
people.
"""

from collections.abc import Sequence

from absl import flags

from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run, or a file of weights to convert."
)
_FORMAT = flags.DEFINE_string(
  "format",
  None,
  "torchvision, timm, detectron2, safetensors, numpy or stablehlo.",
)
_OUTPUT = flags.DEFINE_string(
  "output",
  None,
  "File to write, such as encoder.pth. A model card goes beside"
  " it: encoder.pth.md.",
)
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default: the newest.", lower_bound=0
)
_TARGET = flags.DEFINE_bool(
  "target", False, "Take the EMA target network's weights."
)
_WITH_PROJECTOR = flags.DEFINE_bool(
  "with_projector", False, "Write the projector too, not the backbone alone."
)
_CLASSIFIER = flags.DEFINE_string(
  "classifier",
  None,
  ".npz with kernel [F, K] and bias [K], to write as the layer fc.",
)
_LICENCE = flags.DEFINE_string(
  "licence", "", "Licence of the weights, for the metadata and the card."
)


def main(argv: Sequence[str]) -> None:
  """Exports as the flags say."""
  del argv
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.interop import weight_export

  weight_export.check_format(_FORMAT.value)
  classifier = None
  if _CLASSIFIER.value:
    classifier = weight_export.read_classifier(_CLASSIFIER.value)
  written = weight_export.export_encoder(
    _WORKDIR.value,
    _FORMAT.value,
    _OUTPUT.value,
    step=_STEP.value,
    use_target=_TARGET.value,
    with_projector=_WITH_PROJECTOR.value,
    classifier=classifier,
    licence=_LICENCE.value,
  )
  if written.note:
    print(written.note)
  print(f"Wrote {', '.join(written.files)}")


def run() -> None:
  """Runs the command line."""
  flags.mark_flags_as_required(["workdir", "format", "output"])
  command_line.run(main)
