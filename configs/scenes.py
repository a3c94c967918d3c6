"""IMSVD on procedural scenes of two shapes each, to explain what it learns.

  python -m imsvd_jax.main --config=configs/scenes.py
  imsvd explain --workdir=runs/scenes

8192 images of two shapes on a pattern, in a light, from 24 independent factors.
The label is the pair of shapes (36 classes). Both views of an image share its
ground and its light, and that is what the variables learn: docs/explain.md
shows how one sees it.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.shapes()
  c.model.pool_grid = 2  # The left half and the right one differ.
  c.data.name = "scenes"
  c.data.image_size = 48
  c.data.resize = 48
  c.data.crop = 48
  for view in (c.views.view1, c.views.view2):
    view.size = 48
    view.crop_scale = (0.7, 1.0)  # Both objects stay in the picture.
    view.flip_prob = 0.0  # A mirrored scene has another label.
  return common.finish(c, mode)
