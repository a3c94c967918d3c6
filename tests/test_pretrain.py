"""`imsvd_jax.pretrain`, and what it makes of its arguments."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import imsvd_jax
from imsvd_jax.base import tensorflow_notes
from imsvd_jax.base.config import as_json, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import one_call
from imsvd_jax.evaluation.recipe_comparison import load_recipe
from imsvd_jax.runs import resume
from tests.run_command import ROOT, one_line_error

RECIPE = f"{ROOT}/configs/folder_r18.py:debug"
SMALL = {"data__num_examples": 0, "batch_size": 16, "epochs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for number in range(16):
    pixels = rng.integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.png")
  return folder


def test_a_folder_becomes_an_encoder_and_the_call_again_is_the_same(
  folder, tmp_path, capsys
):
  run = tmp_path / "run"
  encoder = imsvd_jax.pretrain(folder, run, recipe=RECIPE, **SMALL)
  images = np.full((2, 40, 48, 3), 100, np.uint8)
  features = encoder(images)
  assert encoder.step == 2
  assert features.shape == (2, 32)
  # The run is that of the command.
  expected = load_recipe(RECIPE).config
  changes = {"data.name": "folder", "data.path": str(folder)}
  changes |= {"data.num_examples": 0, "batch_size": 16, "epochs": 2.0}
  expected.update_from_flattened_dict(changes)
  stored = flatten(resume.load_config(run))
  assert stored == flatten(as_json(expected.to_dict()))
  # It has ended: the same call loads it; another recipe is refused.
  capsys.readouterr()
  again = imsvd_jax.pretrain(folder, run, recipe=RECIPE, **SMALL)
  np.testing.assert_array_equal(again(images), features)
  with pytest.raises(UserError, match="batch_size"):
    imsvd_jax.pretrain(folder, run, recipe=RECIPE, **{**SMALL, "batch_size": 8})
  said = capsys.readouterr().err
  assert "for more: epochs=4, allow_changes=('epochs',)." in said


@pytest.mark.parametrize(
  ("flag", "argument"),
  [
    ("--config.epochs=12", "epochs=12"),
    ("--config.model.dtype=float32 makes", 'model__dtype="float32" makes'),
    ("--config.optimizer.momentum=0.1.", "optimizer__momentum=0.1."),
    ("--config.epochs=2 --config.seed=1", "epochs=2, seed=1"),
    ('--config.stop.when="".', 'stop__when="".'),
    ("--config.allow_changes=\"('epochs',)\"", "allow_changes=('epochs',)"),
    ("--config.init_from= and", "init_from= and"),
    ("--config.views.view1.size.", "views__view1__size."),
    ("a new --workdir, or", "a new out=, or"),
    ("imsvd explain --workdir=runs/a", "imsvd explain --workdir=runs/a"),
  ],
)
def test_messages_speak_python(flag, argument):
  assert one_call._in_python(f"Try {flag}") == f"Try {argument}"


@pytest.mark.parametrize(
  ("text", "name", "path"),
  [
    ("~/images", "folder", "~/images"),
    ("folder:~/images", "folder", "~/images"),
    ("arrays:a.npz", "arrays", "a.npz"),
    ("a/b.NPY", "arrays", "a/b.NPY"),
    ("tar:shards", "tar", "shards"),
    ("gs://bucket/images", "folder", "gs://bucket/images"),
    ("digits", "digits", None),
    ("tfds:cifar10", "tfds:cifar10", None),
    ("./digits", "folder", "./digits"),
    ("folder", "folder", "folder"),
  ],
)
def test_words_for_data(text, name, path):
  found = one_call._data_keys(text)
  assert found == {"data.name": name, **({"data.path": path} if path else {})}


def test_the_recipes_own_data_is_the_default():
  assert one_call._data_keys("") == {}


@pytest.mark.parametrize(
  ("keys", "message"),
  [
    ({"epoch": 3}, "no key 'epoch'.*Did you mean 'epochs'"),
    ({"holdout": 0.1}, "no key 'holdout'.*Did you mean 'data.holdout'"),
    ({"model": {"backbone": "x"}}, "no key 'model'"),
    ({"epochs": "ten"}, r"epochs='ten'; expected a value like"),
    ({"epochs": None}, r"epochs=None; expected a value like"),
    ({"backbone": "resnet49"}, "Unknown backbone 'resnet49'"),
    ({"backbone": "resnet18", "model.backbone": "resnet50"}, "given twice"),
    ({"batch_size": 0}, "batch_size"),
    ({"recipe": "none.py"}, "No recipe 'none.py'"),
    ({"data": 7}, "data=7; expected a path"),
    ({"out": None}, "out=None; expected a path"),
  ],
)
def test_mistakes_are_one_line(keys, message, folder, tmp_path):
  with one_line_error(message):
    imsvd_jax.pretrain(
      **{"data": folder, "out": tmp_path / "run", "recipe": RECIPE, **keys}
    )
  assert not (tmp_path / "run").exists()


@pytest.mark.proof
def test_nothing_but_ours_is_printed(folder, tmp_path):
  images = shutil.copytree(folder, tmp_path / "images")
  next(images.rglob("*.*")).with_name("bad.jpg").write_bytes(b"\xff\xd8\xff no")
  code = (
    "import sys, imsvd_jax; imsvd_jax.pretrain(sys.argv[1], sys.argv[2],"
    f" recipe={RECIPE!r}, **{SMALL!r})"
  )
  # Without what the tests themselves set.
  environment = {k: v for k, v in os.environ.items() if k[:3] != "TF_"}
  done = subprocess.run(
    [sys.executable, "-c", code, images, tmp_path / "run"],
    cwd=ROOT,
    env=environment,
    capture_output=True,
    text=True,
    check=True,
  )
  assert not re.search(tensorflow_notes.KNOWN, done.stderr, re.MULTILINE)
  assert "oneDNN" not in done.stderr
  assert "marker type" not in done.stderr  # libjpeg, of the damaged file.
  assert "bad.jpg" in done.stderr
  assert re.search("^Model: resnet8, ", done.stdout + done.stderr, re.MULTILINE)


def test_a_run_needs_a_directory(folder):
  with one_line_error("needs out="):
    imsvd_jax.pretrain(folder, recipe=RECIPE)
