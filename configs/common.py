"""Every key that a recipe can set, with its type, default and meaning.

A recipe (`configs/<name>.py`) starts from `base()`, overrides some keys, and
returns `finish(c, mode)`, which locks the keys: a typo is an error.
"""

from ml_collections import ConfigDict

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def view(**overrides) -> ConfigDict:
  """Returns the settings of one augmented view, `overrides` replaced.

  Probabilities are per image; 0 switches an operation off.
  """
  settings = ConfigDict(
    dict(
      # Host (tf.data): random resized crop and flip.
      size=224,  # Side of the view, in pixels.
      crop_scale=(0.08, 1.0),  # Share of the image's area.
      crop_ratio=(3 / 4, 4 / 3),  # Width over height.
      flip_prob=0.5,
      # Device (JAX), in this order.
      jitter_prob=0.8,  # The four operations below, in random order.
      brightness=0.4,
      contrast=0.4,
      saturation=0.2,
      hue=0.1,
      permute_prob=0.0,  # Random permutation of the channels.
      invert_prob=0.0,
      gray_prob=0.2,
      blur_prob=0.0,
      blur_sigma=(0.1, 2.0),  # Standard deviation in pixels, uniform.
      solarize_prob=0.0,
      solarize_threshold=128.0,  # Of 255.
    )
  )
  settings.update(overrides)
  return settings


def base() -> ConfigDict:
  """Returns the default of every key: IMSVD on ImageNet with ResNet-50."""
  c = ConfigDict()
  c.seed = 0
  c.batch_size = 2048  # Images per step over all devices.
  # Micro-batches of a step, which needs the memory of one. The loss is that of
  # the whole batch; BatchNorm normalizes each micro-batch by itself.
  c.accumulate_steps = 1
  c.epochs = 100.0
  c.allow_changes = ()  # Keys that may differ from the run being continued.
  # Workdir of another run, or file of weights, from which this one starts; its
  # head is taken only where it fits.
  c.init_from = ""

  c.model = ConfigDict(
    dict(
      backbone="resnet50",
      width_multiplier=1.0,
      # "imagenet", "cifar" or "small". For a ViT patches of 16, 4 and 4 pixels;
      # for a ConvNeXt of 4, 1 and 2.
      stem="imagenet",
      patch_size=0,  # ViT, ConvNeXt: side of a patch in pixels; 0: the stem's.
      pool="token",  # ViT: features of the class token; "mean": of the patches.
      # ResNet: the features are the means of 2 x 2 (or 3 x 3, ...) parts of the
      # last map, which tell top from bottom; 1: of the whole map.
      pool_grid=1,
      registers=0,  # ViT: tokens beside the class token that have no output.
      # ViT, ConvNeXt: start of a learned factor on each residual branch; 0: a
      # ViT has none, a ConvNeXt starts at 1e-6.
      layer_scale=0.0,
      # ViT, ConvNeXt: share of images that skip the last block in training,
      # less for the blocks before it (stochastic depth).
      drop_path=0.0,
      projector=(8192, 8160),  # Widths; the last is the embedding's.
      projector_bias=True,  # Of the hidden layers.
      projector_last_bias=False,  # Of the last layer.
      dtype="float32",  # The network computes in "float32" or "bfloat16".
      remat=False,  # Recompute activations in the backward pass.
      zero_init_residual=True,  # Each block starts as its shortcut.
      # Convolutions: "fan_out_normal" as torchvision's ResNets, or
      # "torch_default", uniform within +-1 / sqrt(fan_in).
      init="fan_out_normal",
    )
  )

  c.objective = ConfigDict(dict(name="imsvd"))
  # Keyword arguments of each objective; only those of `name` are used.
  soft_variables = dict(
    num_bins=80,
    temperature=1.0,
    # Computation of the entropy terms, see objectives/joint_entropy.py.
    kernel="auto",  # Or "plain", "streamed".
    precision="auto",  # Or "default", "high", "highest", ...
  )
  weights = dict(diagonal_weight=1.0, off_diagonal_weight=1.0)
  c.objective.imsvd = ConfigDict(
    {**soft_variables, **weights, "invariance_weight": 1.0}
  )
  c.objective.music = ConfigDict(
    {**soft_variables, **weights, "invariance_weight": 0.0}
  )
  c.objective.mveb = ConfigDict(
    dict(
      entropy_weight=0.01,
      eta=0.01,  # Ridge of the score estimate.
      min_temperature=0.1,
      group_size=128,  # Images per density estimate.
    )
  )
  c.objective.superinfo = ConfigDict(
    dict(
      temperature=0.1,
      superfluous_weight_1=0.01,
      superfluous_weight_2=0.01,
      minimum_scale=1e-3,
    )
  )
  c.objective.barlow_twins = ConfigDict(dict(redundancy_weight=0.0051))
  c.objective.vicreg = ConfigDict(
    dict(invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0)
  )
  c.objective.simclr = ConfigDict(dict(temperature=0.1))
  c.target_momentum = 0.996  # Of the EMA target; rises to 1 on a cosine.

  c.optimizer = ConfigDict(
    dict(
      name="lars",  # "lars", "sgd", "adam" or "adamw".
      base_learning_rate=0.6,  # Times batch_size / 256.
      warmup_epochs=10.0,
      # "cosine" over the whole run. Where a run is continued with other
      # epochs: "restart" (warm-up and cosine again) or "constant" from there.
      schedule="cosine",
      final_fraction=1e-3,  # Of the peak, at the end of the cosine.
      momentum=0.9,
      weight_decay=1e-6,
      decay_1d=False,  # Also decay biases and BatchNorm parameters.
      trust_coefficient=1e-3,  # LARS.
      b1=0.9,  # Adam, AdamW.
      b2=0.999,
      eps=1e-8,
    )
  )

  c.sharding = ConfigDict(
    dict(
      # What of the state is split over the devices: "replicated": nothing;
      # "optimizer": the optimizer's state and the target network (ZeRO-1);
      # "all": the weights, too (FSDP).
      state="replicated",
    )
  )

  c.data = ConfigDict(
    dict(
      # "digits", "shapes", "scenes", "synthetic", "arrays", "folder", "tar",
      # "pack", or "tfds:NAME" for a prepared TFDS data set.
      name="tfds:imagenet2012",
      # The folder, or the file of arrays; for TFDS its data_dir ("": TFDS's
      # default).
      path="",
      train_split="train",
      eval_split="validation",  # "": no evaluation.
      num_examples=0,  # Drawn sources: train images; tests get a quarter.
      image_size=224,  # Drawn sources, digits: side in pixels.
      channels=3,
      resize=256,  # Evaluation: shorter side before the center crop.
      crop=224,
      interpolation="bicubic",  # Evaluation; or "bilinear".
      train_interpolation="",  # Training views; "": as `interpolation`.
      # Training views that shrink are antialiased, as PIL's. Those of images
      # of at most 64 pixels in memory, and evaluation, always are.
      antialias=False,
      mean=IMAGENET_MEAN,
      std=IMAGENET_STD,
      on_bad_image="replace",  # Or "error".
      # An image file of more pixels is a bad image (a bomb). PIL's limit.
      max_pixels=178_956_970,
      # What is black and white where numbers are not 8 bits: "0,4095", or
      # "auto" for the range of their type. "": such an image is a bad image.
      value_range="",
      exif=False,  # Turn image files as their EXIF orientation says.
      # Level of gray behind transparent pixels of image files: 255 is white.
      # -1: the colors stored under them, often black, as torchvision has it.
      background=-1,
      # folder: share of each class that is held out for evaluation, where there
      # is no evaluation part; chosen by the seed and the files' names.
      holdout=0.0,
      holdout_seed=0,
      labels="",  # folder: CSV or Parquet file of (file, label).
      image_key="",  # TFDS: feature of the images; "": "image" or the only one.
      label_key="",  # TFDS: feature of the labels; "": "label" or the only one.
      # Of images in memory, where they stay while a run trains: "device",
      # "host", or "auto": the devices, if at most a quarter of one is needed.
      placement="auto",
    )
  )

  c.views = ConfigDict()
  c.views.view1 = view(blur_prob=1.0)
  c.views.view2 = view(blur_prob=0.1, solarize_prob=0.2)
  c.views.local = view(size=96, crop_scale=(0.05, 0.4), blur_prob=0.5)
  c.views.num_local = 0
  # Pairs (epoch, size): from this epoch on, global views have this size, as in
  # ((0, 128), (50, 224)); up to four, the last with view1.size. (): one size.
  c.views.resolution_schedule = ()

  c.log = ConfigDict(
    dict(
      every_steps=50,  # metrics.jsonl and TensorBoard.
      progress_seconds=5.0,  # Console.
      wandb_project="",  # Also log to Weights & Biases; "": not.
    )
  )
  c.checkpoint = ConfigDict(
    dict(
      every_steps=1000,  # And at the end; 0: by minutes and at the end only.
      every_minutes=15.0,  # Checked when metrics are logged.
      keep_last=3,
      keep_every=0,  # Also keep every m-th step permanently; 0: none.
      # Also keep so many of the best evaluated steps, saved when evaluated; 0:
      # none. The label-free score is that of docs/learning.md.
      keep_best=0,
      keep_best_by="label_free",  # Or "online/knn", "online/linear".
      deadline_minutes=30.0,  # A save that takes longer ends the process.
    )
  )
  c.not_finite = ConfigDict(
    dict(
      policy="skip",  # "skip": discard the update and continue; or "stop".
      max_in_a_row=10,  # Stop after more skipped updates in a row than this.
    )
  )
  c.stop = ConfigDict(
    dict(
      # A verdict at which the run ends early, such as "converged"; "": none.
      when="",
      when_diverged=False,  # End with code 3 when the run has diverged.
    )
  )
  c.eval = ConfigDict(
    dict(
      every_epochs=10.0,  # Online evaluation; 0: never.
      batch_size=1024,
      num_neighbors=20,
      temperature=0.07,
      bank_split="",  # Labelled train images, if data.train_split has none.
      bank_examples=0,  # Train images of the online k-NN and linear; 0: all.
      linear_epochs=10,  # Of the online linear head; 0: none.
      collapse_images=1024,  # Of the online RankMe, LiDAR, entropies; 0: none.
      final=False,  # At the end: k-NN and linear accuracy.
      baselines=True,  # At the end also for raw pixels and random weights.
    )
  )
  return c


def cifar10() -> ConfigDict:
  """Returns the settings of all CIFAR-10 recipes: IMSVD with ResNet-18."""
  c = base()
  c.batch_size = 512
  c.epochs = 800.0
  c.model.backbone = "resnet18"
  c.model.stem = "cifar"
  c.model.zero_init_residual = False
  c.model.init = "torch_default"
  c.model.projector = (1024, 1024, 1024)  # 32 variables of 32 bins.
  c.objective.imsvd.num_bins = 32
  c.objective.music.num_bins = 32
  c.optimizer.name = "sgd"
  c.optimizer.base_learning_rate = 0.1
  c.optimizer.weight_decay = 5e-4
  c.optimizer.decay_1d = True
  c.data.name = "tfds:cifar10"
  c.data.eval_split = "test"
  c.data.resize = 32
  c.data.crop = 32
  c.data.mean = (0.4914, 0.4822, 0.4465)
  c.data.std = (0.2023, 0.1994, 0.2010)
  both = dict(size=32, crop_scale=(0.2, 1.0), saturation=0.4)
  c.views.view1 = view(**both)
  c.views.view2 = view(**both)
  c.eval.every_epochs = 10.0
  c.eval.final = True
  return c


def _small_resnet() -> ConfigDict:
  """Returns IMSVD with ResNet-8 and SGD, for a laptop's CPU."""
  c = base()
  c.model.backbone = "resnet8"
  c.model.width_multiplier = 0.375
  c.model.stem = "small"
  c.model.zero_init_residual = False
  c.model.projector = (512, 256)  # 16 variables of 16 bins.
  c.objective.imsvd.num_bins = 16
  c.objective.music.num_bins = 16
  c.optimizer.name = "sgd"
  c.optimizer.weight_decay = 5e-4
  return c


def digits() -> ConfigDict:
  """Returns the settings of all digits recipes: IMSVD with ResNet-8."""
  c = _small_resnet()
  c.batch_size = 512
  c.epochs = 107.0  # About 300 steps.
  c.optimizer.base_learning_rate = 0.4
  c.data.name = "digits"
  c.data.eval_split = "test"
  c.data.image_size = 16
  c.data.resize = 16
  c.data.crop = 16
  c.data.mean = (0.5, 0.5, 0.5)
  c.data.std = (0.5, 0.5, 0.5)
  both = dict(
    size=16,
    crop_scale=(0.4, 1.0),
    flip_prob=0.0,  # A mirrored digit is another symbol.
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.0,
    hue=0.0,
    gray_prob=0.0,
  )
  c.views.view1 = view(**both)
  c.views.view2 = view(**both)
  c.log.every_steps = 10
  c.checkpoint.every_steps = 100
  c.eval.every_epochs = 25.0
  c.eval.collapse_images = 512
  c.eval.final = True
  return c


def shapes() -> ConfigDict:
  """Returns the settings of drawn shapes: IMSVD with ResNet-8."""
  c = _small_resnet()
  c.batch_size = 256
  c.epochs = 16.0
  c.optimizer.base_learning_rate = 0.8
  c.optimizer.warmup_epochs = 2.0
  c.data.name = "shapes"
  c.data.eval_split = "test"
  c.data.num_examples = 8192
  c.data.image_size = 32
  c.data.resize = 32
  c.data.crop = 32
  c.data.mean = (0.5, 0.5, 0.5)
  c.data.std = (0.25, 0.25, 0.25)
  # Color is independent of shape and texture; without these operations the
  # encoder learns color and ends below random weights.
  both = dict(
    size=32,
    crop_scale=(0.5, 1.0),
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    gray_prob=0.2,
    permute_prob=1.0,
    invert_prob=0.5,
  )
  c.views.view1 = view(**both)
  c.views.view2 = view(**both)
  c.log.every_steps = 20
  c.checkpoint.every_steps = 200
  c.eval.every_epochs = 8.0
  c.eval.collapse_images = 512
  c.eval.final = True
  return c


def fashion_mnist(c: ConfigDict) -> None:
  """Sets what all Fashion-MNIST recipes share: the data and the views."""
  c.data.name = "tfds:fashion_mnist"
  c.data.eval_split = "test"
  c.data.channels = 1
  c.data.resize = 28
  c.data.crop = 28
  c.data.mean = (0.286,)
  c.data.std = (0.353,)
  both = dict(size=28, crop_scale=(0.25, 1.0), brightness=0.4, contrast=0.4)
  c.views.view1 = view(**both)
  c.views.view2 = view(**both)


def finish(c: ConfigDict, mode: str) -> ConfigDict:
  """Applies the mode ("" or "debug") and locks the keys.

  Raises:
    ValueError: The mode is unknown.
  """
  if mode == "debug":
    _shrink(c)
  elif mode:
    raise ValueError(f"Unknown mode {mode!r}; known: 'debug'.")
  c.lock()
  return c


def _shrink(c: ConfigDict) -> None:
  """Shrinks a recipe to one step on tiny synthetic data, seconds long."""
  c.batch_size = 16
  family = c.model.backbone.partition("_")[0]
  small = {"vit": ("vit_micro", 4), "convnext": ("convnext_micro", 2)}
  # A few layers compile fast.
  c.model.backbone, c.model.patch_size = small.get(family, ("resnet8", 0))
  c.model.width_multiplier = 0.125
  c.model.dtype = "float32"
  c.model.projector = (*(32 for _ in c.model.projector[:-1]), 64)
  c.objective.imsvd.num_bins = 8
  c.objective.music.num_bins = 8
  c.objective.mveb.group_size = 8
  c.epochs = 1.0
  c.optimizer.warmup_epochs = 0.0
  c.data.name = "synthetic"
  c.data.num_examples = 16
  c.data.image_size = 40
  c.data.resize = 36
  c.data.crop = 32
  c.views.view1.size = 32
  c.views.view2.size = 32
  c.views.local.size = 24
  c.views.resolution_schedule = ()
  c.log.every_steps = 1
  c.eval.every_epochs = 1.0
  c.eval.num_neighbors = 3
  c.eval.batch_size = 16
  c.eval.linear_epochs = 0  # Compiling it takes longer than all the rest.
  c.eval.collapse_images = 0
  c.eval.final = False
