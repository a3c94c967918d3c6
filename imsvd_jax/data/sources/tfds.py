"""Any image data set of TensorFlow Datasets: `data.name="tfds:cifar10"`.

The part after the colon is the name for `tfds.load`, optionally with a
configuration or a version ("tfds:imagenet_resized/32x32"). `data.path` is
TFDS's data_dir, empty for its default. Splits are TFDS expressions: "train",
"train[:90%]", "train[10%:]+validation".

The data set must be prepared already: this module downloads nothing. Its files
are data, not code: TFDS would import whatever class `features.json` names, and
read whatever file; here it may not.

Records are read undecoded. A split of at most `MAX_BYTES_IN_MEMORY` is read
once and kept in memory, which gives access to any record: the order is exact
and the same for any number of processes. A larger one is a stream:

- An epoch reads the files in a random order, and process k of P takes records
  [k n / P, (k + 1) n / P) of the concatenated files. So all processes together
  read every record exactly once per epoch. The global batch depends on the
  number of processes; if n is not a multiple of P, the processes' epochs differ
  in length by one record.
- A process reads its files in groups of `FILES_PER_GROUP`, takes records from
  them in turn and shuffles these in a buffer of `SHUFFLE_BUFFER`. TFDS shuffled
  the records over the files when it wrote them.
- A start in the middle of an epoch skips whole groups without reading them, and
  the remaining records of one group without decoding them.

A record's index is its position in the split, the same in both cases.

Images are the feature `data.image_key`, or "image", or the only Image or Tensor
of rank 3. Numbers that are not uint8 need `data.value_range`; "auto" is the
range that the data set declares, or that of the type.

Labels are the feature `data.label_key`, or "label", or the only ClassLabel; of
a split in memory also integers or text, whose values in train are the classes.
Without a label, a list of classes ("labels", or the only one of its kind) gives
every image a 1 or 0 for each class. If there is also "labels_no_difficult", as
in VOC, a class that is only in the first list gets -1: it is to be ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from imsvd_jax.base import files as base_files
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import decode, execution, image_files
from imsvd_jax.data import graph_stateless as stateless
from imsvd_jax.data import source as source_lib

MAX_BYTES_IN_MEMORY = 1 << 30  # Of undecoded records.
FILES_PER_GROUP = 16
SHUFFLE_BUFFER = 2048  # Records; about 230 MB of ImageNet.

# A name of TFDS's own catalog, perhaps with a configuration and a version. The
# rest of its syntax chooses code: namespaces, and arguments of the builder.
_NAME = re.compile(r"\w+(/\w[\w.+-]*)?(:(\d+|\*)(\.(\d+|\*)){2})?", re.ASCII)
_OWN_CLASS = re.compile(r"tensorflow_datasets(\.[A-Za-z_]\w*)+", re.ASCII)

_Example = dict[str, Any]  # Of tensors; groups of files nest one in another.


def make(settings: ConfigDict, split: str) -> source_lib.Source:
  """Returns one split of a prepared data set."""
  source_lib.reject_num_examples(settings)
  builder = _builder(settings)
  files = _Files(builder, split)
  images = _images_of(builder.info.features, settings)
  labels = _find_labels(builder.info.features, settings)
  parse = _parser(builder.info.features, images, labels)
  stream = source_lib.Stream(files.train_stream, files.eval_stream, parse)
  source = source_lib.Source(
    name=f"{settings.name} {split}",
    num_examples=files.num_examples,
    num_classes=len(labels.names),
    label_names=labels.names,
    multi_label=labels.several,
    stream=stream,
    describe=lambda index: f"{index} of {settings.name} {split}",
    # Versions are fixed; two preparations may still differ in their shards.
    stamp=lambda: f"{builder.info.full_name} {split} {files.num_bytes}",
    remarks=images.remarks,
    why_unlabeled=labels.why_none,
    **source_lib.decoding_of(settings) | {"value_range": images.limits},
  )
  if files.num_bytes > MAX_BYTES_IN_MEMORY:
    if not labels.values_are_classes:
      return source
    raise UserError(
      f"The label {labels.key!r} of {settings.name!r} is not a ClassLabel: its"
      " classes are known only after all records are read, and this split is"
      " too large for that; set data.label_key=none to go without labels."
    )
  records = stream.evaluate(0, source.num_examples)
  if labels.values_are_classes:
    train = _Files(builder, settings.train_split)
    classes = np.unique(_values(train, parse))
    own = _values(files, parse)
    source = read_into_memory(source, stream, records, images.shape)
    return _with_classes(source, own, classes)
  return read_into_memory(source, stream, records, images.shape)


def split_names(settings: ConfigDict) -> list[str]:
  """Returns the splits of a prepared data set."""
  return list(_builder(settings).info.splits)


def check(name: str, path: str, splits: Sequence[str] = ()) -> None:
  """Raises UserError if a data set or one of its splits is not there.

  Args:
    name: As `data.name`.
    path: As `data.path`.
    splits: As `data.train_split`.
  """
  builder = _builder(ConfigDict({"name": name, "path": path}))
  for split in splits:
    _Files(builder, split)


# --- Content of the data set --------------------------------------------------


def _builder(settings: ConfigDict) -> Any:
  """Returns the builder of a prepared data set."""
  # Imported here because it takes seconds, and other sources do not need it.
  import tensorflow_datasets as tfds

  name = settings.name.partition(":")[2]
  if not name:
    raise UserError(
      f"data.name is {settings.name!r}; expected the data set after a colon,"
      " for example 'tfds:cifar10'."
    )
  if not _NAME.fullmatch(name):
    raise UserError(
      f"data.name is {settings.name!r}; expected a name of TFDS's catalog,"
      " tfds:NAME[/CONFIG][:VERSION]."
    )
  data_dir = settings.path or None
  if data_dir and "://" not in data_dir:
    _check_regular(data_dir, name.partition("/")[0].partition(":")[0])
  try:
    with _files_are_data(settings.name):
      builder = tfds.builder(name, data_dir=data_dir)
  except UserError:
    raise
  except tfds.core.DatasetNotFoundError as error:
    base = name.partition("/")[0].partition(":")[0]
    close = difflib.get_close_matches(base, tfds.list_builders(), n=1)
    hint = f" Did you mean 'tfds:{close[0]}'?" if close else ""
    raise UserError(
      f"Unknown TensorFlow data set {name!r}.{hint} See"
      " https://www.tensorflow.org/datasets/catalog for the known ones."
    ) from error
  except Exception as error:  # Damaged files fail in many ways.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"Cannot load {settings.name!r}: {reason}") from error
  if found := base_files.pattern_in(builder.data_path):
    raise UserError(
      f"{builder.data_path} has {found} in its path; TFDS takes that for a"
      " pattern, and finds no data there. Rename the folder, or give a link to"
      " it as data.path."
    )
  if not builder.is_prepared():
    argument = f", data_dir={data_dir!r}" if data_dir else ""
    raise UserError(
      f"Data set {name!r} is not prepared: found nothing at"
      f' {builder.data_path}. Prepare it once with: python -c "import'
      f" tensorflow_datasets as tfds; tfds.builder({name!r}{argument})"
      '.download_and_prepare()"'
    )
  return builder


def _check_regular(data_dir: str, name: str) -> None:
  """Raises UserError where reading a file of the data set could wait for ever.

  TFDS takes the folder whose name is `name` in snake case.
  """
  plain = lambda text: text.replace("_", "").lower()
  folders = [data_dir] if not os.path.isdir(data_dir) else os.listdir(data_dir)
  for folder in folders:
    if plain(folder) != plain(name):
      continue
    for top, _, files in os.walk(os.path.join(data_dir, folder)):
      for path in (os.path.join(top, file) for file in files):
        if not os.path.isfile(path):
          raise UserError(
            f"{path} is not a regular file (a pipe, a device or a broken link);"
            " expected a prepared data set: remove it."
          )


@contextlib.contextmanager
def _files_are_data(data_set: str) -> Iterator[None]:
  """Keeps TFDS from importing or reading what features.json names.

  At the place where TFDS imports, rather than by reading the file before it:
  TFDS chooses the file, and a feature can be JSON within JSON.
  """
  import tensorflow_datasets as tfds

  connector, label = tfds.features.FeatureConnector, tfds.features.ClassLabel
  class_of, from_json = connector.cls_from_name, connector.from_json
  init = label.__init__
  refused: list[str] = []

  def refuse(what: str) -> NoReturn:
    refused.append(what)
    raise ValueError(what)

  def own_class(name: str) -> Any:
    if not _OWN_CLASS.fullmatch(name):
      refuse(f"the class {name!r}; expected one of tensorflow_datasets")
    return class_of(name)

  def no_file(self: Any, *, names_file: Any = None, **others: Any) -> None:
    if names_file is not None:
      refuse(f"the file {names_file!r}; expected the names of the classes")
    init(self, **others)

  def without_files(value: Any) -> Any:
    with mock.patch.object(label, "__init__", no_file):
      return from_json(value)

  try:
    with (
      mock.patch.object(connector, "cls_from_name", staticmethod(own_class)),
      mock.patch.object(connector, "from_json", staticmethod(without_files)),
    ):
      yield
  except Exception as error:
    if not refused:
      raise
    raise UserError(
      f"features.json of {data_set!r} names {refused[0]}. Nothing was imported"
      " or read."
    ) from error


class _Images(NamedTuple):
  """The feature of the images.

  Attributes:
    key: Its name.
    shape: [height, width, channels]; None where it differs.
    encoded: Whether records are files of 8 bits, which the pipeline decodes.
    limits: The values of black and white; None: the images have 8 bits.
    remarks: Facts for the log.
  """

  key: str
  shape: tuple[int | None, ...]
  encoded: bool
  limits: tuple[float, float] | None = None
  remarks: tuple[str, ...] = ()

  def of(self, example: _Example) -> tf.Tensor:
    """Returns a file, or pixels [height, width, channels]."""
    image = example[self.key]
    if self.encoded:
      return image
    if len(self.shape) == 2:
      image = image[..., tf.newaxis]
    if self.limits is None:
      return image
    low, high = self.limits
    image = tf.debugging.assert_all_finite(
      tf.cast(image, tf.float32), "numbers that are not finite"
    )
    return tf.clip_by_value((image - low) * (255 / (high - low)), 0.0, 255.0)


class _Labels(NamedTuple):
  """The feature that labels the images.

  Attributes:
    key: Its name; empty if there are no labels.
    names: Names of the classes.
    several: Whether it is a list of classes.
    counted_key: Name of the list of those classes that are not to be ignored
      (VOC's "difficult" ones are), if there is one.
    values_are_classes: Whether it is integers or text without declared classes.
    why_none: Why there are no labels.
  """

  key: str = ""
  names: tuple[str, ...] = ()
  several: bool = False
  counted_key: str = ""
  values_are_classes: bool = False
  why_none: str = ""

  def of(self, example: _Example) -> tf.Tensor:
    """Returns the label of an example, see `Source.labels`."""
    if self.values_are_classes:
      return tf.reshape(example[self.key], [])
    if not self.several:
      return tf.cast(example[self.key], tf.int32)
    present = _indicator(example[self.key], len(self.names))
    if not self.counted_key:
      return present
    counted = _indicator(example[self.counted_key], len(self.names))
    return tf.where(counted < present, -1, present)


def _parser(
  features: Any, images: _Images, labels: _Labels
) -> Callable[[tf.Tensor], _Example]:
  """Returns `Stream.parse`."""
  import tensorflow_datasets as tfds

  keys = [images.key, *filter(None, (labels.key, labels.counted_key))]
  wanted = tfds.decode.PartialDecoding(dict.fromkeys(keys, True))
  wanted = wanted.extract_features(features)
  decoders = (
    {images.key: tfds.decode.SkipDecoding()} if images.encoded else None
  )

  def parse(serialized: tf.Tensor) -> _Example:
    example = wanted.deserialize_example(serialized, decoders=decoders)
    image = {"image": images.of(example)}
    return image | {"label": labels.of(example)} if labels.key else image

  return parse


def _images_of(features: Any, settings: ConfigDict) -> _Images:
  """Returns the feature of the images; raises if it does not fit the config."""
  import tensorflow_datasets as tfds

  key = _image_key(features, settings)
  feature = features[key]
  shape = tuple(feature.shape)
  dtype = np.dtype(feature.np_dtype)
  if isinstance(feature, tfds.features.Image) and dtype == np.uint8:
    source_lib.check_encoded_channels(settings)
    # With a range that other images need, files become float32, too.
    limits = (0.0, 255.0) if source_lib.value_range_of(settings) else None
    return _Images(key, shape, encoded=True, limits=limits)
  channels = shape[-1] if len(shape) == 3 else 1
  if channels != settings.channels:
    raise UserError(
      f"data.channels is {settings.channels}, but images of {settings.name!r}"
      f" have {channels} channels."
    )
  if dtype == np.uint8:
    limits = (0.0, 255.0) if source_lib.value_range_of(settings) else None
    return _Images(key, shape, encoded=False, limits=limits)
  limits = _limits(feature, dtype, settings)
  remark = (
    f"{dtype} numbers, scaled from {limits[0]:g} (black) to {limits[1]:g}"
    f" (white), data.value_range={source_lib.value_range_of(settings)!r}"
  )
  return _Images(key, shape, False, limits, (remark,))


def _limits(
  feature: Any, dtype: np.dtype, settings: ConfigDict
) -> tuple[float, float]:
  """Returns the values of black and white, of numbers that are not uint8."""
  value_range = source_lib.value_range_of(settings)
  declared: list[Any] = [
    getattr(feature, f"_{end}", None) for end in ("minimum", "maximum")
  ]
  if value_range == "auto" and None not in declared:
    return float(declared[0]), float(declared[1])
  try:
    return image_files.limits(dtype, value_range)
  except ValueError as error:
    raise UserError(
      f"Images of {settings.name!r} are not plain 8-bit pixels: {error}."
    ) from error


def _image_key(features: Any, settings: ConfigDict) -> str:
  import tensorflow_datasets as tfds

  def is_image(feature: Any) -> bool:
    if isinstance(feature, tfds.features.Image):
      return True
    is_tensor = isinstance(feature, tfds.features.Tensor)
    is_number = is_tensor and np.dtype(feature.np_dtype).kind in "uif"
    return is_number and (
      len(feature.shape) == 3
      or (len(feature.shape) == 2 and settings.channels == 1)
    )

  return _chosen_key(features, settings, "image", is_image)


def _chosen_key(
  features: Any,
  settings: ConfigDict,
  kind: str,
  accepts: Callable[[Any], bool],
) -> str:
  """Returns data.KIND_key, or KIND, or the only feature that is accepted."""
  keys = sorted(key for key, feature in features.items() if accepts(feature))
  asked = source_lib.setting(settings, f"{kind}_key")
  if asked and asked not in keys:
    raise UserError(
      f"data.{kind}_key is {asked!r}; {settings.name!r} has no {kind} of this"
      f" name: expected one of {', '.join(keys) or 'none'} (its features are"
      f" {', '.join(features)})."
    )
  if asked or kind in keys:
    return asked or kind
  if len(keys) == 1:
    return keys[0]
  if keys:
    raise UserError(
      f"{settings.name!r} has {len(keys)} features that could be the {kind}:"
      f" {', '.join(keys)}; set data.{kind}_key to one of them."
    )
  raise UserError(
    f"{settings.name!r} has no {kind}: found {', '.join(features)}; expected a"
    " feature of type Image, or a Tensor [height, width, channels] of numbers."
  )


def _find_labels(features: Any, settings: ConfigDict) -> _Labels:
  import tensorflow_datasets as tfds

  asked = source_lib.setting(settings, "label_key")
  if asked == "none":
    return _Labels()
  is_label = lambda feature: isinstance(feature, tfds.features.ClassLabel)
  is_list = lambda feature: (
    isinstance(feature, tfds.features.Sequence) and is_label(feature.feature)
  )
  is_value = lambda feature: _is_value(feature) and not is_label(feature)
  if asked:
    accepts = lambda f: is_label(f) or is_list(f) or is_value(f)
    key: str | None = _chosen_key(features, settings, "label", accepts)
  else:
    key = _only_key(features, "label", is_label)
    key = key or _only_key(features, "labels", is_list)
  if key is None and "label" in features and is_value(features["label"]):
    key = "label"
  if key is None:
    found = sorted(k for k, f in features.items() if is_label(f) or is_list(f))
    hint = f" ({', '.join(found)})" if found else ""
    several = f"it has {len(found)} labels{hint}; set data.label_key"
    return _Labels(why_none=several if found else "")
  if is_value(features[key]):
    return _Labels(key, values_are_classes=True)
  if is_label(features[key]):
    return _Labels(key, tuple(features[key].names))
  counted_key = f"{key}_no_difficult"
  if counted_key not in features:
    counted_key = ""
  names = tuple(features[key].feature.names)
  return _Labels(key, names, several=True, counted_key=counted_key)


def _is_value(feature: Any) -> bool:
  """Returns whether a feature is one integer or text."""
  import tensorflow_datasets as tfds

  if isinstance(feature, tfds.features.Text):
    return True
  is_one = isinstance(feature, tfds.features.Tensor) and all(
    side == 1 for side in feature.shape
  )
  return is_one and np.dtype(feature.np_dtype).kind in "uib"


def _indicator(labels: tf.Tensor, num_classes: int) -> tf.Tensor:
  """Returns int32 [num_classes]: 1 for each class that is listed, else 0."""
  # A sum, because the maximum of no rows is the smallest integer.
  counts = tf.reduce_sum(tf.one_hot(labels, num_classes, dtype=tf.int32), 0)
  return tf.minimum(counts, 1)


def _only_key(
  features: Any, preferred: str, accepts: Callable[[Any], bool]
) -> str | None:
  """Returns the preferred key if its feature is accepted, else the only one."""
  keys = [key for key, feature in features.items() if accepts(feature)]
  if preferred in keys:
    return preferred
  return keys[0] if len(keys) == 1 else None


# --- Few records: in memory ---------------------------------------------------


@tf.autograph.experimental.do_not_convert
def _values(files: _Files, parse: Callable[[tf.Tensor], _Example]) -> Any:
  """Returns the values of the label of all records."""
  records = files.eval_stream(0, files.num_examples)
  values = records.map(lambda record: parse(record["serialized"])["label"])
  return execution.read_all(values, files.num_examples)


def _with_classes(
  source: source_lib.Source, values: np.ndarray, classes: np.ndarray
) -> source_lib.Source:
  """Returns the source with the values of its label numbered as classes."""
  unknown = np.setdiff1d(values, classes)
  if unknown.size:
    raise UserError(
      f"{source.name} has the label {_as_text(unknown[0])!r}, which the"
      " training split does not have."
    )
  return dataclasses.replace(
    source,
    num_classes=len(classes),
    label_names=tuple(map(_as_text, classes)),
    labels=np.searchsorted(classes, values).astype(np.int32),
  )


def _as_text(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode("utf-8", "backslashreplace")
  return str(value)


@tf.autograph.experimental.do_not_convert
def read_into_memory(
  source: source_lib.Source,
  stream: source_lib.Stream,
  records: tf.data.Dataset,
  shape: tuple[int | None, ...],
) -> source_lib.Source:
  """Reads all records once; decodes them if they are of one size and fit.

  Args:
    source: The source to return, without its records.
    stream: Parses the records.
    records: The `source.num_examples` records of the stream.
    shape: Shape of every image; None where it differs.
  """
  count, parse = source.num_examples, stream.parse
  serialized = execution.read_all(records.map(lambda r: r["serialized"]), count)
  labels = None
  if source.num_classes:
    parsed = tf.data.Dataset.from_tensor_slices(serialized)
    parsed = parsed.map(lambda s: parse(s)["label"])
    labels = execution.read_all(parsed, count)
  table = tf.constant(serialized)
  fetch = lambda index: parse(table[index])["image"]
  source = dataclasses.replace(source, stream=None, labels=labels, fetch=fetch)
  height, width = shape[:2]
  if height is None or width is None or source.value_range is not None:
    return source
  if not source_lib.fits_in_memory(count, height * width * source.channels):
    return source

  def pixels(index: tf.Tensor) -> tf.Tensor:
    image = fetch(index)
    if image.dtype == tf.string:
      image = decode.decode_pixels(image, *source.decoding)
    return tf.ensure_shape(image, (height, width, source.channels))

  images = tf.data.Dataset.range(count)
  images = images.map(pixels, num_parallel_calls=tf.data.AUTOTUNE)
  try:
    return dataclasses.replace(source, images=execution.read_all(images, count))
  except tf.errors.InvalidArgumentError:
    return source  # Some image is bad: the pipeline deals with it.


# --- Many records: a stream ---------------------------------------------------


class _Files:
  """The files of a split, and the records to read of each."""

  def __init__(self, builder: Any, split: str) -> None:
    instructions = _instructions(builder, split)
    self._names = np.array([i.filename for i in instructions])
    self._skips = np.array([i.skip for i in instructions], np.int64)
    self._takes = np.array([i.take for i in instructions], np.int64)
    self._firsts = np.cumsum(self._takes) - self._takes
    self.num_examples = int(self._takes.sum())
    everything = builder.info.splits
    num_bytes = sum(int(part.num_bytes) for part in everything.values())
    mean = num_bytes / max(1, everything.total_num_examples)
    self.num_bytes = mean * self.num_examples  # Approximately.

  def eval_stream(self, first: int, last: int) -> tf.data.Dataset:
    """Returns records [first, last) in order: {"serialized", "index"}."""
    order = tf.range(len(self._names), dtype=tf.int64)
    return self._pieces(order, first, last).flat_map(_read)

  def train_stream(
    self, key: tf.Tensor, skip: int, process_index: int, process_count: int
  ) -> tf.data.Dataset:
    """Returns this process's records without end, see `Stream.train`."""
    first = process_index * self.num_examples // process_count
    last = (process_index + 1) * self.num_examples // process_count
    first_epoch, offset = divmod(skip, last - first)

    def groups_of(epoch: tf.Tensor) -> tf.data.Dataset:
      epoch_key = stateless.fold_in(key, epoch)
      files = tf.range(len(self._names), dtype=tf.int64)
      order = stateless.permute(files, len(self._names), epoch_key)
      pieces = self._pieces(order, first, last)
      groups = pieces.batch(FILES_PER_GROUP).enumerate()
      groups = groups.map(
        lambda number, group: {
          "group": group,
          "epoch": epoch,
          "seed": stateless.seed(stateless.fold_in(epoch_key, number)),
        }
      )
      return _skip_records(groups, tf.where(epoch == first_epoch, offset, 0))

    epochs = tf.data.Dataset.range(first_epoch, tf.int64.max)
    # Parallel, so that the next group is opened before this one ends.
    return epochs.flat_map(groups_of).interleave(
      _read_group, cycle_length=1, num_parallel_calls=1, deterministic=True
    )

  def _pieces(self, order: tf.Tensor, first: int, last: int) -> tf.data.Dataset:
    """Returns the pieces of files that hold records [first, last) of an order.

    Elements are {"file", "skip", "take", "index"}: the path, the number of
    records to skip, the number to read, and the index of the first one read.
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
  """Returns TFDS's file instructions for a split expression."""
  name = builder.info.full_name
  file_format = builder.info.file_format
  if file_format and file_format.value != "tfrecord":
    raise UserError(
      f"Data set {name!r} is prepared as {file_format.value}; expected"
      " tfrecord, which download_and_prepare(file_format='tfrecord') writes."
    )
  try:
    found = builder.info.splits[split].file_instructions
  except (AssertionError, KeyError, ValueError) as error:
    known = ", ".join(builder.info.splits)
    raise UserError(
      f"Data set {name!r} has no split {split!r}; expected one of {known}, or"
      " an expression of them such as 'train[:90%]'."
    ) from error
  root = os.path.join(os.path.normpath(builder.data_path), "")
  for file in found:
    if not os.path.normpath(file.filename).startswith(root):
      raise UserError(
        f"Data set {name!r} names the file {file.filename}; expected files in"
        f" {root}."
      )
  return found


def _skip_records(groups: tf.data.Dataset, count: tf.Tensor) -> tf.data.Dataset:
  """Drops whole groups, and sets the number to skip in the next one."""

  def split(left: tf.Tensor, group: _Example) -> tuple[tf.Tensor, _Example]:
    size = tf.reduce_sum(group["group"]["take"])
    skip = tf.minimum(left, size)
    return left - skip, group | {"skip": skip, "size": size}

  groups = groups.scan(tf.cast(count, tf.int64), split)
  return groups.filter(lambda group: group["skip"] < group["size"])


def _read_group(group: _Example) -> tf.data.Dataset:
  """Returns the shuffled records of a group of files."""
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
  """Returns the records of a piece of a file: {"serialized", "index"}."""
  records = tf.data.TFRecordDataset(piece["file"], buffer_size=1 << 20)
  records = records.skip(piece["skip"]).take(piece["take"])
  return records.enumerate(piece["index"]).map(
    lambda index, record: {"serialized": record, "index": index}
  )
