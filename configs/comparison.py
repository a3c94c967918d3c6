"""Objectives under equal conditions, and ablations of IMSVD.

  python -m imsvd_jax.main --config=configs/comparison.py:digits-simclr

The mode is DATA-OBJECTIVE or DATA-imsvd-VARIANT: a shorter digits.py, shapes.py
or fashion_mnist_r8.py ("fashion"), changed only by the settings below.
docs/objectives.md has the results on digits and shapes.
"""

from configs import common, digits, fashion_mnist_r8, shapes

# Data: its recipe, and the length of the training for every objective.
DATA = {
  "digits": (digits, {"epochs": 53.5}),  # 150 steps of 512.
  "shapes": (shapes, {}),  # 512 steps of 256.
  "fashion": (fashion_mnist_r8, {}),
}

# Settings with which each objective learns. IMSVD's learning rate does not suit
# all of them: the scales of the losses differ by orders of magnitude.
OBJECTIVES = {
  "imsvd": {},
  "music": {},
  "mveb": {"target_momentum": 0.99},
  "superinfo": {
    "objective.superinfo.temperature": 0.2,
    "objective.superinfo.superfluous_weight_1": 0.001,
    "objective.superinfo.superfluous_weight_2": 0.001,
  },
  # lambda weighs D (D - 1) entries against D; the paper's value, for D = 8192,
  # is too small for 256. With SGD at rates of 0.005 to 0.1, seed 0 ended below
  # raw pixels.
  "barlow_twins": {
    "objective.barlow_twins.redundancy_weight": 0.02,
    "optimizer.name": "adamw",
    "optimizer.base_learning_rate": 0.001,
  },
  "vicreg": {"optimizer.base_learning_rate": 0.02},
  "simclr": {"objective.simclr.temperature": 0.5},
}

# Additional settings on shapes.
OBJECTIVES_ON_SHAPES = {
  # MUSIC does not penalize two views in different bins. On shapes, variables
  # become one-hot before the views agree, and then little is learned: 17%
  # (linear) with IMSVD's settings. With softer variables, fewer bins and less
  # weight on independence the views agree first.
  "music": {
    "objective.music.num_bins": 8,
    "objective.music.temperature": 2.0,
    "objective.music.off_diagonal_weight": 0.3,
  },
  # With the weight for digits the entropy keeps the views apart: cosine 0.47,
  # 26%. A target that lags 100 steps slows a run of 512: 33% with the momentum
  # for digits, 71% with this one.
  "mveb": {"objective.mveb.entropy_weight": 0.003, "target_momentum": 0.9},
  # Half of IMSVD's rate, the first that worked; SimCLR below uses it too.
  "superinfo": {"optimizer.base_learning_rate": 0.4},
  # The gradient is largest at random weights, mostly in the first layer, and
  # small later. A long warm-up reaches a rate that would ruin the start (0.06
  # within two epochs ends below random weights); fewer dimensions help too.
  "barlow_twins": {
    "model.projector": (512, 32),
    "objective.barlow_twins.redundancy_weight": 0.05,
    "optimizer.name": "sgd",
    "optimizer.base_learning_rate": 0.1,
    "optimizer.warmup_epochs": 7.0,
  },
  "vicreg": {"optimizer.base_learning_rate": 0.08},  # With 0.02: 34%.
  "simclr": {"optimizer.base_learning_rate": 0.4},
}

# Variants of IMSVD. Other batch sizes see the same number of images, at a
# learning rate proportional to the size; every code has 256 entries.
VARIANTS = {
  "no_invariance": {"objective.imsvd.invariance_weight": 0.0},
  "no_off_diagonal": {"objective.imsvd.off_diagonal_weight": 0.0},
  "no_diagonal": {"objective.imsvd.diagonal_weight": 0.0},
  "batch64": {"batch_size": 64},
  "batch256": {"batch_size": 256},
  "batch1024": {"batch_size": 1024},
  "bins4": {"objective.imsvd.num_bins": 4},
  "bins8": {"objective.imsvd.num_bins": 8},
  "bins32": {"objective.imsvd.num_bins": 32},
}


def get_config(mode: str = ""):
  debug = mode == "debug"
  name = "digits-imsvd" if debug or not mode else mode
  data, _, rest = name.partition("-")
  objective, *variants = rest.split("-")
  known = data in DATA and objective in OBJECTIVES
  # Most variants change a key that no other objective reads.
  known &= not variants or objective == "imsvd"
  if not known or any(v not in VARIANTS for v in variants):
    raise ValueError(
      f"Unknown mode {mode!r}; known: 'debug', DATA-OBJECTIVE and"
      f" DATA-imsvd-VARIANT with DATA of {', '.join(DATA)}; OBJECTIVE of"
      f" {', '.join(OBJECTIVES)}; VARIANT of {', '.join(VARIANTS)}."
    )
  recipe, settings = DATA[data]
  c = recipe.get_config()
  c.objective.name = objective
  on_data = OBJECTIVES_ON_SHAPES if data == "shapes" else {}
  for changes in (
    settings,
    OBJECTIVES[objective],
    on_data.get(objective, {}),
    *map(VARIANTS.get, variants),
  ):
    c.update_from_flattened_dict(changes)
  c.eval.every_epochs = 0.0
  # The same for all runs on the same data: measured once.
  c.eval.baselines = objective == "imsvd" and not variants
  return common.finish(c, "debug" if debug else "")
