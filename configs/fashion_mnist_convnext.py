"""IMSVD on Fashion-MNIST with a small ConvNeXt and AdamW, on a laptop's CPU.

  tfds build fashion_mnist
  python -m imsvd_jax.main --config=configs/fashion_mnist_convnext.py \
      --workdir=WORKDIR

Rate and width have not been tuned; docs/models.md has what one run reached.

Patches of 2 pixels. The layer scale starts at 0.1: the paper's 1e-6 leaves the
blocks unused in a run as short as this one.
"""

from configs import common, fashion_mnist_r8


def get_config(mode: str = ""):
  c = fashion_mnist_r8.get_config()
  c.model.backbone = "convnext_micro"
  c.model.width_multiplier = 0.25
  c.model.patch_size = 2
  c.model.layer_scale = 0.1
  c.model.pool_grid = 1
  c.batch_size = 256
  c.epochs = 6.0
  c.views.resolution_schedule = ((0, 20), (4, 28))
  c.optimizer.name = "adamw"
  c.optimizer.base_learning_rate = 2e-3
  c.optimizer.weight_decay = 0.05
  return common.finish(c, mode)
