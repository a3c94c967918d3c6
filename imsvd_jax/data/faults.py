"""Unreadable images: found, named once in the log, replaced or refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import execution, image_files
from imsvd_jax.data.source import Source

logger = logging.getLogger(__name__)

# Records to try in place of an unreadable one, itself included.
NUM_PROBES = 16

# Batches without an unreadable image until the fast pipeline is used again.
PATIENCE = 100

_PREFETCH = 2  # Batches made ahead.

# (first step, careful) -> batches from that step on.
Build = Callable[[int, bool], tf.data.Dataset]


class Batches(Iterator[dict[str, Any]]):
  """Iterates over batches of NumPy arrays and counts unreadable images.

  Catching errors costs time for every image. So a fast pipeline makes the
  batches until it fails; from that batch on a careful one makes them, until
  `PATIENCE` batches in a row had no error. Both give the same batches, because
  a batch is a function of its step. Opening a pipeline also takes time, so each
  return to the fast one takes twice as many batches as the one before.

  Attributes:
    bad_images: Number of unreadable images in the batches taken so far.
  """

  def __init__(
    self, build: Build, source: Source, first_step: int, remedy: str
  ) -> None:
    """Opens the pipeline; `remedy` ends "Cannot read image x; {remedy}."."""
    self.bad_images = 0
    self._build = build
    self._source = source
    self._step = first_step
    self._remedy = remedy
    self._careful = False
    self._patience = PATIENCE
    self._good_batches = 0  # In a row, made by the careful pipeline.
    self._bad_in_a_row = 0  # Images of whole batches.
    self._batches = self._open()

  def _open(self) -> Iterator[dict[str, Any]]:
    # Nothing here needs AutoGraph, which takes time and warns about lambdas.
    build = tf.autograph.experimental.do_not_convert(self._build)
    dataset = build(self._step, self._careful).prefetch(_PREFETCH)
    dataset = dataset.with_options(execution.pipeline_options())
    return dataset.as_numpy_iterator()

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
      self._try_fast_pipeline(bad)
    return batch

  def _try_fast_pipeline(self, bad: np.ndarray) -> None:
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
    """Raises if a run would train mostly on black images.

    Without a stream, a black image means that NUM_PROBES images in a row are
    unreadable. A stream cannot replace an image, so single black ones are
    expected; NUM_PROBES of them in batches without any other are not.
    """
    self._bad_in_a_row = self._bad_in_a_row + len(bad) if bad.all() else 0
    exhausted = black.any() and self._source.stream is None
    if not exhausted and self._bad_in_a_row < NUM_PROBES:
      return
    index = int(indices[black if exhausted else bad][0])
    name = self._source.describe(index)
    others = (
      f"the {min(NUM_PROBES, self._source.num_examples)} images from it on"
      if exhausted
      else f"the {self._bad_in_a_row} images drawn with it"
    )
    raise UserError(
      f"Cannot read image {name} or any of {others}; repair or remove the"
      f" unreadable images. The first one: {why_bad(self._source, index)}."
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
          " data.on_bad_image='replace'. The reason:"
          f" {why_bad(self._source, index)}."
        )
      logger.warning(
        "Cannot read image %s (%s); %s.",
        name,
        why_bad(self._source, index),
        self._remedy,
      )


def why_bad(source: Source, index: int) -> str:
  """Returns why an image cannot be read, in a few words.

  Reads it once more: a pipeline only knows that it failed.
  """
  if source.fetch is None:
    return "damaged, or more pixels than data.max_pixels"
  try:
    record = source.fetch(tf.constant(index, tf.int64))
  except tf.errors.NotFoundError:
    return "there is no such file; a broken link?"
  except tf.errors.PermissionDeniedError:
    return "permission denied"
  except tf.errors.OpError as error:
    return error.message.splitlines()[0].rpartition("}} ")[2]
  if record.dtype != tf.string:
    return "its pixels cannot be resized"
  return image_files.why_unreadable(record.numpy(), source.decoding)


def first_readable(
  views_of: Callable[[dict[str, tf.Tensor]], list[tf.Tensor]],
  record: dict[str, tf.Tensor],
  source: Source,
  blank: list[tf.Tensor],
  num_probes: int = NUM_PROBES,
) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
  """Returns views of a record, of the next readable one, or blank ones.

  Uses a dataset within the dataset, because only `ignore_errors` catches an
  error in a graph. A stream cannot read other records, so it gives blank views.

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
