"""IMSVD on procedural shapes, where raw pixels are close to chance.

  python -m imsvd_jax.main --config=configs/shapes.py

8192 images of 6 shapes x 4 textures in random colors, places, sizes and
rotations. The label is the pair of shape and texture (24 classes).
"""

from configs import common


def get_config(mode: str = ""):
  return common.finish(common.shapes(), mode)
