"""What each source offers: digits, shapes, synthetic, folders and TFDS."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tf_datasets
from ml_collections import ConfigDict
from tensorflow_datasets import features

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import named, part
from imsvd_jax.data import source as source_lib
from imsvd_jax.data.sources import scenes, shapes, tfds
from imsvd_jax.interop import image_embeddings
from tests.data import made_sources
from tests.data.made_sources import make


def knn_accuracy(name, size, **settings) -> float:
  """Weighted k-NN of raw pixels: k = 20, T = 0.07, cosine similarity."""
  sets = []
  for split in ("train", "eval"):
    found = made_sources.evaluated(
      make(name, split, image_size=size, **settings),
      batch_size=512,
      resize=size,
      crop=size,
    )
    pixels = np.float32(found["image"].reshape(len(found["image"]), -1))
    unit = pixels / np.linalg.norm(pixels, axis=1)[:, None]
    sets.append((unit, found["label"]))
  (bank, labels), (queries, truth) = sets
  similarity = queries @ bank.T
  nearest = np.argsort(-similarity, axis=1)[:, :20]
  weights = np.exp(np.take_along_axis(similarity, nearest, 1) / 0.07)
  votes = [(weights * (labels[nearest] == c)).sum(1) for c in set(labels)]
  return float((np.argmax(votes, axis=0) == truth).mean())


# --- Digits -------------------------------------------------------------------


def test_digits():
  train, test = make("digits"), make("digits", "eval")
  assert (train.num_examples, test.num_examples) == (1437, 360)
  assert train.images.shape == (1437, 16, 16, 3)
  assert train.images.dtype == np.uint8
  assert train.num_classes == 10
  # Stratified: the share of each digit is the same in both.
  shares = [np.bincount(s.labels) / s.num_examples for s in (train, test)]
  np.testing.assert_allclose(*shares, atol=0.002)
  assert make("digits", channels=1, image_size=20).images.shape == (
    1437, 20, 20, 1,
  )  # fmt: skip


def test_digits_raw_pixels():
  """The number that README's table starts with."""
  assert knn_accuracy("digits", 16) == 348 / 360


# --- Shapes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_drawings_do_not_depend_on_how_many_there_are(name):
  few, many = (make(name, num_examples=n) for n in (20, 50))
  np.testing.assert_array_equal(few.images, many.images[:20])
  np.testing.assert_array_equal(few.factors, many.factors[:20])
  evaluation = make(name, "eval", num_examples=50)
  assert evaluation.num_examples == 12
  assert (evaluation.images != many.images[:12]).any()


@pytest.mark.parametrize("name", ["shapes", "scenes"])
def test_drawings_on_demand_equal_those_in_memory(name, monkeypatch):
  in_memory = make(name, num_examples=20)
  monkeypatch.setattr(source_lib, "MAX_BYTES_IN_MEMORY", 0)
  on_demand = make(name, num_examples=20)
  assert on_demand.images is None
  drawn = tf.data.Dataset.range(20).map(on_demand.fetch)
  np.testing.assert_array_equal(
    list(drawn.as_numpy_iterator()), in_memory.images
  )


def test_shapes_labels_are_factors():
  source = make("shapes", num_examples=3000)
  column = lambda name: source.factors[:, source.factor_names.index(name)]
  np.testing.assert_array_equal(
    source.labels, column("shape") * 4 + column("texture")
  )
  assert source.num_classes == len(source.label_names) == 24
  assert source.label_names[5] == "square/stripes"
  counts = np.bincount(source.labels, minlength=24)
  assert counts.min() > 80  # 125 expected, standard deviation 11
  # Independent: no factor tells anything about another.
  correlation = np.corrcoef(source.factors.T) - np.eye(len(source.factor_names))
  assert np.abs(correlation).max() < 0.08


def test_shapes_look_as_their_factors_say():
  """Background in the corner, and more of the foreground when larger."""
  source = make("shapes", num_examples=200, image_size=32)
  background = source.factors[:, 5:8] * 255
  np.testing.assert_allclose(source.images[:, 0, 0], background, atol=1)
  solid = source.factors[:, 1] == 0
  foreground = source.factors[solid, 2:5] * 255
  # A solid shape's own colour is there, unmixed, except in a ring's hole.
  pixels = source.images[solid].reshape(solid.sum(), -1, 3).astype(np.float32)
  distance = np.abs(pixels - foreground[:, None]).max(-1).min(1)
  assert distance.max() <= 1
  # Antialiased: most shapes have pixels between their two colours.
  levels = [len(np.unique(i.reshape(-1, 3), axis=0)) for i in source.images]
  assert np.median(levels) > 6


@pytest.mark.parametrize("value", range(len(shapes.SHAPES)))
def test_rotation_turns_shapes(value):
  factors = shapes.draw_factors(1, 0)
  names = shapes.FACTORS.index
  factors[0, names("shape")] = value
  factors[0, names("texture")] = 1
  factors[0, [names("x"), names("y")]] = 0.5
  turned = factors.copy()
  turned[0, names("rotation")] += np.pi / 2
  image, other = (shapes.render(f, 32, 3)[0] for f in (factors, turned))
  difference = np.abs(np.rot90(image, -1).astype(int) - other)
  assert difference.mean() < 3
  assert np.abs(image.astype(int) - other).mean() > 3


def test_shapes_raw_pixels_are_near_chance():
  assert 0.08 < knn_accuracy("shapes", 32, num_examples=4096) < 0.16


# --- Scenes -------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenes_source():
  return make("scenes", num_examples=600, image_size=40)


def test_scenes_labels_are_the_pair_of_shapes(scenes_source):
  source = scenes_source
  column = lambda name: source.factors[:, source.factor_names.index(name)]
  expected = column("left_shape") * 6 + column("right_shape")
  np.testing.assert_array_equal(source.labels, expected)
  assert source.num_classes == len(source.label_names) == 36
  assert source.label_names[8] == "square/triangle"
  assert set(source.labels) == set(range(36))
  correlation = np.corrcoef(source.factors.T) - np.eye(24)
  assert np.abs(correlation).max() < 0.2  # Five standard deviations.


@pytest.mark.parametrize("side", [0, 1])
def test_a_factor_of_one_object_changes_its_half_only(side, scenes_source):
  source = scenes_source
  of_side = [n.startswith(("left_", "right_")[side]) for n in scenes.FACTORS]
  changed = source.factors[:100].copy()
  changed[:, of_side] = source.factors[100:200][:, of_side]
  before, after = source.images[:100], source.draw(changed)
  same, other = slice(20), slice(20, None)
  if side == 0:
    same, other = other, same
  np.testing.assert_array_equal(before[:, :, same], after[:, :, same])
  assert (before[:, :, other] != after[:, :, other]).any((1, 2, 3)).all()


def test_the_objects_masks_have_their_color_and_the_rest_the_ground(
  scenes_source,
):
  source = scenes_source
  factors = source.factors[:50].copy()
  column = source.factor_names.index
  factors[:, column("light_strength")] = 0
  factors[:, column("ground_pattern")] = 0
  factors[:, [column("left_texture"), column("right_texture")]] = 0
  images, masks = source.draw(factors), source.masks(factors)[..., 0]
  color = lambda of: np.round(
    255
    * factors[:, [column(f"{of}_color_{c}") for c in ("red", "green", "blue")]]
  )
  for image, mask, left, right, ground in zip(
    images, masks, color("left"), color("right"), color("ground"), strict=True
  ):
    assert (image[mask == 0] == ground).all()
    half = np.arange(40) < 20
    assert (image[(mask == 255) & half] == left).all()
    assert (image[(mask == 255) & ~half] == right).all()
    assert 50 < (mask == 255).sum() < 400


def test_light_darkens_along_its_direction(scenes_source):
  factors = scenes_source.factors[:1].copy()
  column = scenes_source.factor_names.index
  factors[0, column("ground_pattern")] = 0
  factors[
    0, [column(f"ground_color_{c}") for c in ("red", "green", "blue")]
  ] = 1
  factors[0, column("light_strength")] = 0.6
  factors[0, column("light_direction")] = np.pi / 2  # Darker below.
  top, bottom = scenes_source.draw(factors)[0, [0, -1], 20].astype(float)
  # 1 - 0.6 (1 + (2 y - 1) / sqrt(2)) / 2 at the centers of the pixels.
  shade = lambda y: 255 * (1 - 0.3 * (1 + (2 * y - 1) / np.sqrt(2)))
  np.testing.assert_allclose(top, shade(0.5 / 40), atol=0.6)
  np.testing.assert_allclose(bottom, shade(39.5 / 40), atol=0.6)


def test_scenes_raw_pixels_are_near_chance():
  assert 0.01 < knn_accuracy("scenes", 32, num_examples=2048) < 0.06


# --- Synthetic ----------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 70])
def test_synthetic_depends_on_the_index_only(size):
  settings = {"image_size": size, "channels": 5}
  few, many = (make("synthetic", num_examples=n, **settings) for n in (4, 9))
  for index in (0, 3):
    image = few.fetch(tf.constant(index, tf.int64)).numpy()
    assert image.shape == (size, size, 5)
    np.testing.assert_array_equal(
      image, many.fetch(tf.constant(index, tf.int64))
    )
    if size == 16:
      np.testing.assert_array_equal(image, many.images[index])
  np.testing.assert_array_equal(few.labels, many.labels[:4])
  other = make("synthetic", "eval", num_examples=4, **settings)
  assert (other.fetch(tf.constant(0, tf.int64)) != image).numpy().any()
  assert abs(image.mean() - 127.5) < 5


# --- Folders ------------------------------------------------------------------


def write_images(root: pathlib.Path, *names: str) -> None:
  for number, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    file_format = {"jpg": "JPEG", "JPG": "JPEG"}.get(name[-3:], name[-3:])
    image = made_sources.photograph(number, 24, 20)
    (root / name).write_bytes(made_sources.encode(image, file_format))


def described(source):
  return [source.describe(i) for i in range(source.num_examples)]


def test_folder_without_classes(tmp_path):
  write_images(
    tmp_path, "b.jpg", "deep/er/a.png", "deep/c.JPG", ".hidden.jpg", ".d/e.jpg"
  )
  (tmp_path / "notes.txt").write_text("not an image")
  source = make("folder", path=tmp_path)
  names = [os.path.relpath(path, tmp_path) for path in described(source)]
  assert names == ["b.jpg", "deep/c.JPG", "deep/er/a.png"]
  assert source.num_classes == 0
  assert source.labels is None
  assert make("folder", "eval", path=tmp_path) is None
  sizes = {"batch_size": 3, "resize": 16, "crop": 16}
  assert "label" not in made_sources.evaluated(source, **sizes)


def test_folder_with_classes(tmp_path):
  write_images(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/more/3.jpg")
  source = make("folder", path=tmp_path)
  assert source.label_names == ("cat", "dog")
  assert source.labels.tolist() == [0, 0, 1]
  assert make("folder", "eval", path=tmp_path) is None


@pytest.mark.parametrize("name", ["test", "val", "validation", "valid"])
def test_folder_with_an_evaluation_part(tmp_path, name):
  """With or without a folder for training; classes are numbered alike."""
  evaluation = (f"{name}/dog/8.jpg", f"{name}/emu/9.jpg")
  classes = ("cat/1.jpg", "dog/2.jpg", "emu/3.jpg")
  for root, prefix in ((tmp_path / "a", ""), (tmp_path / "b", "train/")):
    write_images(root, *evaluation, *(prefix + c for c in classes))
    train = make("folder", path=root)
    assert train.num_examples == 3
    assert train.label_names == ("cat", "dog", "emu")
    source = make("folder", "eval", path=root)
    assert source.labels.tolist() == [1, 2]
    assert source.label_names == train.label_names


def test_no_evaluation_part_is_trained_on(tmp_path):
  """Whichever of them is the one that is evaluated."""
  write_images(
    tmp_path, "cat/1.jpg", "dog/2.jpg", "val/dog/3.jpg", "test/dog/4.jpg"
  )
  for chosen, found in (("val", "val"), ("test", "test"), ("valid", "val")):
    settings = {"path": tmp_path, "eval_split": chosen}
    train = make("folder", **settings)
    assert train.label_names == ("cat", "dog")
    assert train.num_examples == 2
    (image,) = described(make("folder", "eval", **settings))
    assert image.startswith(f"{tmp_path}/{found}/dog/")
  assert make("folder", path=tmp_path, eval_split="").num_examples == 2


def test_what_a_folder_has_is_summed_up(tmp_path):
  names = [f"train/{letter}/1.png" for letter in "abcdefg"]
  write_images(tmp_path, *names, "more/deep/2.jpg", "val/a/3.jpg")
  (tmp_path / "train" / "a" / "x.psd").write_bytes(b"")
  (tmp_path / "train" / "notes.txt").write_text("")
  (tmp_path / "notes").mkdir()
  summary = make("folder", path=tmp_path).summary()
  assert summary == (
    f"folder:{tmp_path}/train: 7 images, 7 classes (a, b, c, d, e, ...);"
    " 2 other files ignored (.psd 1, .txt 1); training uses only 'train' and"
    " ignores the folders of images beside it: more"
  )
  remote = make("folder", path=f"file://{tmp_path}").summary()
  assert remote == summary.replace("folder:", "folder:file://")
  (tmp_path / "more" / "deep" / "2.jpg").unlink()
  assert "beside" not in make("folder", path=tmp_path).summary()
  unlabeled = make("folder", path=tmp_path / "val" / "a").summary()
  assert unlabeled.endswith("/a: 1 image, unlabeled")


def test_a_directory_that_cannot_be_read_is_left_out(
  tmp_path, monkeypatch, caplog
):
  write_images(tmp_path, "cat/1.jpg", "dog/2.jpg", "locked/3.jpg")
  (tmp_path / "cat" / "self").symlink_to("self")
  scandir = os.scandir
  locked = {str(tmp_path / "locked")}

  def refusing(path):
    # Permissions do not stop the user that tests often run as.
    if os.path.normpath(path) in locked:
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refusing)
  for split in ("train", "eval"):
    make("folder", split, path=tmp_path)
  assert make("folder", path=tmp_path).label_names == ("cat", "dog")
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2
  assert f"Cannot read {tmp_path}/locked: Permission denied" in "".join(said)
  assert f"Cannot read {tmp_path}/cat/self: Too many levels" in "".join(said)
  locked.add(str(tmp_path))
  with pytest.raises(UserError, match=r"Cannot read the directory .*denied"):
    make("folder", path=tmp_path)


def test_folder_follows_links_but_not_in_circles(tmp_path):
  write_images(tmp_path / "there", "x.jpg", "sub/y.jpg")
  root = tmp_path / "root"
  write_images(root, "a.jpg")
  (root / "linked").symlink_to(tmp_path / "there")
  (root / "file.jpg").symlink_to(tmp_path / "there" / "x.jpg")
  (root / "circle").symlink_to(root)
  (root / "broken.jpg").symlink_to(tmp_path / "nothing")
  source = make("folder", path=root)
  names = [os.path.relpath(path, root) for path in described(source)]
  assert names == [
    "a.jpg", "broken.jpg", "file.jpg", "linked/x.jpg", "linked/sub/y.jpg",
  ]  # fmt: skip
  batches = made_sources.train_batches(source, 5)
  next(batches)
  assert batches.bad_images == 1  # The broken link.


def test_folder_of_a_file_system_that_tensorflow_knows(tmp_path):
  """A path with a scheme is listed by TensorFlow, as gs:// is."""
  write_images(tmp_path, "dog/1.jpg", "cat/2.jpg", "cat/more/3.jpg")
  remote = make("folder", path=f"file://{tmp_path}")
  local = make("folder", path=tmp_path)
  assert described(remote) == [f"file://{path}" for path in described(local)]
  assert remote.labels.tolist() == local.labels.tolist()


def test_folder_with_thousands_of_nested_files(tmp_path):
  contents = made_sources.encode(made_sources.photograph(0, 8, 8))
  for number in range(3000):
    folder = tmp_path / str(number % 50) / str(number % 7)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number}.jpg").write_bytes(contents)
  source = make("folder", path=tmp_path)
  assert source.num_examples == 3000
  assert source.num_classes == 50
  assert described(source) == described(make("folder", path=tmp_path))


@pytest.mark.parametrize(
  ("prepare", "message"),
  [
    (lambda root: root / "missing", "found nothing, expected a directory"),
    (lambda root: root / "file.jpg", "found a file, expected a directory"),
    (lambda root: root / "empty", "No images under .*; expected files that"),
    (lambda root: "", "data.path is empty"),
    (lambda root: root / "classes", "has class folder 'new'"),
  ],
)
def test_folder_mistakes(tmp_path, prepare, message):
  (tmp_path / "file.jpg").write_bytes(b"")
  (tmp_path / "empty").mkdir()
  write_images(
    tmp_path / "classes",
    "train/a/1.jpg",
    "train/b/2.jpg",
    "val/a/3.jpg",
    "val/new/4.jpg",
  )
  path = str(prepare(tmp_path))
  with pytest.raises(UserError, match=message):
    make("folder", "eval" if "classes" in path else "train", path=path)


def special_files(root: pathlib.Path) -> None:
  """A pipe, a socket, a device and links that lead nowhere, named as images."""
  os.mkfifo(root / "pipe.jpg")
  (root / "device.png").symlink_to("/dev/zero")
  (root / "broken.jpg").symlink_to("nothing")
  (root / "loop.jpg").symlink_to("loop.jpg")
  with socket.socket(socket.AF_UNIX) as sock, contextlib.chdir(root):
    sock.bind("socket.jpg")


def test_only_regular_files_are_images(tmp_path):
  write_images(tmp_path, "1.jpg", "2.jpg")
  special_files(tmp_path)
  (tmp_path / "3.jpg").symlink_to("1.jpg")
  source = make("folder", path=tmp_path)
  assert [os.path.basename(p) for p in described(source)] == [
    *("1.jpg", "2.jpg", "3.jpg", "broken.jpg")
  ]
  assert source.summary().endswith("4 pipes, devices or looping links skipped")
  paths, others = image_embeddings.find_images(str(tmp_path), [".jpg", ".png"])
  assert others == 3
  assert paths == ["1.jpg", "2.jpg", "3.jpg", "broken.jpg", "loop.jpg"]
  assert source.fingerprint()


@pytest.mark.parametrize("split", ["../secret", "/etc", "a/../../secret"])
def test_a_split_of_a_folder_is_inside(tmp_path, split):
  write_images(tmp_path, "secret/1.jpg", "data/train/2.jpg")
  for settings in ({"train_split": split}, {"eval_split": split}):
    with pytest.raises(UserError, match="is one of its subfolders"):
      make("folder", path=tmp_path / "data", **settings)


def test_names_of_images_are_relative_to_the_root(tmp_path):
  write_images(tmp_path, "train/1.jpg", "train/2.jpg")
  source = make("folder", path=tmp_path)
  assert source.describe(0) == f"{tmp_path}/train/1.jpg"
  assert source.relative_name(0) == "train/1.jpg"
  second = part.take(source, np.array([1]))
  assert second.relative_name(0) == "train/2.jpg"


# --- TFDS ---------------------------------------------------------------------


def test_tfds_in_memory_and_as_a_stream_are_the_same(tfds_dir, monkeypatch):
  """The same records have the same indices."""
  memory = make("tfds:tiny_photos", path=tfds_dir)
  monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 0)
  stream = make("tfds:tiny_photos", path=tfds_dir)
  assert memory.stream is None
  assert stream.stream is not None
  assert memory.label_names == ("a", "b", "c", "d")
  records = stream.stream.evaluate(0, 40)
  for number, record in enumerate(records):
    parsed = stream.stream.parse(record["serialized"])
    assert record["index"] == number
    assert parsed["label"] == memory.labels[number]
    image = memory.fetch(tf.constant(number, tf.int64))
    assert parsed["image"] == image


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize(
  ("split", "count"),
  [("train[:25%]", 10), ("train[12:]", 28), ("train[5:8]+test", 13)],
)
def test_tfds_split_expressions(tfds_dir, monkeypatch, split, count, limit):
  monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", limit)
  source = make("tfds:tiny_photos", path=tfds_dir, train_split=split)
  assert source.num_examples == count
  labels = made_sources.evaluated(source, batch_size=8, resize=20, crop=16)
  builder = tf_datasets.builder("tiny_photos", data_dir=tfds_dir)
  expected = builder.as_dataset(split=split, shuffle_files=False)
  expected = [int(example["label"]) for example in expected]
  # TFDS reads several files in turn; we, one after the other.
  assert sorted(labels["label"]) == sorted(expected)


def test_tfds_small_images_are_decoded_once(tmp_path):
  photos = [made_sources.photograph(i, 12, 10) for i in range(8)]
  pixels = [np.asarray(photo) for photo in photos]

  class TinySquares(made_sources.TinyPhotos):
    """Eight 12 x 10 images."""

    IMAGE = features.Image(shape=(10, 12, 3))
    FEATURES = features.FeaturesDict({"image": IMAGE})

    def _examples(self, count):
      for i, image in enumerate(pixels):
        yield i, {"image": image}

  TinySquares(data_dir=tmp_path).download_and_prepare()
  source = make("tfds:tiny_squares", path=tmp_path)
  assert source.images.shape == (8, 10, 12, 3)
  assert source.labels is None
  assert {i.tobytes() for i in source.images} == {i.tobytes() for i in pixels}


def test_tfds_arrays_of_many_channels(tmp_path):
  class TinySpectra(made_sources.TinyPhotos):
    """Six images of 13 channels and different sizes."""

    SPECTRUM = features.Tensor(
      shape=(None, None, 13), dtype=np.uint8, encoding="zlib"
    )
    FEATURES = features.FeaturesDict({"spectrum": SPECTRUM})

    def _examples(self, count):
      for i in range(6):
        yield i, {"spectrum": np.full((20 + i, 30, 13), 10 * i, np.uint8)}

  TinySpectra(data_dir=tmp_path).download_and_prepare()
  source = make("tfds:tiny_spectra", path=tmp_path, channels=13)
  batch = next(made_sources.train_batches(source, 6))
  assert batch["views"][0].shape == (6, 2, 16, 16, 13)
  assert set(batch["views"][0].ravel()) == {0, 10, 20, 30, 40, 50}
  with pytest.raises(UserError, match=r"data\.channels is 3.* 13 channels"):
    make("tfds:tiny_spectra", path=tmp_path)


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("tfds:cifar10", "train", r"not prepared.*download_and_prepare\(\)"),
    ("tfds:imagenet2012", "train", r"not prepared.*download_and_prepare\(\)"),
    ("tfds:cifar01", "train", "Unknown .*'cifar01'. Did you mean 'tfds:cifar"),
    ("tfds:cifar10:9.9.9", "train", "Cannot load 'tfds:cifar10:9.9.9'"),
    ("tfds", "train", "expected the data set after a colon"),
    ("tfds:tiny_photos", "nothing", "no split 'nothing'; expected one of"),
    ("tfds:tiny_photos", "train[oops]", "no split"),
  ],
)
def test_tfds_mistakes(tfds_dir, name, split, message):
  with pytest.raises(UserError, match=message) as error:
    make(name, path=tfds_dir, train_split=split)
  assert "\n" not in str(error.value)


# --- All ----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"name": "digit"}, "Unknown data source 'digit'. Did you mean 'digits'"),
    ({"train_split": "third"}, "no split 'third'"),
    ({"num_examples": 5}, "num_examples is 5, but source 'digits' has a fixed"),
    ({"name": "shapes"}, "num_examples is 0; .* expected their number"),
    ({"name": "synthetic", "num_examples": -1}, "num_examples is -1"),
    ({"interpolation": "cubic"}, "data.interpolation is 'cubic'"),
    (
      {"train_interpolation": "cubic"},
      "data.train_interpolation is 'cubic'; expected one of '', 'bicubic'",
    ),
    ({"on_bad_image": "skip"}, "data.on_bad_image is 'skip'"),
    (
      {"name": "folder", "channels": 5, "path": "docs"},
      "expected 1, 3 or 4 for image files",
    ),
  ],
)
def test_mistakes(overrides, message):
  with pytest.raises(UserError, match=message) as error:
    make(**({"name": "digits"} | overrides))
  assert "\n" not in str(error.value)


def test_training_and_evaluation_have_filters_of_their_own():
  both = make("digits")
  apart = make("digits", train_interpolation="bilinear")
  assert (apart.interpolation, apart.train_kernel) == ("bicubic", "bilinear")
  views = lambda source: next(made_sources.train_batches(source, 8))["views"][0]
  images = lambda source: made_sources.evaluated(
    source, batch_size=99, resize=12, crop=12
  )
  assert (views(both) != views(apart)).any()
  of_bilinear = views(make("digits", interpolation="bilinear"))
  np.testing.assert_array_equal(of_bilinear, views(apart))
  np.testing.assert_array_equal(images(both)["image"], images(apart)["image"])


def test_a_split_of_tfds_is_checked_before_images_are_read(tfds_dir):
  data_set = f"tfds:tiny_photos={tfds_dir}"
  named.check(data_set, ("train[:50%]", "test"))
  with pytest.raises(UserError, match="no split 'trian'; expected one of"):
    named.check(data_set, ("train", "trian"))


@pytest.mark.parametrize("own", [("train", "validation"), ("a", "a[:9]")])
def test_splits_that_a_tfds_data_set_lacks_become_its_own(own, tfds_dir):
  settings = ConfigDict(vars(made_sources.data_settings("digits")))
  settings.train_split, settings.eval_split = own
  named.choose(settings, f"tfds:tiny_photos={tfds_dir}")
  assert (settings.train_split, settings.eval_split) == ("train", "test")


def test_no_evaluation_split():
  assert make("digits", "eval", eval_split="") is None


def test_a_path_that_tfds_takes_for_a_pattern_is_named(tfds_dir, tmp_path):
  path = tmp_path / "[tf] ds"
  path.symlink_to(tfds_dir)
  with pytest.raises(UserError, match=r"has \[ \] in its path") as error:
    make("tfds:tiny_photos", path=path)
  assert "\n" not in str(error.value)


def test_a_folder_may_have_any_name(photo_folder, tmp_path):
  path = tmp_path / "[my] photos? *"
  path.symlink_to(photo_folder)
  assert make("folder", path=path).num_examples == 40
