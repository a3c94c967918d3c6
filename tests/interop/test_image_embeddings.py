"""Features of a folder: the run's own, in order, with what is broken named."""

import csv
import io
import os
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from imsvd_jax.base import files
from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import command_line
from imsvd_jax.interop import image_embeddings
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.runs.weights import load_variables
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.run_command import check_refused, one_line_error, run_imsvd


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run that never trained."""
  config = digits.get_config("debug")
  config.data.resize = 32  # Images of 32 pixels are taken as they are.
  experiment = experiment_lib.build(config, 16)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  folder = tmp_path_factory.mktemp("run")
  save(folder, config.to_dict(), state)
  return str(folder)


def save(workdir, config, state):
  checkpointer = Checkpointer(workdir, keep_last=1, config=config)
  checkpointer.save(3, state)
  checkpointer.close()


@pytest.fixture(scope="module")
def pixels():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (7, 32, 32, 3), np.uint8)


def arrays_of(workdir, data, **options):
  """Embeds images; returns everything as arrays."""
  found = image_embeddings.embed(workdir, data, **options)
  names = {"paths": found.names, "unreadable": found.unreadable}
  return {name: np.array(v) for name, v in names.items()} | found.columns


NAMES = ["a.png", "b/1.png", "b/2.bmp", "b/c/x.PNG", "val/é.png", "z.webp"]


@pytest.fixture
def folder(tmp_path, pixels):
  """Six images in sub-folders, one of them large, and other files."""
  top = tmp_path / "images"
  for name, image in zip(NAMES, pixels, strict=False):
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    lossless = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(image).save(top / name, **lossless)
  (top / "notes.txt").write_text("not an image")
  (top / ".hidden.png").write_bytes(b"")
  (top / "b" / "loop").symlink_to(top, target_is_directory=True)
  return top


def test_features_and_codes_are_those_of_the_encoder(workdir, folder, pixels):
  arrays = arrays_of(workdir, f"folder={folder}", codes=True, batch_size=4)
  assert arrays["paths"].tolist() == NAMES
  assert arrays["unreadable"].tolist() == []
  encoder = load_encoder(workdir)
  expected = encoder.features(pixels[:6])
  assert arrays["features"].dtype == np.float32
  np.testing.assert_allclose(arrays["features"], expected, rtol=1e-4, atol=1e-5)
  assert arrays["codes"].dtype == np.int32
  np.testing.assert_array_equal(arrays["codes"], encoder.codes(pixels[:6]))
  assert (
    image_embeddings.find_images(str(folder), [".png", ".bmp", ".webp"])[1] == 1
  )


def test_broken_images_are_left_out_and_named(workdir, folder, pixels, caplog):
  (folder / "b" / "1.png").write_text("no image")
  content = (folder / "z.webp").read_bytes()
  (folder / "aa.png").write_bytes(content[:30])
  arrays = arrays_of(workdir, str(folder), batch_size=4)
  left = [name for name in NAMES if name != "b/1.png"]
  assert arrays["paths"].tolist() == left
  assert arrays["unreadable"].tolist() == ["aa.png", "b/1.png"]
  assert "codes" not in arrays
  rows = [NAMES.index(name) for name in left]
  np.testing.assert_allclose(
    arrays["features"],
    load_encoder(workdir).features(pixels[rows]),
    rtol=1e-4,
    atol=1e-5,
  )
  for name in ("b/1.png", "aa.png"):
    assert f"{folder}/{name}" in caplog.text


def test_mistakes_are_one_line(workdir, folder, tmp_path):
  def refuse(message, images=folder, **options):
    with one_line_error(message):
      arrays_of(workdir, str(images), **options)

  refuse("does not exist", tmp_path / "none")
  refuse("is a file", __file__)
  refuse("No image has a path like", folder / "nothing*.png")
  (tmp_path / "list.txt").write_text("images/a.png\nimages/none.png\n")
  refuse(
    r"1 of 2 lines are no files \(images/none\.png\)", tmp_path / "list.txt"
  )
  (tmp_path / "empty").mkdir()
  (tmp_path / "empty" / "x.txt").write_text("x")
  refuse(r"No images .*1 other files.*\.jpg", tmp_path / "empty")
  refuse("no step 9", step=9)
  (tmp_path / "bad").mkdir()
  (tmp_path / "bad" / "x.png").write_text("x")
  refuse("None of the 1 images", tmp_path / "bad")


def test_inputs_other_than_a_folder(workdir, folder, tmp_path):
  """One image, a pattern, a list in its own order; a split of the run."""
  embed = lambda data, **options: arrays_of(
    workdir, str(data), batch_size=4, **options
  )
  everything = embed(folder)
  row = dict(zip(NAMES, everything["features"], strict=True))

  def check(found, names, paths):
    assert found["paths"].tolist() == paths
    expected = np.stack([row[name] for name in names])
    np.testing.assert_allclose(
      found["features"], expected, rtol=1e-4, atol=1e-5
    )

  check(embed(folder / "b" / "1.png"), ["b/1.png"], ["1.png"])
  check(embed(folder / "b" / "*"), NAMES[1:3], ["1.png", "2.bmp"])
  (tmp_path / "list.txt").write_text("images/z.webp\nimages/a.png\n")
  check(
    embed(tmp_path / "list.txt"),
    ["z.webp", "a.png"],
    ["images/z.webp", "images/a.png"],
  )
  found = embed("", split="eval", trust_workdir=True)
  assert found["labels"].shape == (len(found["features"]),)
  assert found["paths"][0] == "record 0"


def test_every_format_has_the_same_numbers(workdir, folder, tmp_path):
  arrays = arrays_of(workdir, str(folder), codes=True)
  write = lambda name: image_embeddings.write_embeddings(
    str(tmp_path / name), workdir, str(folder), codes=True
  )
  for name in ("f.npy", "f.csv"):
    write(name)
  np.testing.assert_array_equal(np.load(tmp_path / "f.npy"), arrays["features"])
  codes = np.load(tmp_path / "f.codes.npy")
  np.testing.assert_array_equal(codes, arrays["codes"])
  assert (tmp_path / "f.txt").read_text().splitlines() == NAMES
  with open(tmp_path / "f.csv", encoding="utf-8", newline="") as file:
    head, *rows = csv.reader(file)
  width = arrays["features"].shape[1]
  assert head[:2] == ["path", "feature_0"]
  assert head[1 + width] == "code_0"
  assert [r[0] for r in rows] == NAMES
  numbers = np.array([r[1 : 1 + width] for r in rows]).astype(np.float32)
  np.testing.assert_array_equal(numbers, arrays["features"])
  parquet = pytest.importorskip("pyarrow.parquet")
  write("f.parquet")
  table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
  assert table["path"] == NAMES
  np.testing.assert_array_equal(
    np.float32(table["features"]), arrays["features"]
  )
  with one_line_error(r"ends in '\.xyz'; expected one of \.npz, \.npy, \.csv"):
    write("f.xyz")


def test_a_stopped_command_goes_on(workdir, folder, tmp_path, monkeypatch):
  """Every chunk is computed once; other weights or data begin again."""
  monkeypatch.setattr(image_embeddings, "CHUNK_IMAGES", 2)
  whole = arrays_of(workdir, str(folder))
  batches, chunks = image_embeddings._batches, []

  def stopping(encoder, source, *arguments):
    chunks.append(source.relative_name(0))
    if len(chunks) == 2:
      raise KeyboardInterrupt
    yield from batches(encoder, source, *arguments)

  monkeypatch.setattr(image_embeddings, "_batches", stopping)
  write = lambda: image_embeddings.write_embeddings(
    str(tmp_path / "f.npz"), workdir, str(folder)
  )
  with pytest.raises(KeyboardInterrupt):
    write()
  write()
  assert chunks == [NAMES[0], NAMES[2], NAMES[2], NAMES[4]]
  with np.load(tmp_path / "f.npz") as arrays:
    assert arrays["paths"].tolist() == NAMES
    np.testing.assert_array_equal(arrays["features"], whole["features"])
  assert not (tmp_path / "f.npz.parts").exists()


def test_features_and_codes_per_patch(workdir, folder, pixels, tmp_path):
  """Every format has the encoder's, in chunks as in one piece."""
  encoder = load_encoder(workdir)
  maps, bins = encoder.feature_maps_and_codes(pixels[:6])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(image_embeddings, "DENSE_CHUNK_IMAGES", 4)
    for name in ("d.npz", "d.npy", "d.parquet"):
      notes = image_embeddings.write_embeddings(
        str(tmp_path / name), workdir, str(folder), dense=True
      )
  _, height, width, size = maps.shape
  assert (
    f"6 images, {size} features each for each of {height}x{width}" in (notes[0])
  )
  with np.load(tmp_path / "d.npz") as found:
    assert found["paths"].tolist() == NAMES
    assert found["features"].dtype == np.float16
    np.testing.assert_allclose(found["features"], maps, rtol=2e-3, atol=1e-3)
    assert found["codes"].dtype == np.uint8
    np.testing.assert_array_equal(found["codes"], bins)
    np.testing.assert_array_equal(
      np.load(tmp_path / "d.npy"), found["features"]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "d.codes.npy"), bins)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "d.parquet").to_pydict()
    np.testing.assert_array_equal(table["features"], found["features"])
    np.testing.assert_array_equal(table["codes"], bins)
  # A ResNet pools by the mean.
  np.testing.assert_allclose(
    maps.mean((1, 2)), encoder.features(pixels[:6]), rtol=1e-4, atol=1e-5
  )
  with one_line_error(r"d\.csv has no place for features per patch"):
    image_embeddings.write_embeddings(
      str(tmp_path / "d.csv"), workdir, str(folder), dense=True
    )


def test_a_feature_beyond_float16_is_refused():
  with one_line_error(r"is 1e\+05; expected at most 65504"):
    image_embeddings._half(np.full((1, 2, 2, 3), -1e5, np.float32))


def test_codes_need_a_discrete_objective(workdir, folder, tmp_path):
  run = load_variables(workdir)
  run.config["objective"]["name"] = "vicreg"
  state = {"params": run.params, "batch_stats": run.batch_stats}
  save(tmp_path / "run", run.config, state)
  with pytest.raises(UserError, match="no discrete code"):
    arrays_of(str(tmp_path / "run"), str(folder), codes=True)
  found = arrays_of(str(tmp_path / "run"), str(folder), dense=True)
  assert found["features"].ndim == 4
  assert "codes" not in found


def test_the_command_writes_the_file(workdir, folder, tmp_path):
  (folder / "bad.png").write_text("no image")
  output = tmp_path / "features"
  result = run_imsvd(
    *("embed", f"--workdir={workdir}", f"--data={folder}"), f"--output={output}"
  )
  assert result.returncode == 0, result.stderr
  with np.load(output, allow_pickle=False) as arrays:
    assert arrays["paths"].tolist() == NAMES
    assert arrays["features"].shape[0] == 6
  assert "6 images" in result.stdout
  assert "Left out 1 unreadable image: bad.png" in result.stdout
  assert "bad.png" in result.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ["features", "images"]


def test_the_command_checks_the_output_before_the_work(workdir, tmp_path):
  result = run_imsvd(
    *("embed", f"--workdir={workdir}", f"--data={tmp_path}"),
    f"--output={tmp_path}/none/x.npz",
  )
  said = f"error: The folder {tmp_path}/none does not exist; create it.\n"
  check_refused(result, said)


def test_names_that_are_not_utf8_are_printed(monkeypatch):
  stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
  monkeypatch.setattr(sys, "stdout", stream)
  command_line.print_any_name(stream)
  print(f"{os.fsdecode(bytes([0xFF]))}.png, é.png")
  stream.flush()
  assert stream.buffer.getvalue() == "\\udcff.png, é.png\n".encode()


def test_a_missing_input_is_not_blamed_on_the_output(tmp_path):
  with (
    pytest.raises(FileNotFoundError),
    files.in_place_when_done(tmp_path / "y"),
  ):
    (tmp_path / "another").read_bytes()
