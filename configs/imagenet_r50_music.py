"""MUSIC on ImageNet with ResNet-50 (arXiv 2206.06461).

  python -m imsvd_jax.main --config=configs/imagenet_r50_music.py \\
    --workdir=WORKDIR

IMSVD's recipe without the invariance term, because MUSIC's entropy terms favor
invariant codes by themselves. The embedding is IMSVD's, 8160 wide, and the
projector has two layers, of which the hidden one is 2048 wide instead of 8192.
The paper reports that MUSIC needs neither a deep projector nor a very wide
embedding; this recipe does not test that. Optimizer, schedule, batch and views
are IMSVD's. We have not measured a linear accuracy.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.objective.name = "music"
  c.objective.music.num_bins = 80
  c.model.projector = (2048, 8160)  # 102 variables of 80 bins.
  c.model.dtype = "bfloat16"
  c.data.train_interpolation = "bilinear"
  c.data.antialias = True
  return common.finish(c, mode)
