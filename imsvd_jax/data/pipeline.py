"""The host half of the path of a batch: order, decode, crop, batch.

Training is a sequence of positions 0, 1, 2, ... without end: position p is in
epoch p // n and takes the image at p % n of that epoch's permutation. Step s
with batch size B takes positions [s * B, (s + 1) * B), and process k of P the
k-th contiguous part of them. So no image is ever dropped, each comes exactly
once per epoch, a batch may hold the end of one epoch and the start of the next,
the global batch is the same for any number of processes, and step s can be
computed without the steps before it.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax import errors
from imsvd_jax.data import crops, decode, stateless
from imsvd_jax.data.source import Source
from imsvd_jax.errors import UserError

# Streams of random numbers that must not share keys.
_ORDER, _CROPS = 1, 2
# How many records to try where one is unreadable, itself included.
NUM_PROBES = 16
# Batches without an unreadable image after which to stop looking for them.
_PATIENCE = 100
_PREFETCH = 2  # Batches made ahead.
_NO_END = np.iinfo(np.int64).max


# (first step, careful) -> batches from that step on.
_Build = Callable[[int, bool], tf.data.Dataset]


class Batches(Iterator[dict[str, Any]]):
  """Iterates over batches of NumPy arrays and counts unreadable images.

  Catching errors costs time for every image, so batches are made by the fast
  pipeline until it fails, and from that batch on by the careful one, until as
  many as `_PATIENCE` had no error. Both give the same batches, because batches
  are functions of their step. To open a pipeline takes time too: each return to
  the fast one takes twice as many batches as the last.

  Attributes:
    bad_images: How many images of the batches taken so far could not be read.
  """

  def __init__(
    self, build: _Build, source: Source, first_step: int, remedy: str
  ):
    self.bad_images = 0
    self._build = build
    self._source = source
    self._step = first_step
    self._remedy = remedy
    self._careful = False
    self._patience = _PATIENCE
    self._good_batches = 0  # In a row, made by the careful pipeline.
    self._bad_in_a_row = 0  # Images of whole batches.
    self._batches = self._open()

  def _open(self) -> Iterator[dict[str, Any]]:
    # Nothing here needs AutoGraph, which takes time and warns about lambdas.
    build = tf.autograph.experimental.do_not_convert(self._build)
    dataset = build(self._step, self._careful).prefetch(_PREFETCH)
    return dataset.with_options(options()).as_numpy_iterator()

  def __iter__(self) -> Batches:
    return self

  def __next__(self) -> dict[str, Any]:
    try:
      batch = next(self._batches)
    except tf.errors.OpError:
      if self._careful:
        raise
      self._careful = True
      self._batches = self._open()
      batch = next(self._batches)
    self._step += 1
    black = batch.pop("black", None)
    bad = batch.get("bad")
    if bad is not None:
      if bad.any():
        self.bad_images += int(bad.sum())
        self._report(batch["index"][bad])
      if black is not None:
        self._stop_without_images(batch["index"], bad, black)
      self._be_fast_again(bad)
    return batch

  def _be_fast_again(self, bad: np.ndarray) -> None:
    if not self._careful:
      return
    self._good_batches = 0 if bad.any() else self._good_batches + 1
    if self._good_batches < self._patience:
      return
    self._careful, self._good_batches = False, 0
    self._patience *= 2
    self._batches = self._open()

  def _stop_without_images(
    self, indices: np.ndarray, bad: np.ndarray, black: np.ndarray
  ) -> None:
    """Raises where a run would train on black images, or on few others.

    A stream has nothing at hand to replace an image by, and some black ones are
    no reason to stop it; small batches of nothing else may be chance, several
    in a row are not.
    """
    self._bad_in_a_row = self._bad_in_a_row + len(bad) if bad.all() else 0
    exhausted = black.any() and self._source.stream is None
    if not exhausted and self._bad_in_a_row < NUM_PROBES:
      return
    name = self._source.describe(int(indices[black if exhausted else bad][0]))
    tried = min(NUM_PROBES, self._source.num_examples)
    what = (
      f"nor any of the {tried} images from there on"
      if exhausted
      else f"nor any of the {self._bad_in_a_row} images that were drawn with it"
    )
    raise UserError(
      f"Cannot read image {name}, {what}; repair or remove what cannot be read."
    )

  def _report(self, indices: np.ndarray) -> None:
    """Names each unreadable image once in the log, or stops the run."""
    for index in map(int, indices):
      name = self._source.describe(index)
      if name in self._source.named:
        continue
      self._source.named.add(name)
      if self._source.on_bad_image == "error":
        raise UserError(
          f"Cannot read image {name}; repair or remove it, or set"
          " data.on_bad_image='replace'."
        )
      logging.warning("Cannot read image %s; %s.", name, self._remedy)


def options() -> tf.data.Options:
  """Returns how the data pipeline is executed."""
  options = tf.data.Options()
  options.deterministic = True
  options.autotune.enabled = True
  options.threading.private_threadpool_size = num_threads()
  # Images are the unit of parallelism; threads within one only add overhead.
  options.threading.max_intra_op_parallelism = 1
  return options


def num_threads() -> int:
  """Returns the number of cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def view_crops(views: Any) -> list[crops.Crop]:
  """Returns what the host does for each view: two global, then the local ones.

  Args:
    views: config.views: `view1`, `view2`, `local`, `num_local`.
  """
  if views.view1.size != views.view2.size:
    raise UserError(
      f"views.view1.size is {views.view1.size} and views.view2.size is"
      f" {views.view2.size}; expected the same size for both global views."
    )
  settings = [views.view1, views.view2] + [views.local] * views.num_local
  return [_view_crop(view) for view in settings]


def _view_crop(view: Any) -> crops.Crop:
  scale = errors.pair("crop_scale", view.crop_scale)
  ratio = errors.pair("crop_ratio", view.crop_ratio)
  crop = crops.Crop(view.size, scale, ratio, view.flip_prob)
  _check_crop(crop)
  return crop


def _check_crop(crop: crops.Crop) -> None:
  if not 0 < crop.scale[0] <= crop.scale[1] <= 1:
    raise UserError(
      f"crop_scale is {crop.scale}; expected 0 < smallest <= largest <= 1."
    )
  if not 0 < crop.ratio[0] <= crop.ratio[1]:
    raise UserError(f"crop_ratio is {crop.ratio}; expected 0 < low <= high.")


def local_batch_size(batch_size: int, process_count: int) -> int:
  """Returns this process's part of a global batch."""
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch_size is {batch_size}; expected a positive multiple of the"
      f" {process_count} processes."
    )
  return batch_size // process_count


# --- Training -----------------------------------------------------------------


def train_batches(
  source: Source,
  *,
  views: Any,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Returns an endless iterator over this process's part of each batch.

  A function of its arguments: the same (seed, epoch, index) gives the same
  views at any step, batch size or number of processes.

  Args:
    source: Where images come from.
    views: config.views, see `view_crops`.
    batch_size: Images per step over all processes (B).
    seed: Seed of the order and of the crops.
    start_step: The first step to return; costs nothing to reach.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    Batches {"views": (uint8 [B / P, 2, S, S, C], and with local views uint8
    [B / P, L, s, s, C]), "index": int32 [B / P], "epoch": int32 [B / P]}, and
    "bad": bool [B / P], which images could not be read and were replaced;
    absent where the source holds its images decoded.
  """
  remedy = f"{'a black' if source.stream else 'another'} image takes its place"
  return _cropped_batches(
    source,
    view_crops(views),
    remedy=remedy,
    batch_size=batch_size,
    seed=seed,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
  )


def labelled_epochs(
  source: Source,
  *,
  crop: crops.Crop,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Callable[[int], Iterator[dict[str, np.ndarray]]]:
  """Returns epochs of what `train_batches` gives, of one crop with its label.

  A batch may reach from one epoch into the next, so that the first E epochs
  show every image E times, but for the rounding of the last batch.

  Args:
    source: Where images come from; it has labels.
    crop: What to cut.
    batch_size: See `train_batches`, as all that follow.
    seed: Seed of the order and of the crops.
    process_index: Which process this is.
    process_count: Number of processes.

  Returns:
    A function to be called with 0, 1, 2, ... in turn, each time for the batches
    {"image": uint8 [b, S, S, C], "label": int32 [b], "index": int32 [b],
    "epoch": int32 [b], "mask": bool [b]} of that epoch, b = B / P; mask is
    False where an image cannot be read.
  """
  _check_crop(crop)
  batches = _cropped_batches(
    source,
    [crop],
    remedy="it teaches nothing",
    with_labels=True,
    batch_size=batch_size,
    seed=seed,
    start_step=0,
    process_index=process_index,
    process_count=process_count,
  )

  def epoch_of(epoch: int) -> Iterator[dict[str, np.ndarray]]:
    ends = [
      round(e * source.num_examples / batch_size) for e in (epoch, epoch + 1)
    ]
    for batch in itertools.islice(batches, ends[1] - ends[0]):
      views = batch.pop("views")
      batch.pop("bad", None)  # `mask` says it.
      yield {"image": views[0][:, 0], **batch}

  return epoch_of


def _cropped_batches(
  source: Source,
  view_list: list[crops.Crop],
  *,
  remedy: str,
  with_labels: bool = False,
  batch_size: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> Batches:
  """Batches of the given crops; see `train_batches`."""
  size = local_batch_size(batch_size, process_count)

  def build(step: int, careful: bool) -> tf.data.Dataset:
    dataset = ordered_records(
      source,
      batch_size=batch_size,
      num_views=len(view_list),
      seed=seed,
      start_step=step,
      process_index=process_index,
      process_count=process_count,
    )
    label_of = _label_reader(source) if with_labels else None
    if source.small_images:
      return _crop_arrays(dataset, source, view_list, label_of)
    return _crop_records(dataset, source, view_list, size, careful, label_of)

  return Batches(build, source, start_step, remedy)


def _label_reader(source: Source) -> Callable[[dict[str, tf.Tensor]], Any]:
  """Returns a function of a record, or of a batch of them, to its labels."""
  if source.labels is None:
    return lambda record: source.stream.parse(record["serialized"])["label"]
  labels = tf.constant(source.labels, tf.int32)
  return lambda record: tf.gather(labels, record["index"])


def ordered_records(
  source: Source,
  *,
  batch_size: int,
  num_views: int,
  seed: int,
  start_step: int,
  process_index: int,
  process_count: int,
) -> tf.data.Dataset:
  """This process's part of each batch, before any image is read.

  Returns:
    Batches of {"epoch", "index": int64 [b], "uniforms": float32 [b, V,
    NUM_UNIFORMS], and for a stream "serialized": strings [b]}.
  """
  key = stateless.key(seed, _ORDER)
  size = local_batch_size(batch_size, process_count)

  def order(step: tf.Tensor) -> dict[str, tf.Tensor]:
    first = step * batch_size + process_index * size
    positions = first + tf.range(size, dtype=tf.int64)
    epoch = positions // source.num_examples
    index = stateless.permute(
      positions % source.num_examples,
      source.num_examples,
      stateless.fold_in(key, epoch),
    )
    return {"epoch": epoch, "index": index}

  if source.stream is None:
    batches = tf.data.Dataset.range(start_step, _NO_END).map(order)
  else:
    first = start_step * size
    records = source.stream.train(key, first, process_index, process_count)
    batches = records.batch(size)
  return batches.map(lambda batch: _add_uniforms(batch, seed, num_views))


def _add_uniforms(
  batch: dict[str, tf.Tensor], seed: int, num_views: int
) -> dict[str, tf.Tensor]:
  """Adds the crops' random numbers, float32 [b, V, NUM_UNIFORMS]."""
  keys = stateless.fold_in(stateless.key(seed, _CROPS), batch["epoch"])
  keys = stateless.fold_in(keys, batch["index"])
  keys = stateless.fold_in(
    keys[:, tf.newaxis], tf.range(num_views, dtype=tf.int64)
  )
  return batch | {"uniforms": stateless.uniform(keys, crops.NUM_UNIFORMS)}


def _crop_arrays(
  dataset: tf.data.Dataset,
  source: Source,
  view_list: list[crops.Crop],
  label_of: Callable[[dict[str, tf.Tensor]], Any] | None,
) -> tf.data.Dataset:
  """Cuts every view of a whole batch out of images of one size."""
  pixels = tf.constant(source.images)
  height, width = map(float, source.images.shape[1:3])

  def cut(batch: dict[str, tf.Tensor]) -> dict[str, Any]:
    images = tf.cast(tf.gather(pixels, batch["index"]), tf.float32)
    sides = [tf.fill(tf.shape(batch["index"]), s) for s in (height, width)]
    boxes = crops.random_boxes(batch["uniforms"], *sides, view_list)
    views = [
      crops.resample(
        images,
        crops.Box(*(side[:, number] for side in boxes)),
        size=crop.size,
        kernel=source.interpolation,
        clip_to_box=True,
      )
      for number, crop in enumerate(view_list)
    ]
    groups = [views[:2], views[2:]] if len(views) > 2 else [views]
    element = _train_element(batch, [tf.stack(g, axis=1) for g in groups])
    if label_of is not None:
      readable = tf.ones_like(element["index"], tf.bool)
      element |= {"label": label_of(batch), "mask": readable}
    return element

  return dataset.map(cut, num_parallel_calls=num_threads())


def _crop_records(
  dataset: tf.data.Dataset,
  source: Source,
  view_list: list[crops.Crop],
  size: int,
  careful: bool,
  label_of: Callable[[dict[str, tf.Tensor]], Any] | None,
) -> tf.data.Dataset:
  """Reads images one by one, cuts their views, and batches them again."""
  blank = _blank_views(source, view_list)
  read = source.reader()

  def cut(record: dict[str, tf.Tensor]) -> dict[str, Any]:
    views_of = lambda record: decode.train_views(
      source, read(record), record["uniforms"], view_list
    )
    black = tf.constant(False)
    if careful:
      views, bad, black = _first_readable(views_of, record, source, blank)
    else:
      views, bad = views_of(record), tf.constant(False)
    element = _train_element(record, views) | {"bad": bad}
    if label_of is not None:
      element |= {"label": label_of(record), "mask": ~bad}
      black = tf.constant(False)  # Masked out, so that no image is missed.
    return element | {"black": black}

  dataset = dataset.unbatch().map(cut, num_parallel_calls=num_threads())
  return dataset.batch(size, drop_remainder=True)


def _blank_views(
  source: Source, view_list: list[crops.Crop]
) -> list[tf.Tensor]:
  """Black views, shaped like those of `decode.train_views`."""
  groups = [view_list[:2], view_list[2:]] if len(view_list) > 2 else [view_list]
  return [
    tf.zeros([len(g), g[0].size, g[0].size, source.channels], tf.uint8)
    for g in groups
  ]


def _first_readable(
  views_of: Callable[[dict[str, tf.Tensor]], list[tf.Tensor]],
  record: dict[str, tf.Tensor],
  source: Source,
  blank: list[tf.Tensor],
  num_probes: int = NUM_PROBES,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
  """Views of a record, or of the next that can be read, or blank ones.

  A dataset within the dataset, because its `ignore_errors` is the only way to
  catch an error in a graph. A stream has no other records at hand: blank.

  Returns:
    The views, whether they are not this record's, and whether they are blank.
  """

  def attempt(probe: tf.Tensor) -> tuple[Any, tf.Tensor, tf.Tensor]:
    index = (record["index"] + probe) % source.num_examples
    views = views_of(record | {"index": index})
    return tuple(views), probe > 0, tf.constant(False)

  attempts = tf.data.Dataset.range(1 if source.stream else num_probes)
  attempts = attempts.map(attempt).ignore_errors(log_warning=False)
  true = tf.constant(True)
  last = tf.data.Dataset.from_tensors((tuple(blank), true, true))
  views, *flags = attempts.concatenate(last).take(1).get_single_element()
  return list(views), *flags


def _train_element(
  record: dict[str, tf.Tensor], views: list[tf.Tensor]
) -> dict[str, Any]:
  return {
    "views": tuple(views),
    "index": tf.cast(record["index"], tf.int32),
    "epoch": tf.cast(record["epoch"], tf.int32),
  }


# --- Evaluation ---------------------------------------------------------------


def eval_batches(
  source: Source,
  *,
  batch_size: int,
  resize: int,
  crop: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Batches:
  """Returns an iterator over each image once, over all processes together.

  Process k of P reads images [k * c, (k + 1) * c), c = ceil(n / P); every
  process returns the same number of batches. The shorter side is resized to
  `resize` and the centre cropped; an image that has the right size already is
  left as it is.

  Args:
    source: Where images come from.
    batch_size: Images per batch over all processes (b * P).
    resize: Size of the shorter side before the crop.
    crop: Height and width of the result.
    process_index: Which process this is.
    process_count: Number of processes (P).

  Returns:
    Batches {"image": uint8 [b, crop, crop, C], "label": int32 [b] (absent when
    the source has none; [b, classes] where an image may have several),
    "index": int32 [b], "mask": bool [b]}. Padding has mask False, label -1 and
    index -1; an image that cannot be read has mask False. "bad": bool [b] says
    which (absent as in training).
  """
  if crop > resize:
    raise UserError(
      f"data.crop is {crop}, larger than data.resize, {resize}; expected"
      " crop <= resize."
    )
  size = local_batch_size(batch_size, process_count)
  share = -(-source.num_examples // process_count)
  num_batches = -(-share // size)
  first = process_index * share
  last = min(first + share, source.num_examples)

  def build(first_batch: int, careful: bool) -> tf.data.Dataset:
    start = first + first_batch * size
    end = first + num_batches * size
    dataset = tf.data.Dataset.range(start, end).map(
      lambda index: {"index": tf.where(index < last, index, -1)}
    )
    if source.stream is not None:
      dataset = _padded(source.stream.evaluate(start, last), end - start)
    if source.small_images:
      dataset = _eval_arrays(dataset.batch(size), source, resize, crop)
    else:
      dataset = _eval_records(dataset, source, resize, crop, careful)
      dataset = dataset.batch(size)
    if source.labels is None:
      return dataset
    labels = tf.constant(source.labels, tf.int32)
    return dataset.map(lambda batch: _add_labels(batch, labels))

  return Batches(build, source, 0, "the evaluation leaves it out")


def _padded(dataset: tf.data.Dataset, length: int) -> tf.data.Dataset:
  """Fills a stream up with empty records of index -1."""
  empty = tf.data.Dataset.from_tensors(
    {"serialized": tf.constant(""), "index": tf.constant(-1, tf.int64)}
  )
  return dataset.concatenate(empty.repeat()).take(length)


def _eval_arrays(
  dataset: tf.data.Dataset, source: Source, resize: int, crop: int
) -> tf.data.Dataset:
  pixels = tf.constant(source.images)
  height, width = source.images.shape[1:3]

  def cut(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    index = tf.maximum(batch["index"], 0)
    images = tf.gather(pixels, index)
    if (height, width, resize) != (crop, crop, crop):
      sides = [tf.fill(tf.shape(index), float(s)) for s in (height, width)]
      images = crops.resample(
        tf.cast(images, tf.float32),
        crops.centre_box(*sides, resize, crop),
        size=crop,
        kernel=source.interpolation,
        clip_to_box=False,
      )
    return _eval_element(batch, images)

  return dataset.map(cut, num_parallel_calls=num_threads())


def _eval_records(
  dataset: tf.data.Dataset,
  source: Source,
  resize: int,
  crop: int,
  careful: bool,
) -> tf.data.Dataset:
  blank = tf.zeros([crop, crop, source.channels], tf.uint8)
  label_shape = [source.num_classes] if source.multi_label else []
  read = source.reader()
  view_of = lambda record: [
    decode.eval_view(source, read(record), resize, crop)
  ]

  def view(record: dict[str, tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    if not careful:
      return view_of(record)[0], tf.constant(False)
    views, bad, _ = _first_readable(view_of, record, source, [blank], 1)
    return views[0], bad

  def cut(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    image, bad = tf.cond(
      record["index"] >= 0,
      lambda: view(record),
      lambda: (blank, tf.constant(False)),
    )
    element = _eval_element(record, image)
    element = element | {"mask": element["mask"] & ~bad, "bad": bad}
    if source.stream is not None and source.num_classes:
      element["label"] = _stream_label(source, record, label_shape)
    return element

  return dataset.map(cut, num_parallel_calls=num_threads())


def _stream_label(
  source: Source, record: dict[str, tf.Tensor], shape: list[int]
) -> tf.Tensor:
  return tf.cond(
    record["index"] >= 0,
    lambda: source.stream.parse(record["serialized"])["label"],
    lambda: tf.fill(shape, -1),
  )


def _eval_element(
  record: dict[str, tf.Tensor], images: tf.Tensor
) -> dict[str, tf.Tensor]:
  return {
    "image": images,
    "index": tf.cast(record["index"], tf.int32),
    "mask": record["index"] >= 0,
  }


def _add_labels(
  batch: dict[str, tf.Tensor], labels: tf.Tensor
) -> dict[str, tf.Tensor]:
  label = tf.gather(labels, tf.maximum(batch["index"], 0))
  known = batch["index"] >= 0
  if labels.shape.rank == 2:
    known = known[:, tf.newaxis]
  return batch | {"label": tf.where(known, label, -1)}
