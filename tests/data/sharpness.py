"""How sharp training views are beside PIL's, and what they cost.

  python -m tests.data.sharpness > docs/measurements/sharpness.json
  python docs/tables.py

Two views of each of scikit-learn's two photographs (640 x 427, JPEG), six
draws. The contenders take turns; CPU time of decoding once and cutting both
views is the mean over images of the least of five rounds, on one thread.
"""

import datetime
import json
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn import datasets

from imsvd_jax.benchmarks import pil_reference
from imsvd_jax.data import crops, decode
from imsvd_jax.data.source import Source
from tests.data.made_sources import encode

# Side of the view, and its share of the area.
VIEWS = {224: (0.08, 1.0), 96: (0.05, 0.4), 32: (0.08, 1.0)}
FILTERS = ("bilinear", "bicubic")


def gradient_energy(view: np.ndarray) -> float:
  """Mean square of the differences of neighboring pixels."""
  view = np.asarray(view, np.float64)
  return sum((np.diff(view, axis=axis) ** 2).mean() for axis in (0, 1))


def work(size: int, draws: int):
  """Yields encoded photographs, uniform numbers and the boxes of two views."""
  view_list = [crops.Crop(size, VIEWS[size], (3 / 4, 4 / 3), 0.5)] * 2
  rng = np.random.default_rng(0)
  for pixels in datasets.load_sample_images().images:
    contents = encode(Image.fromarray(pixels), "JPEG")
    sides = (tf.constant(float(side)) for side in pixels.shape[:2])
    height, width = sides
    for _ in range(draws):
      uniforms = rng.random((2, crops.NUM_UNIFORMS), np.float32)
      columns = crops.random_boxes(uniforms, height, width, view_list)
      columns = (column.numpy() for column in columns)
      boxes = [tuple(map(int, box)) for box in zip(*columns, strict=True)]
      yield contents, uniforms, boxes, view_list


def ours(interpolation: str, size: int, antialias: bool) -> Callable:
  """Returns a function from a task of `work` to its views, as in training."""
  source = Source(
    "test", 1, train_interpolation=interpolation, antialias=antialias
  )
  ((*_, view_list),) = list(work(size, 1))[:1]
  views = tf.function(
    lambda record, uniforms: decode.train_views(
      source, record, uniforms, view_list
    )[0],
    [
      tf.TensorSpec([], tf.string),
      tf.TensorSpec([2, crops.NUM_UNIFORMS], tf.float32),
    ],
    autograph=False,
  )
  return lambda contents, uniforms, *_: views(contents, uniforms).numpy()


def pil(interpolation: str) -> Callable:
  """The same by PIL."""
  return lambda contents, _, boxes, view_list: pil_reference.views_of(
    contents, boxes, view_list, interpolation.upper()
  )


def energy(views_of: Callable, size: int, draws: int) -> float:
  """Returns the mean gradient energy of all views."""
  views = [view for task in work(size, draws) for view in views_of(*task)]
  return float(np.mean([gradient_energy(view) for view in views]))


def measure(interpolation: str, size: int) -> dict[str, float]:
  """Returns energies relative to PIL's, and milliseconds for an image."""
  contenders = {
    "plain": ours(interpolation, size, False),
    "antialiased": ours(interpolation, size, True),
    "PIL": pil(interpolation),
  }
  tasks = list(work(size, 6))
  found = {
    name: energy(views_of, size, 6) for name, views_of in contenders.items()
  }
  found = {f"energy {name}": v / found["PIL"] for name, v in found.items()}
  times = np.empty([len(contenders), 5, len(tasks)])
  for round_, number in np.ndindex(times.shape[1:]):
    for i, views_of in enumerate(contenders.values()):
      start = time.process_time()
      views_of(*tasks[number])
      times[i, round_, number] = time.process_time() - start
  least = 1e3 * times.min(axis=1).mean(axis=1)
  return found | {
    f"ms {name}": v for name, v in zip(contenders, least, strict=True)
  }


def main() -> None:
  tf.config.threading.set_intra_op_parallelism_threads(1)
  tf.config.threading.set_inter_op_parallelism_threads(1)
  rows = [
    {"size": size, "area": VIEWS[size], "filter": name, **measure(name, size)}
    for size in VIEWS
    for name in FILTERS
  ]
  date = datetime.datetime.now(datetime.UTC).date().isoformat()
  about = {"date": date, "command": "python -m tests.data.sharpness"}
  print(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
  main()
