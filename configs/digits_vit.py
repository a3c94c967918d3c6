"""IMSVD on the digits of digits.py with a small ViT and AdamW.

  python -m imsvd_jax.main --config=configs/digits_vit.py

Patches of 4 pixels: 16 tokens. Their mean is pooled, because a class token
learns slowly what to read.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.digits()
  c.batch_size = 256
  c.epochs = 53.4  # About 300 steps.
  c.model.backbone = "vit_micro"
  c.model.width_multiplier = 1.0
  c.model.patch_size = 4
  c.model.pool = "mean"
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 4e-3
  c.optimizer.warmup_epochs = 3.0
  c.optimizer.weight_decay = 0.05
  return common.finish(c, mode)
