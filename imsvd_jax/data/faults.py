"""Unreadable images: found, named once in the log, replaced or refused."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data.source import Source


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


# How many records to try where one is unreadable, itself included.
NUM_PROBES = 16


# Batches without an unreadable image after which to stop looking for them.
_PATIENCE = 100


# (first step, careful) -> batches from that step on.
_Build = Callable[[int, bool], tf.data.Dataset]


_PREFETCH = 2  # Batches made ahead.


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


def first_readable(
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
