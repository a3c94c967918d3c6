"""Settings, images on disk and a tiny TFDS data set for the data tests."""

from __future__ import annotations

import functools
import io
from types import SimpleNamespace

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from sklearn import datasets

from imsvd_jax import data
from imsvd_jax.data import evaluation_batches, host_pipeline, packing
from imsvd_jax.data.faults import Batches
from imsvd_jax.data.pack_options import PackOptions
from imsvd_jax.data.source import Source


def data_settings(name: str, **overrides) -> SimpleNamespace:
  """config.data with small values."""
  settings = {
    "name": name,
    "path": "",
    "train_split": "train",
    "eval_split": "test",
    "num_examples": 0,
    "image_size": 16,
    "channels": 3,
    "resize": 16,
    "crop": 16,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "interpolation": "bicubic",
    "on_bad_image": "replace",
  }
  settings |= overrides
  return SimpleNamespace(**(settings | {"path": str(settings["path"])}))


def make(name: str, split: str = "train", **overrides) -> Source:
  """One split of a source with small values."""
  return data.make_source(data_settings(name, **overrides), split)


def pack(folder, output, *, on_bad_image="replace", **options) -> list[str]:
  """Packs a folder in squares of 48 pixels, without loss by default."""
  settings = {"path": folder, "on_bad_image": on_bad_image}
  splits = {"train": make("folder", **settings)}
  evaluation = make("folder", "eval", **settings)
  if evaluation is not None:
    splits["test"] = evaluation
  options = PackOptions(**({"size": 48, "format": "raw"} | options))
  return packing.pack(str(output), splits, options)


def train_batches(source: Source, batch_size: int, **arguments) -> Batches:
  """Training batches with seed 0 and two small views."""
  arguments = {"views": views(), "seed": 0} | arguments
  return host_pipeline.train_batches(source, batch_size=batch_size, **arguments)


def evaluated(source: Source, **arguments) -> dict[str, np.ndarray]:
  """All readable images, resized and cropped, with labels and indices."""
  batches = evaluation_batches.eval_batches(source, **arguments)
  return concatenate([{k: v[b["mask"]] for k, v in b.items()} for b in batches])


def concatenate(batches: list) -> dict:
  """One batch from the rows of several."""
  return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *batches)


def view(**overrides) -> SimpleNamespace:
  """The host's part of one view's settings."""
  settings = {
    "size": 16,
    "crop_scale": (0.2, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "flip_prob": 0.5,
  }
  return SimpleNamespace(**(settings | overrides))


def views(num_local: int = 0, **overrides) -> SimpleNamespace:
  """config.views: two global views, and local ones of half the size."""
  globals_ = view(**overrides)
  local = view(size=globals_.size // 2, crop_scale=(0.05, 0.4))
  return SimpleNamespace(
    view1=globals_, view2=globals_, local=local, num_local=num_local
  )


@functools.cache
def _photographs() -> list[Image.Image]:
  return [Image.fromarray(i) for i in datasets.load_sample_images().images]


def photograph(index: int, width: int = 60, height: int = 45) -> Image.Image:
  """A part of one of scikit-learn's two photographs, another for each index."""
  left, top = 37 * index % 300, 23 * index % 150
  box = (left, top, left + 340, top + 255)
  photo = _photographs()[index % 2]
  return photo.resize((width, height), Image.BICUBIC, box=box)


def pale(image: Image.Image) -> Image.Image:
  """The same image without dark and light levels.

  PIL clips to whole levels between the two passes of a bicubic resize, which
  shows where an edge overshoots the range.
  """
  return image.point(lambda level: 64 + level // 2)


def encode(image: Image.Image, file_format: str = "JPEG", **options) -> bytes:
  """The bytes of an image file."""
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


BAD_KEYS = (0, 3, 17, 18, 25, 39)  # Of forty images, those that are bad.


def bad_contents() -> dict[str, bytes]:
  """Six kinds of file that cannot be read as an image."""
  jpeg = encode(photograph(1))
  middle = len(jpeg) // 2
  return {
    "empty": b"",
    "text": b"this is not an image at all",
    "truncated": jpeg[:middle],
    "header_only": jpeg[:20],
    "garbage": np.random.default_rng(0).bytes(500),
    "corrupt_png": encode(photograph(2), "PNG")[:200],
  }


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
  """Forty real JPEGs in four classes, in several files."""

  VERSION = tfds.core.Version("1.0.0")
  FEATURES = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(encoding_format="jpeg"),
      "label": tfds.features.ClassLabel(names=["a", "b", "c", "d"]),
    }
  )

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=self.FEATURES)

  def _split_generators(self, dl_manager):
    return {"train": self._examples(40), "test": self._examples(10)}

  def _generate_examples(self):
    raise NotImplementedError

  def _examples(self, count):
    for i in range(count):
      image = np.asarray(photograph(i, 48 + i % 5, 40 + i % 7))
      yield i, {"image": image, "label": i % 4}


class TinySpoiledPhotos(TinyPhotos):
  """The same, with a record of each kind that cannot be read in train."""

  def _examples(self, count):
    bad = dict(zip(BAD_KEYS, bad_contents().values(), strict=True))
    for i, example in super()._examples(count):
      if count == 40 and i in bad:
        example["image"] = bad[i]  # TFDS takes bytes as they are.
      yield i, example
