"""--data means the same in every command, and is checked before weights."""

import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import digits
from imsvd_jax.base.errors import UserError
from imsvd_jax.data import named
from imsvd_jax.evaluation import offline
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.explain import run_subject
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.interop import image_embeddings
from imsvd_jax.runs import ownership
from tests.run_command import check_refused, one_line_error, run_imsvd
from tests.runs import made_runs


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("folder:{}", ("folder", "{}")),
    ("folder={}", ("folder", "{}")),
    ("{}", ("folder", "{}")),
    ("arrays:{}", ("arrays", "{}")),
    ("folder:gs://b/c", ("folder", "gs://b/c")),
    ("tar:{}/a-{{0..9}}.tar", ("tar", "{}/a-{{0..9}}.tar")),
    ("tfds:cifar10", ("tfds:cifar10", "")),
    ("tfds:voc/2007=/x", ("tfds:voc/2007", "/x")),
    ("digits", ("digits", "")),
  ],
)
def test_a_name_and_a_path(text, expected, tmp_path):
  folder = tmp_path / "a=b:c"
  folder.mkdir()
  made = named.name_and_path(text.format(folder))
  assert made == tuple(word.format(folder) for word in expected)


def write_splits(kind, folder, names):
  """Writes data of some splits; returns how --data names them."""
  path = folder / "data.npz" if kind == "arrays" else folder
  if kind == "arrays":
    images = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(path, **{f"{name}_images": images for name in names})
  for name in names if kind == "folder" else ():
    (folder / name).mkdir()
  for name in names if kind == "tar" else ():
    (folder / f"{name}-000.tar").touch()
  return "digits" if kind == "digits" else f"{kind}:{path}"


SLICES = ("train[:80%]", "train[80%:]")


@pytest.mark.parametrize(
  ("kind", "there", "own", "expected"),
  [
    ("arrays", ["train", "val", "test"], ("train", "test"), ("train", "test")),
    ("arrays", ["train", "test"], ("train", "validation"), ("train", "test")),
    ("arrays", ["train", "val"], ("train", "test"), ("train", "val")),
    ("arrays", ["train", "test"], ("unlabelled", "test"), ("train", "test")),
    ("arrays", ["train", "test"], SLICES, ("train", "test")),
    ("arrays", ["train", "test"], ("train", ""), ("train", "test")),
    # Nothing to take instead: the source names what is there.
    ("arrays", ["train"], ("train", "test"), ("train", "test")),
    ("arrays", ["train"], SLICES, SLICES),
    ("arrays", ["mine"], ("train", "test"), ("mine", "test")),
    # Any usual name stands for any other in a folder.
    ("folder", ["train", "test"], ("train", "val"), ("train", "val")),
    ("folder", ["train", "val"], ("unlabelled", "val"), ("train", "val")),
    ("folder", ["train", "val"], SLICES, ("train", "validation")),
    ("folder", ["cat", "dog"], SLICES, SLICES),
    ("tar", ["train", "test"], ("train", "validation"), ("train", "test")),
    ("digits", [], ("train", "validation"), ("train", "test")),
  ],
)
def test_splits_that_other_data_lack_become_their_own(
  kind, there, own, expected, tmp_path
):
  settings = settings_of(*own)
  named.choose(settings, write_splits(kind, tmp_path, there))
  assert (settings.train_split, settings.eval_split) == expected


def settings_of(train_split, eval_split, num_examples=0):
  return ConfigDict(
    {
      "name": "",
      "path": "",
      "train_split": train_split,
      "eval_split": eval_split,
      "num_examples": num_examples,
    }
  )


def test_drawn_images_need_their_number():
  settings = settings_of("train", "validation", num_examples=8)
  named.choose(settings, "shapes")
  assert (settings.num_examples, settings.eval_split) == (8, "test")
  with one_line_error("--data=shapes draws data.num_examples images"):
    named.choose(settings_of("train", "test"), "shapes")


def evaluate(data):
  offline.evaluate_runs(Options(workdir=("/no/run",), data=data))


def explain(data):
  run_subject.explain_run("/no/run", RunOptions(data=data))


def embed(data):
  image_embeddings.embed("/no/run", data, split="train")


WRONG = [
  ("fodler:x", "Unknown data source 'fodler'. Did you mean 'folder'"),
  ("digit", "Did you mean 'digits'"),
  ("folder:/no/images", "/no/images does not exist; expected folder:DIR"),
  ("arrays=/no/file.npz", "/no/file.npz does not exist"),
  ("/no/images", "no such folder; expected folder:DIR"),
  ("folder", "names no file"),
  ("tfds", "expected folder:DIR, arrays:FILE"),
  ("digits:x", "expected folder:DIR, arrays:FILE"),
  ("tfds:mnits", "Unknown TensorFlow data set 'mnits'. Did you mean"),
  ("tfds:mnist=/no/folder", "is not prepared"),
]


@pytest.mark.parametrize("command", [evaluate, explain, embed])
@pytest.mark.parametrize(("data", "message"), WRONG)
def test_wrong_data_are_found_before_weights(command, data, message):
  with one_line_error(message):
    command(data)


def test_wrong_splits_are_found_before_weights():
  options = Options(workdir=("/no/run",), splits=("train",))
  with pytest.raises(UserError, match="expected two names"):
    offline.evaluate_runs(options)


@pytest.fixture
def run_on_data_that_are_gone(tmp_path, monkeypatch):
  """A user's own run, whose weights must not be read."""
  config = digits.get_config("debug")
  config.data.name, config.data.path = "arrays", str(tmp_path / "gone.npz")
  config.data.num_examples = 0
  workdir = tmp_path / "run"
  made_runs.save_run(workdir, [1], config=config.to_dict())
  ownership.sign(workdir, config)
  monkeypatch.delattr(ocp.PyTreeCheckpointHandler, "restore")
  return str(workdir)


@pytest.mark.parametrize(
  "command",
  [
    lambda run: offline.evaluate_runs(
      Options(workdir=(run,), splits=("train", "test"))
    ),
    lambda run: run_subject.explain_run(run, RunOptions(split="train")),
    lambda run: image_embeddings.embed(run, split="train"),
  ],
  ids=["evaluate", "explain", "embed"],
)
def test_wrong_own_data_are_found_before_weights(
  command, run_on_data_that_are_gone
):
  with one_line_error(r"gone\.npz.: found nothing"):
    command(run_on_data_that_are_gone)


def test_embedding_a_data_set_asks_for_its_split():
  with one_line_error("is a data set with splits; name one"):
    image_embeddings.embed("/no/run", "tfds:cifar10")


def test_looking_at_data_takes_it_in_place_of_the_recipes(tmp_path):
  path = tmp_path / "bright.npz"
  images = np.full((4, 8, 8, 3), 255, np.uint8)
  np.savez(path, train_images=images, train_labels=np.arange(4))
  look = ("data", "stats", "--config=digits:debug")
  found = run_imsvd(*look, f"--data=arrays:{path}")
  assert found.returncode == 0, found.stderr
  assert 'data.mean="(1.0000, 1.0000, 1.0000)"' in found.stdout
  missing = run_imsvd(*look, "--data=folder:/no/images")
  check_refused(missing, "/no/images does not exist; expected folder:DIR")
