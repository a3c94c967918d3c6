"""IMSVD on ImageNet with ConvNeXt-T and AdamW, 300 epochs.

  python -m imsvd_jax.main --config=configs/imagenet_convnext_t.py \\
    --workdir=WORKDIR

A start, not measured yet. Learning rate, weight decay, warm-up and stochastic
depth are those of supervised ConvNeXt-T (arXiv 2201.03545), views those of
imagenet_r50.py.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 4096
  c.epochs = 300.0
  c.model.backbone = "convnext_tiny"
  c.model.drop_path = 0.1
  c.model.projector = (8192, 8160)  # 102 variables of 80 bins.
  c.model.dtype = "bfloat16"
  c.objective.imsvd.num_bins = 80
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 2.5e-4
  c.optimizer.warmup_epochs = 20.0
  c.optimizer.weight_decay = 0.05
  return common.finish(c, mode)
