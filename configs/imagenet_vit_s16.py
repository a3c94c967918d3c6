"""IMSVD on ImageNet with ViT-S/16, AdamW and multi-crop, 300 epochs.

  python -m imsvd_jax.main --config=configs/imagenet_vit_s16.py \\
    --workdir=WORKDIR

A start, not measured yet: nobody has published IMSVD with a ViT. Optimizer,
batch and epochs are those of MoCo v3 (arXiv 2104.02057), crops and stochastic
depth those of DINO (arXiv 2104.14294), with six local crops.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 4096
  c.epochs = 300.0
  c.model.backbone = "vit_small"
  c.model.patch_size = 16
  c.model.drop_path = 0.1
  c.model.projector = (8192, 8160)  # 102 variables of 80 bins.
  c.model.dtype = "bfloat16"
  c.objective.imsvd.num_bins = 80
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 1.5e-4
  c.optimizer.warmup_epochs = 40.0
  c.optimizer.weight_decay = 0.1
  wide = dict(size=224, crop_scale=(0.25, 1.0))
  c.views.view1 = common.view(**wide, blur_prob=1.0)
  c.views.view2 = common.view(**wide, blur_prob=0.1, solarize_prob=0.2)
  c.views.local = common.view(size=96, crop_scale=(0.05, 0.25), blur_prob=0.5)
  c.views.num_local = 6
  return common.finish(c, mode)
