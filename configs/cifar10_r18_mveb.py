"""MVEB on CIFAR-10 with ResNet-18: the settings of cifar10_r18.py.

  python -m imsvd_jax.main --config=configs/cifar10_r18_mveb.py \\
    --workdir=WORKDIR
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  c.objective.name = "mveb"
  c.model.projector = (1024, 256)
  return common.finish(c, mode)
