"""SuperInfo on ImageNet with ResNet-50 and LARS (arXiv 2408.10292).

  python -m imsvd_jax.main --config=configs/imagenet_r50_superinfo.py \\
    --workdir=WORKDIR

Backbone, optimizer and the 128-dimensional embedding follow the paper. Its text
that we hold gives no more, so we infer the rest: batch, epochs, learning rate,
schedule, weight decay and temperature are those of InfoCL, the code whose
evaluation protocol the paper names (docs/objectives.md). The weights of the
superfluous terms and the projector are ours; the views are those of
imagenet_r50.py. We have not measured an accuracy.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 1024
  c.epochs = 200.0
  c.objective.name = "superinfo"
  c.objective.superinfo.temperature = 0.5
  c.model.projector = (2048, 128)
  c.model.dtype = "bfloat16"
  c.optimizer.name = "lars"
  c.optimizer.base_learning_rate = 0.3
  c.optimizer.warmup_epochs = 0.0
  c.optimizer.final_fraction = 0.0
  c.data.train_interpolation = "bilinear"
  c.data.antialias = True
  return common.finish(c, mode)
