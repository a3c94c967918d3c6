"""SuperInfo on CIFAR-10 with ResNet-18 and Adam (arXiv 2408.10292).

  python -m imsvd_jax.main --config=configs/cifar10_r18_superinfo.py \\
    --workdir=WORKDIR

Backbone, optimizer and the 128-dimensional embedding follow the paper; all
other settings are those of cifar10_r18.py.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  c.objective.name = "superinfo"
  c.model.projector = (512, 128)
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 5e-4
  c.optimizer.weight_decay = 1e-6
  c.optimizer.decay_1d = False
  return common.finish(c, mode)
