"""Features of a folder of images.

  python -m imsvd_jax embed --workdir=runs/mine --images=photos \\
    --output=features.npz

writes an .npz file with `paths` [N] (below the folder), `features` float32
[N, F], with --codes also `codes` int32 [N, M] (the likeliest bin of each
variable), and `unreadable`, the paths that are left out.
"""

from collections.abc import Sequence

import numpy as np
from absl import flags

from imsvd_jax.base import files
from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run, or a file of weights."
)
_IMAGES = flags.DEFINE_string(
  "images", None, "Folder of images; sub-folders are searched."
)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.")
_CODES = flags.DEFINE_bool(
  "codes", False, "Also write the likeliest bin of each discrete variable."
)
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; default: the newest.", lower_bound=0
)
_TARGET = flags.DEFINE_bool(
  "target", False, "Take the EMA target network's weights."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 256, "Images that are computed together.", lower_bound=1
)


def main(argv: Sequence[str]) -> None:
  """Embeds as the flags say."""
  del argv
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.interop import image_embeddings

  output = files.check_output(_OUTPUT.value)
  arrays = image_embeddings.embed_folder(
    _WORKDIR.value,
    _IMAGES.value,
    codes=_CODES.value,
    step=_STEP.value,
    use_target=_TARGET.value,
    batch_size=_BATCH_SIZE.value,
  )
  with (
    files.in_place_when_done(output) as unfinished,
    open(unfinished, "wb") as file,  # Given a name, NumPy would append ".npz".
  ):
    np.savez(file, **arrays)
  count, width = arrays["features"].shape
  print(f"Wrote {output}: {count} images, {width} features each.")
  unreadable = arrays["unreadable"]
  if len(unreadable):
    shown = ", ".join(unreadable[:5]) + (" ..." if len(unreadable) > 5 else "")
    command_line.print_line(
      f"Left out {len(unreadable)} unreadable images: {shown}"
    )


def run() -> None:
  """Runs the command line."""
  flags.mark_flags_as_required(["workdir", "images", "output"])
  command_line.run(main)
