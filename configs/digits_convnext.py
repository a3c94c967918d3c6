"""IMSVD on the digits of digits.py with a small ConvNeXt and AdamW.

  python -m imsvd_jax.main --config=configs/digits_convnext.py

Patches of 2 pixels, and a layer scale that starts at 0.1: the paper's 1e-6
leaves the blocks unused in a run as short as this one.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.digits()
  c.batch_size = 256
  c.epochs = 26.7  # About 150 steps.
  c.model.backbone = "convnext_micro"
  c.model.width_multiplier = 0.25
  c.model.patch_size = 2
  c.model.layer_scale = 0.1
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 4e-3
  c.optimizer.warmup_epochs = 3.0
  c.optimizer.weight_decay = 0.05
  return common.finish(c, mode)
