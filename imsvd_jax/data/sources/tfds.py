"""Any image data set of TensorFlow Datasets: `data.name="tfds:cifar10"`.

The part after the colon is what `tfds.load` takes, with a configuration or a
version if wanted ("tfds:imagenet_resized/32x32"). `data.path` is TFDS's
data_dir, empty for its default. Splits are TFDS expressions: "train",
"train[:90%]", "train[10%:]+validation".

The data set must have been prepared: nothing is ever downloaded here.

Records are read undecoded. A split of at most `MAX_BYTES_IN_MEMORY` is read
once and kept in memory, where any record can be taken at any time: the order is
exact and the same for any number of processes. A larger one is a stream:

- An epoch reads the files in a random order, and process k of P takes records
  [k n / P, (k + 1) n / P) of the files laid end to end. So the union over
  processes is every record exactly once per epoch. The global batch depends on
  the number of processes, and where n is not a multiple of P the processes'
  epochs differ in length by one record.
- A process reads its files in groups of `FILES_PER_GROUP` at a time, taking
  records in turn and shuffling them in a buffer of `SHUFFLE_BUFFER`. TFDS has
  shuffled the records over the files when it wrote them.
- Starting in the middle of an epoch skips whole groups without reading them,
  and the rest of one group undecoded.

A record's index is its position in the split, the same in both cases.

Labels are the feature "label", or the only one of type ClassLabel. Without one,
a list of classes ("labels", or the only one of its kind) gives every image a 1
or 0 for each class; where there is also "labels_no_difficult", as in VOC, a
class that is in the first list alone gets -1: it does not count.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import decode, stateless
from imsvd_jax.data import source as source_lib

MAX_BYTES_IN_MEMORY = 1 << 30  # Of undecoded records.
FILES_PER_GROUP = 16
SHUFFLE_BUFFER = 2048  # Records; about 230 MB of ImageNet.

_NO_END = np.iinfo(np.int64).max

_Example = dict[str, tf.Tensor]


def make(settings: Any, split: str) -> source_lib.Source:
  """Returns one split of a prepared data set."""
  source_lib.reject_num_examples(settings)
  builder = _builder(settings)
  files = _Files(builder, split)
  parse, image, label, several = _parser(builder, settings)
  source = source_lib.Source(
    name=f"{settings.name} {split}",
    num_examples=files.num_examples,
    num_classes=label.num_classes or 0 if label else 0,
    label_names=tuple(label.names or ()) if label else (),
    multi_label=several,
    channels=settings.channels,
    interpolation=settings.interpolation,
    on_bad_image=settings.on_bad_image,
    stream=source_lib.Stream(files.train_stream, files.eval_stream, parse),
    describe=lambda index: f"{index} of {settings.name} {split}",
    # Versions are fixed; two preparations may still differ in their shards.
    stamp=lambda: f"{builder.info.full_name} {split} {files.num_bytes}",
  )
  if files.num_bytes > MAX_BYTES_IN_MEMORY:
    return source
  records = source.stream.evaluate(0, source.num_examples)
  return hold_in_memory(source, records, image.shape)


# --- What the data set is -----------------------------------------------------


def _builder(settings: Any) -> Any:
  """The builder of a data set that has been prepared."""
  # Imported here because it takes seconds, and other sources do without.
  import tensorflow_datasets as tfds

  name = settings.name.partition(":")[2]
  if not name:
    raise UserError(
      f"data.name is {settings.name!r}; expected the data set after a colon,"
      " for example 'tfds:cifar10'."
    )
  data_dir = settings.path or None
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except tfds.core.DatasetNotFoundError as error:
    base = name.partition("/")[0].partition(":")[0]
    close = difflib.get_close_matches(base, tfds.list_builders(), n=1)
    hint = f" Did you mean 'tfds:{close[0]}'?" if close else ""
    raise UserError(
      f"Unknown TensorFlow data set {name!r}.{hint} See"
      " https://www.tensorflow.org/datasets/catalog for the known ones."
    ) from error
  except (AssertionError, ValueError) as error:
    raise UserError(
      f"Cannot load {settings.name!r}: {str(error).splitlines()[0]}"
    ) from error
  if not builder.is_prepared():
    argument = f", data_dir={data_dir!r}" if data_dir else ""
    raise UserError(
      f"Data set {name!r} is not prepared: found nothing at"
      f' {builder.data_path}. Prepare it once with: python -c "import'
      f" tensorflow_datasets as tfds; tfds.builder({name!r}{argument})"
      '.download_and_prepare()"'
    )
  return builder


def _parser(
  builder: Any, settings: Any
) -> tuple[Callable[[tf.Tensor], _Example], Any, Any, bool]:
  """A parser of serialized examples, and what is in them.

  Returns:
    The parser, the image's and the label's feature, and whether an image may
    have several labels.
  """
  import tensorflow_datasets as tfds

  features = builder.info.features
  image_key = _only_key(features, "image", _is_image)
  if image_key is None:
    raise UserError(
      f"{settings.name!r} has no image: found {', '.join(features)}; expected"
      " a feature of type Image, or a uint8 Tensor of rank 3."
    )
  is_label = lambda feature: isinstance(feature, tfds.features.ClassLabel)
  is_several = lambda feature: (
    isinstance(feature, tfds.features.Sequence) and is_label(feature.feature)
  )
  label_key = _only_key(features, "label", is_label)
  several = label_key is None
  if several:
    label_key = _only_key(features, "labels", is_several)
  image = features[image_key]
  label = features[label_key] if label_key else None
  several = several and label is not None
  label = label.feature if several else label
  # Of the classes present, those that count (VOC's "difficult" ones do not).
  counted_key = f"{label_key}_no_difficult"
  counted_key = counted_key if several and counted_key in features else None
  encoded = isinstance(image, tfds.features.Image)
  if encoded:
    source_lib.check_encoded_channels(settings)
  elif image.shape[-1] != settings.channels:
    raise UserError(
      f"data.channels is {settings.channels}, but images of {settings.name!r}"
      f" have {image.shape[-1]} channels."
    )
  wanted = {key: True for key in (image_key, label_key, counted_key) if key}
  wanted = tfds.decode.PartialDecoding(wanted).extract_features(features)
  decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None

  def parse(serialized: tf.Tensor) -> _Example:
    example = wanted.deserialize_example(serialized, decoders=decoders)
    parsed = {"image": example[image_key]}
    if several:
      present = _indicator(example[label_key], label.num_classes)
      parsed["label"] = present
      if counted_key:
        counted = _indicator(example[counted_key], label.num_classes)
        parsed["label"] = tf.where(counted < present, -1, present)
    elif label_key:
      parsed["label"] = tf.cast(example[label_key], tf.int32)
    return parsed

  return parse, image, label, several


def _indicator(labels: tf.Tensor, num_classes: int) -> tf.Tensor:
  """Classes, in any number, to int32 [num_classes] of 1 and 0."""
  # The sum of no rows is 0, where their maximum would be the least integer.
  counts = tf.reduce_sum(tf.one_hot(labels, num_classes, dtype=tf.int32), 0)
  return tf.minimum(counts, 1)


def _is_image(feature: Any) -> bool:
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.Image):
    return True
  is_tensor = isinstance(feature, tfds.features.Tensor)
  return is_tensor and len(feature.shape) == 3 and feature.dtype == np.uint8


def _only_key(
  features: Any, favourite: str, accepts: Callable[[Any], bool]
) -> str | None:
  """The key of the feature wanted: by name, else the only one of its kind."""
  keys = [key for key, feature in features.items() if accepts(feature)]
  if favourite in keys:
    return favourite
  return keys[0] if len(keys) == 1 else None


# --- Few records: in memory ---------------------------------------------------


@tf.autograph.experimental.do_not_convert
def hold_in_memory(
  source: source_lib.Source,
  records: tf.data.Dataset,
  shape: tuple[int | None, ...],
) -> source_lib.Source:
  """Reads all records once; decodes them if they are small and of one size.

  Args:
    source: Its stream says how to parse a record.
    records: The `source.num_examples` records of the stream that are wanted.
    shape: Of every image; None where they differ.
  """
  parse = source.stream.parse
  serialized = _gather(records.map(lambda r: r["serialized"]), source)
  labels = None
  if source.num_classes:
    labels = tf.data.Dataset.from_tensor_slices(serialized)
    labels = _gather(labels.map(lambda s: parse(s)["label"]), source)
  source = dataclasses.replace(
    source,
    stream=None,
    labels=labels,
    fetch=lambda index: parse(table[index])["image"],
  )
  table = tf.constant(serialized)
  if None in shape[:2] or max(shape[:2]) > source_lib.MAX_SMALL_SIDE:
    return source

  def pixels(index: tf.Tensor) -> tf.Tensor:
    image = source.fetch(index)
    if image.dtype == tf.string:
      image = decode.decode_pixels(image, source.channels)
    return tf.ensure_shape(image, (*shape[:2], source.channels))

  images = tf.data.Dataset.range(source.num_examples)
  images = images.map(pixels, num_parallel_calls=tf.data.AUTOTUNE)
  try:
    return dataclasses.replace(source, images=_gather(images, source))
  except tf.errors.InvalidArgumentError:
    return source  # Some image is bad: the pipeline deals with it.


def _gather(dataset: tf.data.Dataset, source: source_lib.Source) -> np.ndarray:
  """All elements of a dataset of `source.num_examples` elements."""
  return next(dataset.batch(source.num_examples).as_numpy_iterator())


# --- Many records: a stream ---------------------------------------------------


class _Files:
  """The files of a split and what to read of each.

  Attributes:
    num_examples: Records in the split.
    num_bytes: About how many bytes they have.
  """

  def __init__(self, builder: Any, split: str):
    instructions = _instructions(builder, split)
    self._names = np.array([i.filename for i in instructions])
    self._skips = np.array([i.skip for i in instructions], np.int64)
    self._takes = np.array([i.take for i in instructions], np.int64)
    self._firsts = np.cumsum(self._takes) - self._takes
    self.num_examples = int(self._takes.sum())
    everything = builder.info.splits
    num_bytes = sum(int(part.num_bytes) for part in everything.values())
    mean = num_bytes / max(1, everything.total_num_examples)
    self.num_bytes = mean * self.num_examples

  def eval_stream(self, first: int, last: int) -> tf.data.Dataset:
    """Records [first, last) in order: {"serialized", "index"}."""
    order = tf.range(len(self._names), dtype=tf.int64)
    return self._pieces(order, first, last).flat_map(_read)

  def train_stream(
    self,
    key: tf.Tensor,
    first_record: int,
    process_index: int,
    process_count: int,
  ) -> tf.data.Dataset:
    """This process's records, epoch after epoch, without end.

    Args:
      key: Key of the order, uint64.
      first_record: How many of this process's records to leave out.
      process_index: Which process this is.
      process_count: Number of processes.

    Returns:
      Elements {"serialized", "index", "epoch"}.
    """
    first = process_index * self.num_examples // process_count
    last = (process_index + 1) * self.num_examples // process_count
    first_epoch, offset = divmod(first_record, last - first)

    def groups_of(epoch: tf.Tensor) -> tf.data.Dataset:
      epoch_key = stateless.fold_in(key, epoch)
      files = tf.range(len(self._names), dtype=tf.int64)
      order = stateless.permute(
        files, len(self._names), tf.fill(tf.shape(files), epoch_key)
      )
      pieces = self._pieces(order, first, last)
      groups = pieces.batch(FILES_PER_GROUP).enumerate()
      groups = groups.map(
        lambda number, group: {
          "group": group,
          "epoch": epoch,
          "seed": stateless.seed(stateless.fold_in(epoch_key, number)),
        }
      )
      return _leave_out(groups, tf.where(epoch == first_epoch, offset, 0))

    groups = tf.data.Dataset.range(first_epoch, _NO_END).flat_map(groups_of)
    # Parallel, so that the next group is opened before this one ends.
    return groups.interleave(
      _read_group,
      cycle_length=1,
      num_parallel_calls=1,
      deterministic=True,
    )

  def _pieces(self, order: tf.Tensor, first: int, last: int) -> tf.data.Dataset:
    """What to read of each file for records [first, last) of files in order.

    Returns:
      Elements {"file", "skip", "take", "index"}: the path, how many records to
      leave out, how many to read, and the index of the first one read.
    """
    takes = tf.gather(self._takes, order)
    starts = tf.cumsum(takes, exclusive=True)
    begin = tf.clip_by_value(first - starts, 0, takes)
    end = tf.clip_by_value(last - starts, 0, takes)
    pieces = {
      "file": tf.gather(self._names, order),
      "skip": tf.gather(self._skips, order) + begin,
      "take": end - begin,
      "index": tf.gather(self._firsts, order) + begin,
    }
    pieces = {k: tf.boolean_mask(v, end > begin) for k, v in pieces.items()}
    return tf.data.Dataset.from_tensor_slices(pieces)


def _instructions(builder: Any, split: str) -> list[Any]:
  """TFDS's file instructions for a split expression."""
  name = builder.info.full_name
  file_format = builder.info.file_format
  if file_format and file_format.value != "tfrecord":
    raise UserError(
      f"Data set {name!r} is prepared as {file_format.value}; expected"
      " tfrecord, which download_and_prepare(file_format='tfrecord') writes."
    )
  try:
    return builder.info.splits[split].file_instructions
  except (AssertionError, KeyError, ValueError) as error:
    known = ", ".join(builder.info.splits)
    raise UserError(
      f"Data set {name!r} has no split {split!r}; expected one of {known}, or"
      " an expression of them such as 'train[:90%]'."
    ) from error


def _leave_out(groups: tf.data.Dataset, count: tf.Tensor) -> tf.data.Dataset:
  """Drops whole groups, and tells the next one how many records to skip."""

  def split(left: tf.Tensor, group: _Example) -> tuple[tf.Tensor, _Example]:
    size = tf.reduce_sum(group["group"]["take"])
    skip = tf.minimum(left, size)
    return left - skip, group | {"skip": skip, "size": size}

  groups = groups.scan(tf.cast(count, tf.int64), split)
  return groups.filter(lambda group: group["skip"] < group["size"])


def _read_group(group: _Example) -> tf.data.Dataset:
  """Shuffled records of a group of files."""
  records = tf.data.Dataset.from_tensor_slices(group["group"]).interleave(
    _read,
    cycle_length=FILES_PER_GROUP,
    num_parallel_calls=tf.data.AUTOTUNE,
    deterministic=True,
  )
  records = records.shuffle(
    SHUFFLE_BUFFER, seed=group["seed"], reshuffle_each_iteration=False
  )
  records = records.skip(group["skip"])
  return records.map(lambda record: record | {"epoch": group["epoch"]})


def _read(piece: _Example) -> tf.data.Dataset:
  """Records of one file: {"serialized", "index"}."""
  records = tf.data.TFRecordDataset(piece["file"], buffer_size=1 << 20)
  records = records.skip(piece["skip"]).take(piece["take"])
  return records.enumerate(piece["index"]).map(
    lambda index, record: {"serialized": record, "index": index}
  )
