"""IMSVD with ResNet-50 on your own images: a folder, one GPU, no labels.

  python -m imsvd_jax.main --config=configs/folder_r50.py \
    --config.data.path=~/images --workdir=runs/mine

Any tree of JPEG, PNG, WebP, BMP or GIF files (docs/data.md). Sub-folders of
classes and a folder named "val" or "test", where they exist, give k-NN accuracy
every ten epochs; training never uses them. Optimizer and views are those of the
ImageNet recipe; the batch is an eighth of its batch, and the embedding is
smaller to suit the batch. The accuracy depends on the images and is not
measured. To save memory, use --config.model.remat=True or a smaller
--config.batch_size.
"""

from configs import common


def get_config(mode: str = ""):
  c = common.base()
  c.batch_size = 256
  c.epochs = 200.0
  c.model.backbone = "resnet50"
  c.model.projector = (4096, 2048)  # 64 variables of 32 bins.
  c.model.dtype = "bfloat16"
  c.objective.imsvd.num_bins = 32
  c.objective.music.num_bins = 32
  c.data.name = "folder"
  c.data.eval_split = "val"
  c.data.train_interpolation = "bilinear"
  c.data.antialias = True
  c.data.exif = True  # Phones store photos as the sensor lies.
  c.data.background = 255  # White is what people see behind a drawing.
  c.checkpoint.every_steps = 500
  c.eval.batch_size = 256
  return common.finish(c, mode)
