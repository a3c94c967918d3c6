"""IMSVD on Fashion-MNIST with ResNet-18, for one GPU.

  tfds build fashion_mnist
  python -m imsvd_jax.main --config=configs/fashion_mnist_r18.py \
      --workdir=WORKDIR

60,000 gray images of 28 pixels, which stay on the GPU.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  common.fashion_mnist(c)
  c.epochs = 200.0
  c.model.dtype = "bfloat16"
  return common.finish(c, mode)
