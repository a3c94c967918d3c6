"""SuperInfo on ImageNet with ResNet-50 and LARS (arXiv 2408.10292).

  python -m imsvd_jax.main --config=configs/imagenet_r50_superinfo.py \\
    --workdir=WORKDIR

Backbone, optimizer and the 128-dimensional embedding follow the paper; batch,
learning rate and augmentation are those of this package's other ImageNet
recipes.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.objective.name = "superinfo"
  c.model.projector = (2048, 128)
  c.model.dtype = "bfloat16"
  c.optimizer.name = "lars"
  c.optimizer.base_learning_rate = 0.3
  return common.finish(c, mode)
