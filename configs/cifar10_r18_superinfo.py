"""SuperInfo on CIFAR-10 with ResNet-18 and Adam (arXiv 2408.10292).

  python -m imsvd_jax.main --config=configs/cifar10_r18_superinfo.py \\
    --workdir=WORKDIR

Backbone, optimizer and the 128-dimensional embedding follow the paper. Its text
that we hold gives no more, so we infer the rest: batch, epochs, constant
learning rate, weight decay and temperature are those of InfoCL, the code whose
evaluation protocol the paper names (docs/objectives.md). The weights of the
superfluous terms and the projector are ours; initialization and views are those
of cifar10_r18.py. We have not measured an accuracy.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.cifar10()
  c.batch_size = 256
  c.epochs = 200.0
  c.objective.name = "superinfo"
  c.objective.superinfo.temperature = 0.5
  c.model.projector = (512, 128)
  c.optimizer.name = "adam"
  c.optimizer.base_learning_rate = 3e-4
  c.optimizer.warmup_epochs = 0.0
  c.optimizer.final_fraction = 1.0  # Constant.
  c.optimizer.weight_decay = 1e-6
  return common.finish(c, mode)
