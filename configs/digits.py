"""IMSVD on scikit-learn's handwritten digits, in minutes on a laptop's CPU.

  python -m imsvd_jax.main --config=configs/digits.py

1797 real 8x8 scans, enlarged to 16x16: 1437 for training, 360 held out.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.digits()
  return common.finish(c, mode)
