"""Trains the laptop recipe's network with PyTorch and lightly's losses.

  pip install torch torchvision lightly
  python docs/lightly_reference.py --objective=simclr --workdir=runs/lightly

An outside reference for docs/results.md: the same images, crops, batch, steps,
rate and shape of network as `configs/comparison.py:fashion-OBJECTIVE`, but for
views that grow: here all have the last size. Everything else is torchvision's
and lightly's. The encoder is saved as a file of weights, and measured by our
own k-NN and logistic regression. The result goes to
docs/measurements/results.json.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import lightly
import numpy as np
import torch
from lightly import loss as losses
from ml_collections import ConfigDict
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from configs import comparison  # noqa: E402
from docs import results  # noqa: E402
from imsvd_jax import data  # noqa: E402
from imsvd_jax.evaluation import knn, logistic, protocols  # noqa: E402
from imsvd_jax.evaluation.features import Features  # noqa: E402
from imsvd_jax.models.resnet import STEMS  # noqa: E402

SPLITS = ("train", "eval")


def criterion(config: ConfigDict) -> torch.nn.Module:
  """Returns lightly's loss of the recipe's objective, with its settings."""
  weights = config.objective[config.objective.name]
  if config.objective.name == "simclr":
    return losses.NTXentLoss(temperature=weights.temperature)
  if config.objective.name == "barlow_twins":
    return losses.BarlowTwinsLoss(lambda_param=weights.redundancy_weight)
  return losses.VICRegLoss(
    lambda_param=weights.invariance_weight,
    mu_param=weights.variance_weight,
    nu_param=weights.covariance_weight,
  )


class Backbone(ResNet):
  """torchvision's ResNet with one block in each of three scaled stages."""

  def __init__(self, config: ConfigDict):
    self.filters = round(64 * config.model.width_multiplier)
    super().__init__(BasicBlock, [1, 1, 1, 1])
    size, stride, pool = STEMS[config.model.stem]
    self.conv1 = torch.nn.Conv2d(
      config.data.channels, self.filters, size, stride, size // 2, bias=False
    )
    self.bn1 = torch.nn.BatchNorm2d(self.filters)
    if not pool:
      self.maxpool = torch.nn.Identity()
    self.layer4 = self.fc = torch.nn.Identity()
    self.avgpool = torch.nn.AdaptiveAvgPool2d(config.model.pool_grid)
    self.num_features = 4 * self.filters * config.model.pool_grid**2

  def _make_layer(self, block: Any, planes: int, *rest: Any, **named: Any):
    if planes == 64:
      self.inplanes = self.filters
    return super()._make_layer(
      block, planes * self.filters // 64, *rest, **named
    )


def network(config: ConfigDict) -> torch.nn.Module:
  """Returns backbone and projector."""
  layers: list[torch.nn.Module] = [Backbone(config)]
  widths = (layers[0].num_features, *config.model.projector)
  for inputs, outputs in itertools.pairwise(widths[:-1]):
    layers += [
      torch.nn.Linear(inputs, outputs),
      torch.nn.BatchNorm1d(outputs),
      torch.nn.ReLU(),
    ]
  layers.append(torch.nn.Linear(*widths[-2:], bias=False))
  return torch.nn.Sequential(*layers)


class Views(torch.utils.data.Dataset):
  """Two random views of each image."""

  def __init__(self, images: np.ndarray, config: ConfigDict):
    view = config.views.view1
    self._images = images
    self._transform = transforms.Compose(
      [
        transforms.ToPILImage(),
        transforms.RandomResizedCrop(
          view.size, view.crop_scale, view.crop_ratio
        ),
        transforms.RandomHorizontalFlip(view.flip_prob),
        transforms.RandomApply(
          [transforms.ColorJitter(view.brightness, view.contrast)],
          view.jitter_prob,
        ),
        transforms.ToTensor(),
        transforms.Normalize(config.data.mean, config.data.std),
      ]
    )

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    image = self._images[index]
    return self._transform(image), self._transform(image)


def learning_rate(config: ConfigDict, step: int, steps: int) -> float:
  """Returns the rate of a step: linear warm-up, then a cosine."""
  optimizer = config.optimizer
  peak = optimizer.base_learning_rate * config.batch_size / 256
  warmup = round(steps * optimizer.warmup_epochs / config.epochs)
  if step < warmup:
    return peak * step / warmup
  share = (step - warmup) / (steps - warmup)
  low = optimizer.final_fraction
  return peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)


def train(config: ConfigDict, images: np.ndarray) -> tuple[Any, float]:
  """Returns the trained network in evaluation mode, and images/s."""
  torch.manual_seed(config.seed)
  loader = torch.utils.data.DataLoader(
    Views(images, config),
    config.batch_size,
    shuffle=True,
    drop_last=True,
    num_workers=len(os.sched_getaffinity(0)),
    persistent_workers=True,
  )
  model, loss_of = network(config), criterion(config)
  adam = config.optimizer.name == "adamw"
  settings = {"weight_decay": config.optimizer.weight_decay}
  optimizer = (
    torch.optim.AdamW(model.parameters(), **settings)
    if adam
    else torch.optim.SGD(
      model.parameters(), 0.1, momentum=config.optimizer.momentum, **settings
    )
  )
  steps = int(config.epochs * len(images) / config.batch_size)
  start = time.perf_counter()
  for step, views in enumerate(itertools.islice(_forever(loader), steps)):
    for group in optimizer.param_groups:
      group["lr"] = learning_rate(config, step, steps)
    optimizer.zero_grad()
    loss = loss_of(*map(model, views))
    loss.backward()
    optimizer.step()
    if step % config.log.every_steps == 0:
      speed = (step + 1) * config.batch_size / (time.perf_counter() - start)
      print(
        f"step {step}/{steps} loss {loss.item():.4f} {speed:.0f} images/s",
        file=sys.stderr,
        flush=True,
      )
  seconds = time.perf_counter() - start
  return model.eval(), steps * config.batch_size / seconds


def _forever(loader: Any) -> Iterator[Any]:
  while True:
    yield from loader


def features(backbone: Any, source: Any, config: ConfigDict) -> np.ndarray:
  """Returns the features [n, F] of whole images."""
  mean = np.asarray(config.data.mean, np.float32)
  std = np.asarray(config.data.std, np.float32)
  found = []
  with torch.no_grad():
    for part in np.array_split(source.images, len(source.images) // 500):
      x = (part.astype(np.float32) / 255 - mean) / std
      found.append(backbone(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy())
  return np.concatenate(found)


def main() -> None:
  """Trains, measures and stores one objective."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument(
    "--objective", choices=("simclr", "vicreg", "barlow_twins"), required=True
  )
  parser.add_argument("--workdir", type=pathlib.Path, default="runs/lightly")
  parser.add_argument("--epochs", type=float, help="the recipe's if left out")
  flags = parser.parse_args()
  config = comparison.get_config(f"fashion-{flags.objective}")
  if flags.epochs:
    config.epochs = flags.epochs
  train_set, test_set = (data.make_source(config.data, s) for s in SPLITS)
  start, cpu = time.perf_counter(), results.cpu_seconds()
  model, speed = train(config, train_set.images)
  backbone = model[0]
  flags.workdir.mkdir(parents=True, exist_ok=True)
  torch.save(backbone.state_dict(), flags.workdir / f"{flags.objective}.pth")
  splits = [
    Features(features(backbone, source, config), source.labels)
    for source in (train_set, test_set)
  ]
  neighbors = protocols.final(config.eval)["knn/final"]
  ranks = next(iter(knn.knn_ranks(*splits, neighbors).values()))
  linear = logistic.logistic_regression(*splits, protocols.Lbfgs())
  row = {
    "minutes": round((time.perf_counter() - start) / 60, 1),
    "cpu_minutes": round((results.cpu_seconds() - cpu) / 60, 1),
    "images/s": round(speed),
    "cores": len(os.sched_getaffinity(0)),
    "load": round(os.getloadavg()[2], 1),
    "torch": torch.__version__,
    "lightly": lightly.__version__,
    "date": datetime.date.today().isoformat(),
    "trained": {
      "knn": round(100 * float((ranks == 0).mean()), 2),
      "lbfgs": round(100 * linear.accuracy.top1, 2),
    },
  }
  print(json.dumps(row))
  if not flags.epochs:
    key = f"lightly-{flags.objective}-seed{config.seed}"
    results.store({**results.stored(), key: row})


if __name__ == "__main__":
  main()
