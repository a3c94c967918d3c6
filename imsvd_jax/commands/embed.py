"""Writes the features of images, of files or of arrays.

  imsvd embed --workdir=runs/mine --data=photos --output=features.npz
  imsvd embed --workdir=runs/mine --split=train --output=features.parquet

Images of a folder, a pattern, a list or one file come in the order of their
names, those of a split in its own. The extension of --output chooses the
format: .npz has `paths` [N] (relative to the folder), `features` float32
[N, F], with --codes also `codes` int32 [N, M] (the most probable bin of each
variable), `labels` where a split has them, and `unreadable`, the paths that are
left out; .npy has the features, and the paths are beside it in .txt; .csv and
.parquet have a row for each image. --dense writes features per patch instead,
float16 [N, h, w, F], and for IMSVD and MUSIC codes per patch [N, h, w, M]. The
same command continues one that was stopped.
"""

from absl import flags

from imsvd_jax.base.options import TRUST_WORKDIR
from imsvd_jax.commands import command_line, shared_flags

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory of a run, or a file of weights."
)
_DATA = flags.DEFINE_string(
  "data",
  "",
  "FOLDER or folder:FOLDER, with sub-folders; a pattern in quotes; a list of"
  " paths (.txt); an image; or arrays:FILE. With --split another data set:"
  " tfds:NAME, tar:DIR or digits, too.",
)
_SPLIT = flags.DEFINE_string(
  "split",
  "",
  "Of the run's data or of --data: train, eval, or a part such as train[80%:].",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The file to write: .npz, .npy, .csv or .parquet."
)
_CODES = flags.DEFINE_bool(
  "codes", False, "Also write the most probable bin of each discrete variable."
)
_DENSE = flags.DEFINE_bool(
  "dense",
  False,
  "Write features and codes per patch, before pooling, not per image.",
)
_step = shared_flags.define_step()
_TARGET = shared_flags.define_target()
_TRUST = flags.DEFINE_bool(
  "trust_workdir", False, TRUST_WORKDIR.metadata["help"]
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", 256, "Images that are embedded together.", lower_bound=1
)


def main() -> None:
  """Embeds as the flags say."""
  if not _DATA.value and not _SPLIT.value:
    command_line.fail(
      "--data is missing. Give it, for example --data=photos; or --split=train"
      " for the run's own data."
    )
  from imsvd_jax.interop import image_embeddings

  notes = image_embeddings.write_embeddings(
    _OUTPUT.value,
    _WORKDIR.value,
    _DATA.value,
    split=_SPLIT.value,
    codes=_CODES.value,
    dense=_DENSE.value,
    step=_step(),
    use_target=_TARGET.value,
    batch_size=_BATCH_SIZE.value,
    trust_workdir=_TRUST.value,
  )
  print("\n".join(notes))


def run() -> None:
  """Runs the command line."""
  command_line.run(
    main, required={"workdir": "runs/mine", "output": "features.npz"}
  )
