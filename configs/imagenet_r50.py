"""IMSVD on ImageNet with ResNet-50, 100 epochs (arXiv 2501.03469).

  python -m imsvd_jax.main --config=configs/imagenet_r50.py --workdir=WORKDIR

The job script of the paper's code asks for 32 GPUs and at most 6 hours. We have
not measured a linear accuracy yet.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 2048
  c.epochs = 100.0
  c.model.backbone = "resnet50"
  c.model.projector = (8192, 8160)  # 102 variables of 80 bins.
  c.model.dtype = "bfloat16"
  c.objective.imsvd.num_bins = 80
  c.optimizer.name = "lars"
  c.optimizer.base_learning_rate = 0.6
  c.optimizer.weight_decay = 1e-6
  c.data.train_interpolation = "bilinear"
  c.data.antialias = True
  return common.finish(c, mode)
