"""IMSVD on procedural shapes, where raw pixels are close to chance.

  python -m imsvd_jax.main --config=configs/shapes.py

8192 images of 6 shapes x 4 textures in random colors, places, sizes and
rotations. The label is the pair of shape and texture (24 classes).
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 256
  c.epochs = 16.0
  c.model.backbone = "resnet8"
  c.model.width_multiplier = 0.375
  c.model.stem = "small"
  c.model.zero_init_residual = False
  c.model.projector = (512, 256)  # 16 variables of 16 bins.
  c.objective.imsvd.num_bins = 16
  c.objective.music.num_bins = 16
  c.optimizer.name = "sgd"
  c.optimizer.base_learning_rate = 0.8
  c.optimizer.weight_decay = 5e-4
  c.optimizer.warmup_epochs = 2.0
  c.data.name = "shapes"
  c.data.eval_split = "test"
  c.data.num_examples = 8192
  c.data.image_size = 32
  c.data.resize = 32
  c.data.crop = 32
  c.data.mean = (0.5, 0.5, 0.5)
  c.data.std = (0.25, 0.25, 0.25)
  # Color is independent of shape and texture; without these operations the
  # encoder learns color and ends below random weights.
  both = dict(
    size=32,
    crop_scale=(0.5, 1.0),
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_prob=0.2,
    permute_prob=1.0,
    invert_prob=0.5,
  )
  c.views.view1 = common.view(**both)
  c.views.view2 = common.view(**both)
  c.log.every_steps = 20
  c.checkpoint.every_steps = 200
  c.eval.every_epochs = 8.0
  c.eval.collapse_images = 512
  c.eval.final = True
  return common.finish(c, mode)
