"""Objectives under equal conditions, and IMSVD with a part taken away.

  python -m imsvd_jax.main --config=configs/comparison.py:digits-simclr

The mode is DATA-OBJECTIVE or DATA-imsvd-VARIANT: digits.py, made shorter, or
shapes.py, with the objective's own settings below and nothing else changed.
docs/objectives.md shows what came out.
"""

from configs import common, digits, shapes

# Data: its recipe, and how long every objective trains on it.
DATA = {
  "digits": (digits, {"epochs": 53.5}),  # 150 steps of 512.
  "shapes": (shapes, {}),  # 512 steps of 256.
}

# What an objective needs to learn at all where IMSVD's rate does not do: the
# scales of the losses differ by orders of magnitude.
OBJECTIVES = {
  "imsvd": {},
  "music": {},
  "mveb": {"target_momentum": 0.99},
  "superinfo": {
    "objective.superinfo.temperature": 0.2,
    "objective.superinfo.superfluous_weight_1": 0.001,
    "objective.superinfo.superfluous_weight_2": 0.001,
  },
  # lambda weighs D (D - 1) entries against D: the paper's, for D = 8192, is too
  # small for 256. With SGD, at rates of 0.005 to 0.1, seed 0 ended below raw
  # pixels.
  "barlow_twins": {
    "objective.barlow_twins.redundancy_weight": 0.02,
    "optimizer.name": "adamw",
    "optimizer.base_learning_rate": 0.001,
  },
  "vicreg": {"optimizer.base_learning_rate": 0.02},
  "simclr": {"objective.simclr.temperature": 0.5},
}

# And what shapes ask for beyond it.
OBJECTIVES_ON_SHAPES = {
  # Nothing in MUSIC minds two views in different bins, and on shapes variables
  # become one-hot before the views agree, after which little is learned: 17%
  # (linear) with IMSVD's settings. Softer variables, fewer bins and less weight
  # on independence let agreement come first.
  "music": {
    "objective.music.num_bins": 8,
    "objective.music.temperature": 2.0,
    "objective.music.off_diagonal_weight": 0.3,
  },
  # With digits' weight the entropy keeps the views apart: cosine 0.47, 26%. And
  # a target that lags 100 steps holds a run of 512 back: 33% with digits'
  # momentum, 71% with this.
  "mveb": {"objective.mveb.entropy_weight": 0.003, "target_momentum": 0.9},
  # Half of IMSVD's rate, the first that worked; as much for SimCLR below.
  "superinfo": {"optimizer.base_learning_rate": 0.4},
  # Its gradient is largest at random weights, most of it the first layer's, and
  # small later: a long warm-up to a rate that would ruin the start (0.06 within
  # two epochs: below random weights), and fewer dimensions.
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

# Variants of IMSVD. Batches of another size see the same number of images, at
# the rate that goes with their size; every code has 256 entries.
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
  # Most change a key that no other objective reads.
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
  # The same for all that share the data: measured once.
  c.eval.baselines = objective == "imsvd" and not variants
  return common.finish(c, "debug" if debug else "")
