"""--data means the same in every command, and is checked before weights."""

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import named
from imsvd_jax.evaluation import offline
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.explain import run_subject
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.interop import image_embeddings
from tests.run_command import check_refused, one_line_error, run_imsvd


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
  assert 'data.mean="(1.0000, 1.0000, 1.0000,)"' in found.stdout
  missing = run_imsvd(*look, "--data=folder:/no/images")
  check_refused(missing, "/no/images does not exist; expected folder:DIR")
