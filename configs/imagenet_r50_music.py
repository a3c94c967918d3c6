"""MUSIC on ImageNet with ResNet-50 (arXiv 2206.06461).

  python -m imsvd_jax.main --config=configs/imagenet_r50_music.py \\
    --workdir=WORKDIR

IMSVD's recipe without the invariance term and the deep projector: MUSIC's
entropy terms favor invariant codes by themselves, and the paper reports that
neither a deep projector nor a very wide embedding is needed.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.objective.name = "music"
  c.objective.music.num_bins = 80
  c.model.projector = (2048, 8160)  # 102 variables of 80 bins.
  c.model.dtype = "bfloat16"
  return common.finish(c, mode)
