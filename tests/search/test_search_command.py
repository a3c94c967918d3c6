"""An index from build to answers, on images with hostile names."""

import os

import jax
import numpy as np
import pytest
from PIL import Image

from configs import digits
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.search import answer_files, build, nearest, questions
from imsvd_jax.search.build_options import BuildOptions
from imsvd_jax.search.store import Layout, Rows, Store, open_to_append
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.run_command import check_refused, one_line_error, run_imsvd

faiss = pytest.importorskip("faiss")

NAMES = [
  b"a.png",
  b"b/<script>alert(1)</script>.png",
  b"new\nline.png",
  b"not utf-8 \xff.png",
  'é, "quoted".png'.encode(),
  b"z.png",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run that never trained."""
  config = digits.get_config("debug")
  config.data.resize = 32
  state = jax.jit(
    lambda: step_lib.init_state(experiment_lib.build(config, 16))
  )()
  folder = str(tmp_path_factory.mktemp("run"))
  checkpointer = Checkpointer(folder, keep_last=1, config=config.to_dict())
  checkpointer.save(3, state)
  checkpointer.close()
  return folder


def save(folder, name, pixels):
  path = os.path.join(os.fsencode(folder), name)
  os.makedirs(os.path.dirname(path), exist_ok=True)
  with open(path, "wb") as file:
    Image.fromarray(pixels).save(file, "PNG")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  """Six images, the last one a copy of the first, and one that is damaged."""
  folder = tmp_path_factory.mktemp("photos")
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
  pixels[5] = pixels[0]
  for name, image in zip(NAMES, pixels, strict=True):
    save(folder, name, image)
  (folder / "bad.png").write_bytes(b"no image")
  return folder


@pytest.fixture(scope="module")
def index(workdir, photos, tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("index") / "photos.index")
  options = BuildOptions(workdir=workdir, data=str(photos))
  notes = build.build(folder, options)
  assert "added 6 images, skipped 0" in notes[0]
  assert "1 unreadable image: bad.png" in notes[1]
  return folder


def test_rows_are_those_of_the_encoder(index, workdir, photos):
  found, encoder = Store(index), load_encoder(workdir)
  assert found.name(0) == "a.png"
  assert {found.name(i) for i in range(6)} >= {"new\\nline.png", "z.png"}
  image = np.asarray(Image.open(photos / "a.png"))[None]
  features = build.normalized(encoder.features(image))
  np.testing.assert_allclose(found.vectors[0], features[0], atol=1e-3)
  np.testing.assert_array_equal(found.codes[0], encoder.codes(image)[0])


def test_the_same_build_adds_nothing_and_a_change_replaces(
  workdir, tmp_path, monkeypatch
):
  rng = np.random.default_rng(1)
  photos, index = tmp_path / "photos", str(tmp_path / "index")
  for n in range(5):
    image = rng.integers(0, 256, (32, 32, 3), np.uint8)
    save(photos, b"%d.png" % n, image)
  options = BuildOptions(workdir=workdir, data=str(photos))
  monkeypatch.setattr(build, "CHUNK_IMAGES", 2)
  real, calls = build._to_append, []

  def stopped(*arguments):
    calls.append(0)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return real(*arguments)

  monkeypatch.setattr(build, "_to_append", stopped)
  with pytest.raises(KeyboardInterrupt):
    build.build(index, options)
  assert "added 3 images, skipped 2" in build.build(index, options)[0]
  assert "added 0 images, skipped 5" in build.build(index, options)[0]
  save(photos, b"3.png", np.zeros((32, 32, 3), np.uint8))
  assert "added 1 image, skipped 4" in build.build(index, options)[0]
  found = Store(index)
  assert found.rows.tolist() == [0, 1, 2, 4, 5]
  assert found.find("3.png") == 5


def test_query_by_name_row_and_file(index, workdir, photos, tmp_path):
  found = Store(index)
  by_name = questions.query(found, "z.png", 3)
  assert found.name(by_name.rows[0]) == "a.png"
  assert by_name.columns["cosine"][0] == pytest.approx(1, abs=1e-3)
  row = found.find("z.png")
  assert questions.query(found, str(row), 3) == by_name.__class__(
    f"Nearest to {row}", by_name.rows, by_name.columns
  )
  codes = found.codes
  alike = codes[row] == codes[by_name.rows[-1]]
  assert by_name.columns["agree"][-1] == f"{alike.sum()} of {alike.size}"
  count = (codes[found.rows] == codes[row]).sum(axis=0)
  order = sorted(np.flatnonzero(alike), key=lambda m: count[m])
  rarest = " ".join(f"v{m}={codes[row, m]}" for m in order[:5])
  assert by_name.columns["rarest"][-1] == rarest
  by_content = questions.query(found, str(photos / "z.png"), 3)
  assert by_content.rows[0] == row  # a.png is the first of this content.
  other = tmp_path / "other.png"  # The same pixels in other bytes.
  Image.open(photos / "z.png").save(other, compress_level=0)
  by_file = questions.query(found, str(other), 3, workdir)
  assert {by_file.rows[0], by_file.rows[1]} == {found.find("a.png"), row}
  with one_line_error("give --workdir"):
    questions.query(found, str(other), 3)
  with one_line_error("neither an image of the index nor a file"):
    questions.query(found, "none.png", 3)
  (tmp_path / "notes.md").write_text("no image")
  with one_line_error("notes.md is no file of an image"):
    questions.query(found, str(tmp_path / "notes.md"), 3, workdir)
  with one_line_error("no row 77"):
    questions.query(found, "77", 3)
  with one_line_error("cannot be read as an image"):
    questions.query(found, str(photos / "bad.png"), 3, workdir)


def test_exact_duplicates_and_slices(index):
  found = Store(index)
  exact = questions.duplicates(found, 2.0)
  assert [found.name(row) for row in exact.rows] == ["a.png", "z.png"]
  assert exact.columns["cosine"] == [1.0, 1.0]
  assert exact.columns["kind"] == ["first", "exact"]
  everything = questions.chosen(found, "v0=0 or not v0=0")
  assert everything.rows == list(range(6))
  rare = questions.outliers(found, 2, "marginals")
  assert len(rare.rows) == 2
  assert rare.columns["nats"][0] >= rare.columns["nats"][1]


def test_a_page_holds_no_markup_of_names(index, tmp_path):
  found = Store(index)
  answer = questions.chosen(found, "v0=0 or v0!=0")
  answer_files.write_page(str(tmp_path / "page.html"), found, answer)
  text = (tmp_path / "page.html").read_text()
  assert "<script" not in text
  assert "&lt;script&gt;" in text
  assert text.count("<img src=") == 6
  assert len(answer_files.as_csv(found, answer).splitlines()) == 7


def test_the_command_line(index, tmp_path):
  page, output = tmp_path / "page.html", tmp_path / "rows.csv"
  result = run_imsvd(*("search", "slice", "not v0=99", f"--index={index}"))
  check_refused(result, "v0 has no bin 99")
  result = run_imsvd(
    *("search", "query", "z.png", f"--index={index}", "--k=2"),
    *(f"--page={page}", f"--output={output}"),
  )
  assert result.returncode == 0, result.stderr
  assert output.read_text().startswith("path,row,cosine,agree,rarest\na.png,")
  assert page.exists()
  check_refused(run_imsvd("search", "query", "z.png"), "--index is missing")


def drawn_index(folder, vectors, contents=None):
  count = len(vectors)
  keys = np.frombuffer(
    b"".join(b"%16d" % n for n in range(count)), np.uint8
  ).reshape(count, 16)
  with open_to_append(folder, Layout(vectors.shape[1], 0, 0, "x")) as writer:
    writer.append(
      Rows(
        vectors=vectors,
        codes=np.zeros((count, 0)),
        contents=keys if contents is None else keys[contents],
        keys=keys,
        stamps=keys,
        names=[b"%d" % n for n in range(count)],
        thumbnails=[b""] * count,
      )
    )


def test_clusters_find_what_an_exact_search_finds(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  vectors = rng.standard_normal((3000, 4)) @ rng.standard_normal((4, 16))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  drawn_index(str(tmp_path), vectors[:2500])
  exact = nearest.Nearest(Store(str(tmp_path))).search(vectors[:50], 10)[1]
  monkeypatch.setattr(nearest, "EXACT_ROWS", 1000)
  nearest.write_clusters(Store(str(tmp_path)))
  store = Store(str(tmp_path))
  assert nearest.read_clusters(store) is not None
  found = nearest.Nearest(store, num_probes=30).search(vectors[:50], 10)[1]
  assert (
    np.mean([len(set(a) & set(b)) for a, b in zip(found, exact, strict=True)])
    > 9.5
  )
  monkeypatch.undo()
  drawn_index(str(tmp_path), vectors[2500:])
  assert nearest.read_clusters(Store(str(tmp_path))) is None  # Of fewer rows.
  np.savez(tmp_path / "clusters.npz", centers=np.array([{}], object))
  with one_line_error("clusters.npz"):
    nearest.read_clusters(store)
  with one_line_error("holds features without codes"):
    questions.outliers(store, 3, "pairs")


def test_an_exact_duplicate_is_exact_in_a_group_that_others_begin(tmp_path):
  vectors = np.stack([np.cos([0, 0.02, 0.02]), np.sin([0, 0.02, 0.02])], 1)
  drawn_index(str(tmp_path), vectors, contents=[0, 1, 1])
  answer = questions.duplicates(Store(str(tmp_path)), 0.99)
  assert answer.columns["group"] == [0, 0, 0]
  assert answer.columns["kind"] == ["first", "near", "exact"]


def test_near_duplicates_are_stars(tmp_path):
  """Each is near the first one: chains would join images that differ."""
  angles = np.radians([0, 5, 10, 15, 90, 92])
  vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
  drawn_index(str(tmp_path), vectors)
  answer = questions.duplicates(Store(str(tmp_path)), np.cos(np.radians(6)))
  assert answer.rows == [0, 1, 2, 3, 4, 5]
  assert answer.columns["group"] == [0, 0, 1, 1, 2, 2]
  assert answer.columns["kind"] == ["first", "near"] * 3
