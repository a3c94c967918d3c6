"""IMSVD on CIFAR-10 with ResNet-18, 800 epochs (arXiv 2501.03469).

  python -m imsvd_jax.main --config=configs/cifar10_r18.py --workdir=WORKDIR

For one GPU. Prepare the data set once:

  tfds build cifar10
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  c.objective.name = "imsvd"
  return common.finish(c, mode)
