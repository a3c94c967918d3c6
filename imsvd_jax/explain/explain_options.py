"""Options of an explanation, from which the flags of the command are made."""

import dataclasses

from imsvd_jax.base.options import STEP, TRUST_WORKDIR, option

FORMATS = ("pdf", "svg", "png")


@dataclasses.dataclass(frozen=True)
class ExplainOptions:
  """What is measured and what is shown."""

  max_images: int = option(
    50_000,
    "Images shown in the explorer; the numbers are of all of them.",
    lower_bound=1,
  )
  num_top: int = option(12, "Best images shown for each bin.", lower_bound=1)
  grad_cam_per_bin: int | None = option(
    None,
    "Of these, how many get Grad-CAM, patches in the bin and, of a ViT,"
    " attention; all by default.",
    lower_bound=0,
  )
  integrated_per_bin: int | None = option(
    None,
    "Of these, how many get integrated gradients, the most expensive part; 2 by"
    " default, on a CPU fewer where they would take long.",
    lower_bound=0,
  )
  thumbnail_size: int = option(
    64, "Side of a thumbnail in the explorer, in pixels.", lower_bound=1
  )
  joint: bool = option(
    True, "Measure the joint matrices, whose memory grows as (M b)^2."
  )
  two_views: bool = option(
    True,
    "Compare two augmented views of every image, for the cross-joint matrix and"
    " agreement: two more forward passes.",
  )
  max_flip_images: int = option(
    2048,
    "Images whose bins are compared before and after each single edit, and each"
    " change of a factor; 0: none.",
    lower_bound=0,
  )
  untrained: bool = option(
    True,
    "Where labels or factors are known, measure what random weights tell of"
    " them too: one more forward pass.",
  )
  variables: tuple[int, ...] | None = option(
    None,
    "Numbers of the variables in the figures: 3,7,12. By default the 8 that"
    " tell most of a label or factor, or the 8 of highest entropy.",
  )
  figure_format: str = option(
    "pdf", "File format of the figures.", choices=FORMATS
  )


@dataclasses.dataclass(frozen=True)
class RunOptions(ExplainOptions):
  """Which weights of a run are explained, on which images, and where to."""

  step: str | None = STEP
  target: bool = option(
    False, "Explain the EMA target network, if the run has one."
  )
  data: str = option(
    "",
    "Another data set: folder:DIR, arrays:FILE, tar:DIR, pack:DIR, tfds:NAME,"
    " digits. The run's own by default.",
  )
  trust_workdir: bool = TRUST_WORKDIR
  absolute_paths: bool = option(
    False,
    "Write absolute paths and links of images into the page, not those relative"
    " to the data's folder and to the page.",
  )
  split: str = option(
    "train", "Which part of the data.", choices=("train", "eval")
  )
  output: str = option(
    "",
    "Local directory to write to. Default: WORKDIR/explain-STEP, with the names"
    " of another data set, split or network.",
  )
