"""Writes the features of a folder of images, or of a file of arrays.

  imsvd embed --workdir=runs/mine --data=photos --output=features.npz

The .npz file contains `paths` [N] (relative to the folder; of arrays, numbers),
`features` float32 [N, F], with --codes also `codes` int32 [N, M] (the most
probable bin of each variable), and `unreadable`, the paths that are left out.
"""

from absl import flags

from imsvd_jax.commands import command_line, shared_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run, or a file of weights."
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "Folder of images, FOLDER or folder=FOLDER, with sub-folders; or"
  " arrays=FILE.",
)
_OUTPUT = flags.DEFINE_string("output", None, "The .npz file to write.")
_CODES = flags.DEFINE_bool(
  "codes", False, "Also write the most probable bin of each discrete variable."
)
_STEP = shared_flags.define_step()
_TARGET = shared_flags.define_target()
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 256, "Images that are embedded together.", lower_bound=1
)


def main() -> None:
  """Embeds as the flags say."""
  from imsvd_jax.interop import image_embeddings

  notes = image_embeddings.write_embeddings(
    _OUTPUT.value,
    _WORKDIR.value,
    _DATA.value,
    codes=_CODES.value,
    step=_STEP.value,
    use_target=_TARGET.value,
    batch_size=_BATCH_SIZE.value,
  )
  print("\n".join(notes))


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main,
    required={
      "workdir": "runs/mine",
      "data": "photos",
      "output": "features.npz",
    },
  )
