"""`imagenet_r50` with views that grow: fewer FLOP per epoch.

  python -m imsvd_jax.main --config=configs/imagenet_r50_fast.py
    --workdir=WORKDIR

`imsvd preflight` prints the FLOP of each size. Its accuracy has not been
measured.
"""

from configs import common, imagenet_r50


def get_config(mode: str = ""):
  c = imagenet_r50.get_config()
  c.views.resolution_schedule = ((0, 128), (30, 160), (60, 192), (85, 224))
  return common.finish(c, mode)
