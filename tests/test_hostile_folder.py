"""A folder with every trap, through every command that reads images."""

import dataclasses
import io
import os
import pathlib

import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import offline, results
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.explain import data_page, run_subject
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.interop import image_embeddings
from imsvd_jax.runs import metrics
from imsvd_jax.train import train_and_evaluate
from tests.run_command import run_imsvd
from tests.test_train_folder import jpeg
from tests.train_child import small_config

NAMES = [
  b"plain.jpg", b"caf\xe9.jpg", "\u732b.jpg".encode(),
  "\U0001f600.jpg".encode(), b"<img onerror=alert(1)>.jpg", b"new\nline.jpg",
  b"a" * 251 + b".jpg",
]  # fmt: skip
CLASSES = [b"cat", b"d\xffg", "\u732b".encode(), b"<b>&quot;", b"two\nlines"]


def fill(root: bytes) -> None:
  """Seven images in each class, and the traps in the first one."""
  number = 0
  for folder in CLASSES:
    os.makedirs(root + b"/" + folder)
    for name in NAMES:
      with open(b"/".join([root, folder, name]), "wb") as file:
        file.write(jpeg(number))
      number += 1
  first = root + b"/cat/"
  os.symlink(b"nothing", first + b"dangling.jpg")
  os.symlink(b"loop.jpg", first + b"loop.jpg")
  os.symlink(b".", first + b"circle")
  os.mkfifo(first + b"pipe.jpg")
  for name, content in {
    b"truncated.jpg": jpeg(0)[:500],
    b"corrupt.jpg": jpeg(0)[:500] + b"\xff\x07\0\3" * 9 + jpeg(0)[540:],
    b"Thumbs.db": b"x",
    b"empty.png": b"",
  }.items():
    with open(first + name, "wb") as file:
      file.write(content)
  os.mkdir(first + b"locked")
  os.chmod(first + b"locked", 0)
  for folder in (b"cat/@eaDir", b"__MACOSX"):
    os.mkdir(root + b"/" + folder)
    with open(root + b"/" + folder + b"/thumb.jpg", "wb") as file:
      file.write(jpeg(1))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
  root = tmp_path_factory.mktemp("hostile")
  for split in ("train", "val"):
    fill(os.fsencode(root / split))
  yield root
  for split in ("train", "val"):
    os.chmod(root / split / "cat" / "locked", 0o700)


def config_of(path, **overrides):
  return small_config(
    **{
      "data.name": "folder",
      "data.path": str(path),
      "data.eval_split": "val",
      "data.num_examples": 0,
      "eval.final": True,
      "eval.baselines": False,
      **overrides,
    }
  )


NUM_IMAGES = len(NAMES) * len(CLASSES)
SHOWN = ["<b>&quot;", "cat", "d\\xffg", "two\\nlines", "\u732b"]


@pytest.mark.proof
def test_a_hostile_folder_goes_through_every_command(hostile, tmp_path, capsys):
  workdir, config = str(tmp_path / "run"), config_of(hostile)
  state = train_and_evaluate(config, workdir)
  assert int(state.bad_images) > 0
  lines = metrics.read_metrics(workdir)
  assert any("final_knn" in line for line in lines)

  (result,) = offline.evaluate_runs(
    Options(
      workdir=(workdir,), protocol=("knn/imsvd",), set=("num_neighbors=3",)
    )
  )
  assert 0 <= result.final <= 1

  options = RunOptions(figure_format="png", num_top=1, integrated_per_bin=0)
  report = run_subject.explain_run(workdir, options)
  capsys.readouterr()
  del report
  pages = list(pathlib.Path(workdir).glob("explain-*/explorer/**/*.js"))
  assert pages
  text = "".join(page.read_text() for page in pages)
  assert "<img onerror=alert(1)>" not in text.replace("\\u003c", "")

  output = str(tmp_path / "features.csv")
  notes = image_embeddings.write_embeddings(
    output, workdir, str(hostile / "val")
  )
  assert f"{NUM_IMAGES} images" in notes[0]
  rows = pathlib.Path(output).read_text().splitlines()
  assert len(rows) == 1 + NUM_IMAGES
  for name in ("dangling.jpg", "loop.jpg", "corrupt.jpg", "truncated.jpg"):
    assert name in "".join(notes) or "..." in "".join(notes)

  lines = data_page.check_data(config, str(tmp_path / "page"))
  said = "\n".join(lines)
  said.encode()
  assert "Classes: 5" in said
  assert "there is no such file; a broken link?: train/cat/dangling.jpg" in said
  assert "the file is empty: train/cat/empty.png" in said
  assert f"{NUM_IMAGES} images in both parts" in said
  html = (tmp_path / "page" / "index.html").read_text()
  assert "<img onerror" not in html
  assert "data.mean=" in "\n".join(data_page.data_stats(config))


@pytest.mark.proof
def test_a_corrupt_jpeg_is_one_line_of_ours(hostile, tmp_path):
  """Of libjpeg, TensorFlow and us, only we speak; a file has one line."""
  recipe = str(pathlib.Path(__file__).with_name("train_child.py"))
  images = tmp_path / "images"
  images.mkdir()
  for number in range(12):
    (images / f"{number}.jpg").write_bytes(jpeg(number))
  for name in ("corrupt.jpg", "truncated.jpg"):
    content = (hostile / "train" / "cat" / name).read_bytes()
    (images / name).write_bytes(content)
  result = run_imsvd(
    *("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}"),
    "--config.data.name=folder",
    f"--config.data.path={images}",
    "--config.data.num_examples=0",
    "--config.epochs=4",
  )
  assert result.returncode == 0, result.stderr
  for name in ("corrupt.jpg", "truncated.jpg"):
    assert result.stderr.count(name) == 1, result.stderr
  for noise in ("Corrupt JPEG", "Premature end", "marker", "INVALID_ARGUMENT"):
    assert noise not in result.stderr


# --- Trouble in the evaluation part -------------------------------------------


def write(root, *names):
  for number, name in enumerate(names):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(jpeg(number))


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["val/a/9.jpg", "val/new/9.jpg"], "has class folder 'new'"),
    (["val/empty/x.txt"], "No images under"),
  ],
)
def test_trouble_in_the_evaluation_part_is_a_warning(
  names, message, tmp_path, capsys
):
  write(tmp_path, *(f"train/{c}/{i}.jpg" for c in "ab" for i in range(8)))
  write(tmp_path, *names)
  config = config_of(tmp_path, **{"epochs": 1.0})
  state = train_and_evaluate(config, str(tmp_path / "run"))
  assert int(state.step) == 1
  said = capsys.readouterr().err
  assert "No k-NN or linear evaluation: WARNING: " in said
  assert message in said


def test_an_evaluation_without_a_test_part_says_what_to_do(tmp_path):
  write(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(8)))
  config = config_of(tmp_path, **{"epochs": 1.0})
  workdir = str(tmp_path / "run")
  train_and_evaluate(config, workdir)
  options = Options(
    workdir=(workdir,), protocol=("knn/imsvd",), set=("num_neighbors=3",)
  )
  with pytest.raises(UserError, match=r"eval_split is 'val'.*train\[80%:\]"):
    offline.evaluate_runs(options)
  splits = ("train[:75%]", "train[75%:]")
  (result,) = offline.evaluate_runs(dataclasses.replace(options, splits=splits))
  assert result.num_images == 4
  held_out = dataclasses.replace(options, holdout=0.2)
  (result,) = offline.evaluate_runs(held_out)
  assert result.num_images == 4
  assert result.data["holdout"] == 0.2
  # Of another folder, and by an encoder that held out more of its own.
  other = tmp_path / "other"
  write(other, *(f"{c}/{i}.jpg" for c in "ab" for i in range(5)))
  on_other = dataclasses.replace(held_out, data=f"folder={other}")
  (result,) = offline.evaluate_runs(on_other)
  assert result.num_images == 2
  with pytest.raises(UserError, match=r"--holdout=2; expected a share of 0 to"):
    offline.evaluate_runs(dataclasses.replace(held_out, holdout=2))
  with pytest.raises(UserError, match=r"test split.* hold a part out: --holdo"):
    offline.evaluate_runs(dataclasses.replace(on_other, holdout=None))


def test_a_held_out_part_gives_accuracy(tmp_path, capsys):
  write(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(10)))
  config = config_of(tmp_path, **{"epochs": 1.0, "data.holdout": 0.2})
  train_and_evaluate(config, str(tmp_path / "run"))
  said = capsys.readouterr()
  assert "data.holdout=0.2: 4 of 20 images are for evaluation alone" in said.err
  assert "Accuracy on 4 held-out images (16 train images" in said.out


@pytest.mark.proof
def test_13_bands_train_and_give_accuracy(tmp_path):
  """Uint16 arrays of many channels, with measured mean and std."""
  tifffile = pytest.importorskip("tifffile")
  rng = np.random.default_rng(0)
  for label, band in enumerate("ab"):
    for number in range(12):
      image = rng.integers(0, 600, (20, 20, 13)).astype(np.uint16)
      image[..., label] += 3000
      file = io.BytesIO()
      tifffile.imwrite(
        file, image, photometric="minisblack", planarconfig="contig"
      )
      path = tmp_path / "images" / band / f"{number}.tif"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(file.getvalue())
  settings = {
    "data.channels": 13, "data.value_range": "0,4095", "data.holdout": 0.25,
    "data.mean": (0.1,), "data.std": (0.1,), "eval.baselines": True,
  }  # fmt: skip
  config = config_of(tmp_path / "images", **settings)
  (_, flags, *_) = data_page.data_stats(config)
  assert flags.count("0.07") >= 11  # 300 / 4095.
  workdir = str(tmp_path / "run")
  train_and_evaluate(config, workdir)
  raw = [r for r in _results(workdir) if r["encoder"] == "raw pixels"]
  assert [r["final"] for r in raw if "knn" in r["protocol"]] == [1.0]
  output = str(tmp_path / "f.npz")
  image_embeddings.write_embeddings(output, workdir, str(tmp_path / "images"))
  with np.load(output) as arrays:
    assert len(arrays["paths"]) == 24


def _results(workdir):
  return results.read_results(pathlib.Path(workdir) / results.FILE_NAME)
