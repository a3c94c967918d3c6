"""Which files of a folder are trained on, evaluated on, and labeled."""

from __future__ import annotations

import os
import pathlib
import unicodedata

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from tests.data import made_sources
from tests.data.made_sources import make

JPEG = made_sources.encode(made_sources.photograph(0, 12, 10))


def write(root: pathlib.Path, *names: str) -> pathlib.Path:
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(JPEG)
  return root


def names_of(source) -> set[str]:
  return {source.relative_name(i) for i in range(source.num_examples)}


def tree(train: str, *evaluation: str) -> list[str]:
  prefixes = [f"{train}/" if train else "", *(f"{e}/" for e in evaluation)]
  return [
    f"{p}{c}/{n}.jpg" for p in prefixes for c in ("cat", "dog") for n in "12"
  ]


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_a_misspelled_evaluation_part_is_refused_before_training(
  tmp_path, holdout
):
  write(tmp_path, *tree(""))
  options = {"path": tmp_path, "holdout": holdout}
  with pytest.raises(UserError, match="no split 'tset'; expected one of"):
    make("folder", eval_split="tset", **options)
  # Usual names may be absent: recipes have them.
  for name in ("val", "test", "", "train[50%:]"):
    assert make("folder", eval_split=name, **options).num_examples > 0


@pytest.mark.parametrize(
  ("train", "evaluation"),
  [
    ("Training", ["Testing"]),
    ("Train", ["Val", "Test"]),
    ("training_set", ["test_set"]),
    ("TRAIN", ["VALID"]),
    ("train-images", ["validation images"]),
    ("", ["Dev"]),
    ("trainset", ["testset"]),
    ("training_data", ["evaluation"]),
  ],
)
def test_splits_are_known_by_their_usual_names(tmp_path, train, evaluation):
  write(tmp_path, *tree(train, *evaluation))
  source = make("folder", path=tmp_path, eval_split="val")
  assert names_of(source) == set(tree(train))
  assert source.label_names == ("cat", "dog")
  test = make("folder", "eval", path=tmp_path, eval_split="val")
  assert names_of(test) == set(tree(evaluation[0])) if train else test
  assert test.labels.tolist() == [0, 0, 1, 1]
  asked = make("folder", "eval", path=tmp_path, eval_split=evaluation[-1])
  assert all(n.startswith(f"{evaluation[-1]}/") for n in names_of(asked))


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["train_a/1.jpg", "test_b/2.jpg"], "'test_b', 'train_a'"),
    (["images_train/1.jpg", "images_test/2.jpg"], "'images_test', 'images_tr"),
    (["Train/a/1.jpg", "test_2/a/2.jpg"], "'test_2'"),
    (["train/a/1.jpg", "training/a/2.jpg"], "look like splits"),
    (["train/1.jpg", "bus/2.jpg", "car/3.jpg"], "look like splits: 'train'"),
    (["cat/train/1.jpg", "cat/test/2.jpg", "dog/train/3.jpg"], "/cat' has fol"),
    (["archive/Train/a/1.jpg", "archive/Test/a/2.jpg"], r"archive' has folde"),
  ],
)
def test_what_only_looks_like_a_split_is_not_guessed(tmp_path, names, message):
  write(tmp_path, *names)
  with pytest.raises(UserError, match=message) as error:
    make("folder", path=tmp_path, eval_split="val")
  assert "\n" not in str(error.value)
  assert "data.train_split=''" in str(error.value)
  whole = make("folder", path=tmp_path, eval_split="val", train_split="")
  assert names_of(whole) == set(names)
  assert make("folder", "eval", path=tmp_path, train_split="") is None


def test_splits_of_other_names_can_be_set(tmp_path):
  write(tmp_path, *tree("train_a", "test_b"))
  settings = {"train_split": "train_a", "eval_split": "test_b"}
  train = make("folder", path=tmp_path, **settings)
  assert names_of(train) == set(tree("train_a"))
  test = make("folder", "eval", path=tmp_path, **settings)
  assert names_of(test) == set(tree("test_b"))


@pytest.mark.parametrize(
  "names",
  [
    ["trainers/1.jpg", "boots/2.jpg"],
    ["steam train/1.jpg", "car/2.jpg"],
    ["valley/1.jpg", "test tube/2.jpg"],
    ["evil/1.jpg", "developer/2.jpg"],
  ],
)
def test_classes_that_begin_like_splits_are_classes(tmp_path, names):
  assert make("folder", path=write(tmp_path, *names)).num_classes == 2


def test_a_split_that_is_not_there_is_refused(tmp_path):
  write(tmp_path, "cat/1.jpg", "dog/2.jpg")
  with pytest.raises(UserError, match=r"no split 'nothing'; .*\(cat, dog\)"):
    make("folder", path=tmp_path, train_split="nothing")
  with pytest.raises(UserError, match="no split 'nothing'"):
    make("folder", "eval", path=tmp_path, eval_split="nothing")


# --- Why there are no labels --------------------------------------------------


@pytest.mark.parametrize(
  ("names", "summary"),
  [
    (
      ["a/1.jpg", "b/2.jpg", "loose.jpg"],
      "unlabeled: 1 of 3 images ('loose.jpg') are beside the 2 folders that"
      " could be classes; with labels once every image is in one of them",
    ),
    (
      ["a/1.jpg", "b/x.psd", "b/y.psd"],
      "unlabeled: only one subfolder has images, 'a'; there are none in b;"
      " 2 other files ignored (.psd 2)",
    ),
    (["1.jpg", "2.jpg"], "2 images, unlabeled"),
    (["a/1.jpg", "b/2.tif", "b/3.npy"], "3 images, 2 classes (a, b)"),
  ],
)
def test_the_summary_says_why_there_are_no_labels(tmp_path, names, summary):
  source = make("folder", path=write(tmp_path, *names))
  assert source.summary().endswith(summary)


def test_folders_that_systems_create_are_skipped(tmp_path):
  write(tmp_path, "a/1.jpg", "a/@eaDir/1.jpg/THUMB.jpg", "b/2.jpg")
  write(tmp_path, "__MACOSX/a/._1.jpg", "__MACOSX/3.jpg", "@eaDir/4.jpg")
  (tmp_path / "a" / "Thumbs.db").write_bytes(b"")
  source = make("folder", path=tmp_path)
  assert names_of(source) == {"a/1.jpg", "b/2.jpg"}
  assert source.label_names == ("a", "b")
  assert "1 other file ignored (.db 1)" in source.summary()
  assert "folders @eaDir, __MACOSX skipped" in source.summary()


def test_names_are_compared_in_one_form_of_unicode(tmp_path):
  composed, decomposed = (
    unicodedata.normalize(form, "café") for form in ("NFC", "NFD")
  )
  write(tmp_path, f"train/{decomposed}/1.jpg", "train/tea/2.jpg")
  write(tmp_path, f"val/{composed}/3.jpg", "val/tea/4.jpg")
  train, test = (
    make("folder", split, path=tmp_path) for split in ("train", "eval")
  )
  assert train.label_names == test.label_names == (composed, "tea")
  assert test.labels.tolist() == [0, 1]


def test_names_that_are_not_utf8_can_be_printed_and_hashed(tmp_path):
  top = os.fsencode(tmp_path)
  for folder in (b"caf\xe9", b"tea\nbag"):
    os.mkdir(top + b"/" + folder)
    with open(top + b"/" + folder + b"/\xff.jpg", "wb") as file:
      file.write(JPEG)
  source = make("folder", path=tmp_path)
  assert source.label_names == ("caf\\xe9", "tea\\nbag")
  assert source.relative_name(0) == "caf\\xe9/\\xff.jpg"
  source.summary().encode()
  assert source.fingerprint()
  found = made_sources.evaluated(source, batch_size=2, resize=16, crop=16)
  assert len(found["image"]) == 2


# --- Parts of train -----------------------------------------------------------


@pytest.fixture
def classes(tmp_path):
  """Three classes of 40, 10 and 1 images."""
  sizes = {"a": 40, "b": 10, "c": 1}
  root = tmp_path / "classes"
  return write(
    root, *(f"{c}/{i}.jpg" for c, n in sizes.items() for i in range(n))
  )


def test_a_part_of_every_class_is_held_out(classes):
  settings = {"path": classes, "holdout": 0.1, "eval_split": "val"}
  train, test = (
    make("folder", split, **settings) for split in ("train", "eval")
  )
  assert np.bincount(train.labels).tolist() == [36, 9, 1]
  assert np.bincount(test.labels).tolist() == [4, 1]
  assert train.label_names == test.label_names == ("a", "b", "c")
  assert not names_of(train) & names_of(test)
  assert len(names_of(train) | names_of(test)) == 51
  assert "5 of 51 images are for evaluation alone" in train.summary()
  assert train.name != test.name
  assert train.fingerprint() != test.fingerprint()
  again = make("folder", "eval", **settings)
  assert names_of(again) == names_of(test)
  other = make("folder", "eval", **settings, holdout_seed=1)
  assert names_of(other) != names_of(test)
  # What is held out depends on the names, not on the place.
  moved = classes.rename(classes.parent / "moved")
  there = make("folder", "eval", **(settings | {"path": moved}))
  assert names_of(there) == names_of(test)


def test_slices_of_train_have_their_share_of_every_class(classes):
  settings = {
    "path": classes, "train_split": "train[:80%]", "eval_split": "train[80%:]",
  }  # fmt: skip
  train, test = (
    make("folder", split, **settings) for split in ("train", "eval")
  )
  assert train.num_examples == 41
  assert np.bincount(train.labels)[:2].tolist() == [32, 8]
  assert not names_of(train) & names_of(test)
  assert len(names_of(train) | names_of(test)) == 51
  assert train.fingerprint() != test.fingerprint()
  five = make("folder", path=classes, train_split="train[:5]")
  assert five.num_examples == 5
  assert names_of(five) <= names_of(train)


def test_a_share_from_the_end_begins_where_the_others_end(classes):
  """Of 51 images half is 25.5."""
  first, last = (
    make("folder", path=classes, train_split=f"train[{part}]")
    for part in (":50%", "-50%:")
  )
  assert not names_of(first) & names_of(last)
  assert first.num_examples + last.num_examples == 51


@pytest.mark.parametrize("train", ["", "train"])
@pytest.mark.parametrize("target", ["val", "val/cat"])
def test_a_link_into_the_evaluation_part_is_not_trained_on(
  tmp_path, train, target
):
  root = write(tmp_path, *tree(train, "val"))
  (root / train / "zebra").symlink_to(root / target)
  assert names_of(make("folder", path=root)) == {*tree(train)}


def test_a_split_within_the_training_folder_is_not_trained_on(tmp_path):
  root = write(tmp_path, *tree("all", "all/held"))
  splits = {"train_split": "all", "eval_split": "all/held"}
  assert make("folder", path=root, **splits).num_examples == 4
  assert make("folder", "eval", path=root, **splits).num_examples == 4


def test_a_link_may_make_one_folder_both_parts(tmp_path):
  root = write(tmp_path, *tree("train"))
  (root / "val").symlink_to("train")
  for split in ("train", "eval"):
    assert make("folder", split, path=root).num_examples == 4


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"train_split": "train[50%:50%]"}, "has no image"),
    ({"holdout": 0.5, "path": "single"}, "no class .* has two images"),
    ({"holdout": 0.1, "path": "with_val"}, "has an evaluation part, 'val'"),
  ],
)
def test_parts_that_cannot_be(classes, settings, message):
  write(classes.parent / "single", "a/1.jpg", "b/2.jpg")
  write(classes.parent / "with_val", "a/1.jpg", "val/2.jpg")
  path = classes.parent / settings["path"] if "path" in settings else classes
  with pytest.raises(UserError, match=message):
    make("folder", **(settings | {"path": path}))


def test_only_folders_hold_out():
  with pytest.raises(UserError, match=r"data\.holdout .* 'train\[:90%\]'"):
    make("digits", holdout=0.1)


# --- Labels in a table --------------------------------------------------------


@pytest.mark.parametrize(
  "text",
  [
    "file,label\n1.jpg,10\nx/2.jpg,9\n",
    "1.jpg,10\nx/2.jpg,9\n",
    "\ufefflabel;id;path\n10;7;./1.jpg\n9;8;x/2.jpg\n",
  ],
)
def test_labels_of_a_csv_file(tmp_path, text):
  write(tmp_path / "images", "1.jpg", "x/2.jpg", "x/3.jpg")
  (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
  source = make(
    "folder", path=tmp_path / "images", labels=str(tmp_path / "labels.csv")
  )
  assert source.label_names == ("9", "10")
  assert source.labels.tolist() == [1, 0, -1]


def test_labels_of_a_parquet_file(tmp_path):
  parquet = pytest.importorskip("pyarrow.parquet")
  import pyarrow

  write(tmp_path / "images", "train/1.jpg", "val/2.jpg")
  table = {"path": ["train/1.jpg", "val/2.jpg"], "class": ["dog", "cat"]}
  parquet.write_table(pyarrow.table(table), tmp_path / "labels.parquet")
  settings = {
    "path": tmp_path / "images", "labels": str(tmp_path / "labels.parquet"),
  }  # fmt: skip
  train, test = (
    make("folder", split, **settings) for split in ("train", "eval")
  )
  assert train.label_names == test.label_names == ("cat", "dog")
  assert (train.labels.tolist(), test.labels.tolist()) == ([1], [0])


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("other.jpg,1\n", "names none of the 1 images"),
    ("a,b,c\n1,2,3\n", "has 3 columns, a, b, c; expected 'file' and 'label'"),
    ("", "has no rows"),
    (None, "Cannot read data.labels=.*No such file"),
  ],
)
def test_mistakes_in_tables(tmp_path, text, message):
  write(tmp_path / "images", "1.jpg")
  if text is not None:
    (tmp_path / "labels.csv").write_text(text)
  with pytest.raises(UserError, match=message) as error:
    make(
      "folder", path=tmp_path / "images", labels=str(tmp_path / "labels.csv")
    )
  assert "\n" not in str(error.value)
