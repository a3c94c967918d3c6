"""IMSVD on scikit-learn's handwritten digits, in minutes on a laptop's CPU.

  python -m imsvd_jax.main --config=configs/digits.py

1797 real 8x8 scans, enlarged to 16x16: 1437 for training, 360 held out.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 512
  c.epochs = 107.0  # About 300 steps.
  c.model.backbone = "resnet8"
  c.model.width_multiplier = 0.375
  c.model.stem = "small"
  c.model.zero_init_residual = False
  c.model.projector = (512, 256)  # 16 variables of 16 bins.
  c.objective.imsvd.num_bins = 16
  c.objective.music.num_bins = 16
  c.optimizer.name = "sgd"
  c.optimizer.base_learning_rate = 0.4
  c.optimizer.weight_decay = 5e-4
  c.data.name = "digits"
  c.data.eval_split = "test"
  c.data.image_size = 16
  c.data.resize = 16
  c.data.crop = 16
  c.data.mean = (0.5, 0.5, 0.5)
  c.data.std = (0.5, 0.5, 0.5)
  both = dict(
    size=16,
    crop_scale=(0.4, 1.0),
    flip_prob=0.0,  # A mirrored digit is another symbol.
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.0,
    hue=0.0,
    gray_prob=0.0,
  )
  c.views.view1 = common.view(**both)
  c.views.view2 = common.view(**both)
  c.log.every_steps = 10
  c.checkpoint.every_steps = 100
  c.eval.every_epochs = 25.0
  c.eval.collapse_images = 512
  c.eval.final = True
  return common.finish(c, mode)
