"""IMSVD on Fashion-MNIST with a small ResNet, on a laptop's CPU.

  tfds build fashion_mnist
  python -m imsvd_jax.main --config=configs/fashion_mnist_r8.py \
      --workdir=WORKDIR

60,000 gray images of 28 pixels for training, 10,000 held out.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  common.fashion_mnist(c)
  c.epochs = 9.0
  c.model.pool_grid = 3  # Clothes stand upright: top and bottom differ.
  c.views.resolution_schedule = ((0, 20), (6, 28))  # Faster, and no worse.
  c.model.backbone = "resnet8"
  c.model.width_multiplier = 0.375
  c.model.stem = "small"
  c.model.projector = (1024, 512)  # 32 variables of 16 bins.
  c.objective.imsvd.num_bins = 16
  c.objective.music.num_bins = 16
  c.optimizer.base_learning_rate = 0.6
  c.optimizer.warmup_epochs = 1.0
  c.log.every_steps = 20
  c.checkpoint.every_steps = 200
  c.eval.every_epochs = 3.0
  c.eval.bank_examples = 10_000
  c.eval.linear_epochs = 0
  c.eval.baselines = False  # They take half as long; docs/results.md has them.
  return common.finish(c, mode)
