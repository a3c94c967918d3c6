"""Prepared TFDS data from elsewhere: nothing that they name is imported."""

import json
import os
import shutil
import sys

import pytest

from imsvd_jax.base.errors import UserError
from tests.data.made_sources import make

IMAGE = {
  "pythonClassName": "tensorflow_datasets.core.features.image_feature.Image",
  "image": {
    "dtype": "uint8",
    "encodingFormat": "jpeg",
    "shape": {"dimensions": ["-1", "-1", "3"]},
  },
}


def new_format(**features):
  return {
    "pythonClassName": (
      "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    ),
    "featuresDict": {"features": {"image": IMAGE, **features}},
  }


def as_json(class_name, content):
  return {
    "pythonClassName": class_name,
    "jsonFeature": {"json": json.dumps(content)},
  }


EVIL = {"type": "evil_module.Feature", "content": {}}
TFDS = "tensorflow_datasets.core.features"
CONTENTS = {
  "outermost": as_json("evil_module.Feature", {}),
  "one of several": new_format(x=as_json("evil_module.Feature", {})),
  "of a sequence": new_format(
    x={
      "pythonClassName": f"{TFDS}.sequence_feature.Sequence",
      "sequence": {"feature": as_json("evil_module.Feature", {})},
    }
  ),
  "JSON within JSON": new_format(
    x=as_json(
      f"{TFDS}.sequence_feature.Sequence", {"feature": EVIL, "length": None}
    )
  ),
  "the old format": {
    "type": f"{TFDS}.features_dict.FeaturesDict",
    "content": {"x": EVIL},
  },
  "nearly the prefix": as_json("tensorflow_datasets_evil_module.Feature", {}),
  "a tricky path": as_json("tensorflow_datasets..evil_module.Feature", {}),
}


@pytest.fixture
def foreign(tfds_dir, tmp_path, monkeypatch):
  """A data set of unknown code, and code in the current directory."""
  (source,) = tfds_dir.glob("tiny_photos/*")
  folder = tmp_path / "data" / "foreign_photos" / source.name
  shutil.copytree(source, folder)
  info = json.loads((folder / "dataset_info.json").read_text())
  info["name"] = "foreign_photos"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  for path in folder.glob("tiny_photos-*"):
    path.rename(folder / path.name.replace("tiny", "foreign"))
  for name in ("evil_module", "tensorflow_datasets_evil_module"):
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    (tmp_path / f"{name}.py").write_text(code)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  return folder


def load(folder, name="tfds:foreign_photos"):
  return make(name, path=folder.parents[1])


def test_data_of_unknown_code_are_read_from_their_files(foreign):
  assert load(foreign).num_examples == 40


@pytest.mark.parametrize("case", CONTENTS)
def test_no_class_of_others_is_imported(foreign, case):
  (foreign / "features.json").write_text(json.dumps(CONTENTS[case]))
  with pytest.raises(UserError, match=r"features\.json .* names the class"):
    load(foreign)
  assert not (foreign.parents[2] / "ran").exists()
  assert "evil_module" not in sys.modules


def test_a_damaged_list_of_features_is_one_line(foreign):
  image = {**IMAGE, "image": {"encodingFormat": "jpeg"}}  # Without a dtype.
  (foreign / "features.json").write_text(json.dumps(new_format(image=image)))
  with pytest.raises(UserError, match="Cannot load 'tfds:foreign_photos': "):
    load(foreign)


def test_no_file_is_read_for_the_names_of_classes(foreign, tmp_path):
  (tmp_path / "secret").write_text("a\nb\nc\nd\n")
  label = as_json(
    f"{TFDS}.class_label_feature.ClassLabel",
    {"names_file": str(tmp_path / "secret")},
  )
  (foreign / "features.json").write_text(json.dumps(new_format(label=label)))
  with pytest.raises(UserError, match=r"names the file .*secret"):
    load(foreign)


@pytest.mark.parametrize(
  "name",
  [
    "evil_module:foreign_photos",
    "huggingface:mnist",
    "../foreign_photos",
    "foreign_photos/..",
    "foreign_photos/data_dir=/tmp",
    "foreign_photos/x/data_dir=/tmp",
    "/tmp/foreign_photos",
    "evil module",
  ],
)
def test_names_that_choose_code_or_paths_are_refused(foreign, name):
  with pytest.raises(UserError, match=r"expected a name of TFDS's catalog"):
    load(foreign, f"tfds:{name}")
  assert not (foreign.parents[2] / "ran").exists()


def test_records_elsewhere_are_refused(foreign):
  path = foreign / "dataset_info.json"
  info = json.loads(path.read_text())
  for split in info["splits"]:
    split["filepathTemplate"] = "../../../{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  path.write_text(json.dumps(info))
  with pytest.raises(UserError, match=r"names the file .* expected files in"):
    load(foreign)


@pytest.mark.parametrize(
  "name", ["features.json", "dataset_info.json", "records"]
)
def test_a_pipe_among_the_files_does_not_hang(foreign, name):
  if name == "records":
    name = next(foreign.glob("*.tfrecord*")).name
  (foreign / name).unlink()
  os.mkfifo(foreign / name)
  with pytest.raises(UserError, match="is not a regular file"):
    load(foreign)
