"""IMSVD on Fashion-MNIST with a small ViT and AdamW, on a laptop's CPU.

  tfds build fashion_mnist
  python -m imsvd_jax.main --config=configs/fashion_mnist_vit.py \
      --workdir=WORKDIR

Patches of 4 pixels: 49 tokens, 25 while views have 20 pixels. Rate and
width have not been tuned; docs/models.md has what one run reached.
"""

from configs import common, fashion_mnist_r8


def get_config(mode: str = ""):
  c = fashion_mnist_r8.get_config()
  c.model.backbone = "vit_micro"
  c.model.width_multiplier = 0.67  # Two heads of 32.
  c.model.patch_size = 4
  c.model.pool = "mean"
  c.model.pool_grid = 1
  c.batch_size = 256
  c.epochs = 6.0
  c.views.resolution_schedule = ((0, 20), (4, 28))
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 2e-3
  c.optimizer.weight_decay = 0.05
  return common.finish(c, mode)
