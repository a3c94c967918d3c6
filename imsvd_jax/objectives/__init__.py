"""Training objectives on the embeddings of several views of each image.

Two-view functions for any training loop, and `OBJECTIVES`, the same by name
for any number of views. Every one returns `(scalar, terms)`, takes `axis_name`
for use under `shard_map` and `pmap`, and computes in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

from imsvd_jax.objectives.barlow_twins import barlow_twins_loss
from imsvd_jax.objectives.diagnostics import diagnostics, off_diagonal_floor
from imsvd_jax.objectives.imsvd import imsvd_loss
from imsvd_jax.objectives.music import music_loss
from imsvd_jax.objectives.mveb import mveb_loss, mveb_views
from imsvd_jax.objectives.simclr import simclr_loss
from imsvd_jax.objectives.soft_variables import (
  entropy,
  joint_probability,
  soft_discretize,
)
from imsvd_jax.objectives.superinfo import superinfo_loss, superinfo_views
from imsvd_jax.objectives.vicreg import vicreg_loss
from imsvd_jax.objectives.views import over_view_pairs

__all__ = [
  "OBJECTIVES",
  "Objective",
  "barlow_twins_loss",
  "diagnostics",
  "entropy",
  "imsvd_loss",
  "joint_probability",
  "music_loss",
  "mveb_loss",
  "off_diagonal_floor",
  "simclr_loss",
  "soft_discretize",
  "superinfo_loss",
  "vicreg_loss",
]


class Objective(NamedTuple):
  """An objective over V views, and what it asks of the trainer.

  Attributes:
    loss: `loss(embeddings, *, num_global=2, targets=None, key=None,
      axis_name=None, **hyperparameters) -> (scalar, terms)`. `embeddings` holds
      V arrays [N, D], the first `num_global` of them global views. `key` is
      another one at each step.
    uses_target: The trainer keeps an EMA target network and passes its
      embeddings of the global views as `targets`.
    embedding_factor: Projector outputs per embedding dimension.
    discrete: Embeddings are M soft variables of `num_bins` bins, which is
      then a required hyper-parameter.
  """

  loss: Callable
  uses_target: bool = False
  embedding_factor: int = 1
  discrete: bool = False


OBJECTIVES: dict[str, Objective] = {
  "imsvd": Objective(over_view_pairs(imsvd_loss), discrete=True),
  "music": Objective(over_view_pairs(music_loss), discrete=True),
  "mveb": Objective(mveb_views, uses_target=True),
  "superinfo": Objective(superinfo_views, embedding_factor=2),
  "barlow_twins": Objective(over_view_pairs(barlow_twins_loss)),
  "vicreg": Objective(over_view_pairs(vicreg_loss)),
  "simclr": Objective(over_view_pairs(simclr_loss)),
}
