"""Shows what a run has learned: `python -m imsvd_jax explain --workdir=RUN`.

Writes into WORKDIR/explain-STEP (or --output), which gets the names of another
split, data set or network appended: `explorer/index.html`, which
opens from disk; `figures/`, for papers; `analysis.npz`, every number.
"""

from absl import flags

from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import command_line

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer(
  "step", None, "Which checkpoint; the newest by default."
)
_TARGET = flags.DEFINE_bool(
  "target", False, "Explain the EMA target network, if the run has one."
)
_SPLIT = flags.DEFINE_enum(
  "split", "train", ["train", "eval"], "Which part of the data."
)
_DATA = flags.DEFINE_string(
  "data",
  "",
  "Another data set, NAME or NAME=PATH: tfds:cifar10, folder=~/images. The"
  " run's own by default.",
)
_OUTPUT = flags.DEFINE_string(
  "output",
  "",
  "Local directory to write to. Default: WORKDIR/explain-STEP, with the names"
  " of another data set, split or network.",
)
_MAX_IMAGES = flags.DEFINE_integer(
  "max_images",
  50_000,
  "Images shown in the explorer; the numbers are of all of them.",
  lower_bound=1,
)
_NUM_TOP = flags.DEFINE_integer(
  "num_top", 12, "Best images shown for each bin.", lower_bound=1
)
_INTEGRATED = flags.DEFINE_integer(
  "integrated_per_bin",
  2,
  "Images of each bin that get integrated gradients too, the dearest part.",
  lower_bound=0,
)
_TWO_VIEWS = flags.DEFINE_bool(
  "two_views",
  True,
  "Look at two augmented views of every image too, for the cross-joint matrix"
  " and agreement: two more forward passes.",
)
_UNTRAINED = flags.DEFINE_bool(
  "untrained",
  True,
  "Where labels or factors are known, measure what random weights tell of them"
  " too: one more forward pass.",
)
_VARIABLES = flags.DEFINE_list(
  "variables",
  None,
  "Numbers of the variables in the figures: 3,7,12. By default the 8 that know"
  " most of a label or factor, or of highest entropy.",
)
_FORMAT = flags.DEFINE_enum(
  "figure_format", "pdf", ["pdf", "svg", "png"], "Of the figures."
)


def _numbers(names: list[str] | None) -> list[int] | None:
  if names is None:
    return None
  wrong = [name for name in names if not name.strip().isdecimal()]
  if wrong or not names:
    raise UserError(
      f"--variables takes numbers of variables, such as 3,7; found"
      f" {wrong[0] if wrong else 'nothing'!r}."
    )
  return [int(name) for name in names]


def main(argv: list[str]) -> None:
  """Explains the run in --workdir."""
  del argv
  # Imported late, so that --help and a bad flag answer at once.
  from imsvd_jax.explain.run_subject import explain_run

  explain_run(
    _WORKDIR.value,
    step=_STEP.value,
    use_target=_TARGET.value,
    data_set=_DATA.value,
    split=_SPLIT.value,
    output=_OUTPUT.value,
    max_images=_MAX_IMAGES.value,
    num_top=_NUM_TOP.value,
    integrated_per_bin=_INTEGRATED.value,
    two_views=_TWO_VIEWS.value,
    untrained=_UNTRAINED.value,
    figure_format=_FORMAT.value,
    figure_variables=_numbers(_VARIABLES.value),
  )


def run() -> None:
  """Runs the command line."""
  flags.mark_flag_as_required("workdir")
  command_line.run(main)
