"""IMSVD with ResNet-18 on any file of MedMNIST (28 to 224 pixels).

  python -m imsvd_jax.main --config=configs/medmnist.py \
      --config.data.path=pathmnist.npz --workdir=WORKDIR

For one GPU. The files are on medmnist.com. For gray images set
--config.data.channels=1; for images of 64, 128 or 224 pixels
--config.data.resize, data.crop, views.view1.size and views.view2.size.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  c.epochs = 200.0
  c.data.name = "arrays"
  c.data.resize = 28
  c.data.crop = 28
  c.data.mean = (0.5,)
  c.data.std = (0.25,)
  for view in (c.views.view1, c.views.view2):
    view.size = 28
  return common.finish(c, mode)
