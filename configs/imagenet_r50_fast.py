"""`imagenet_r50` with views that grow: fewer FLOP per epoch.

  python -m imsvd_jax.main --config=configs/imagenet_r50_fast.py
    --workdir=WORKDIR

`imsvd preflight` prints the FLOP of each size. Its accuracy has not been
measured.
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
  c.views.resolution_schedule = ((0, 128), (30, 160), (60, 192), (85, 224))
  return common.finish(c, mode)
