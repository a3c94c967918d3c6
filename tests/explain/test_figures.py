import json

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import figures
from imsvd_jax.explain.analysis import Analysis


def write(path, records):
  path.write_text("\n".join(json.dumps(r) for r in records) + "\n")
  return path


@pytest.fixture
def metrics(tmp_path):
  return write(
    tmp_path / "metrics.jsonl",
    [
      {"step": 0, "loss": 3.0, "note": "start", "flag": True},
      {"step": 10, "loss": 2.0, "knn/top1": 0.5},
      {"step": 5, "loss": 9.0},
      {"step": 5, "loss": 2.5},
    ],
  )


def test_metrics_are_read_by_step(metrics):
  found = figures.read_metrics(metrics)
  assert set(found) == {"loss", "knn/top1"}
  np.testing.assert_array_equal(found["loss"], [[0, 3], [5, 2.5], [10, 2]])


def test_a_line_cut_short_by_a_crash(metrics):
  with metrics.open("a") as file:
    file.write('{"step": 20, "lo')
  assert len(figures.read_metrics(metrics)["loss"]) == 3
  with metrics.open("a") as file:
    file.write("\n" + json.dumps({"step": 30, "loss": 1}) + "\n")
  with pytest.raises(UserError, match="line 5"):
    figures.read_metrics(metrics)


def test_metrics_are_read_with_the_paths_own_methods(metrics):
  """A run in a bucket has a path that is not pathlib's."""

  class Remote:
    name = "metrics.jsonl"

    def is_file(self):
      return True

    def read_text(self, encoding):
      return metrics.read_text(encoding)

  found = figures.read_metrics(Remote())
  np.testing.assert_array_equal(
    found["loss"], figures.read_metrics(metrics)["loss"]
  )


def test_training_curves(metrics, tmp_path):
  figure = figures.training_curves({"a": metrics, "b": metrics}, ["loss"])
  lines = figure.axes[0].lines
  assert [line.get_label() for line in lines] == ["a", "b"]
  np.testing.assert_array_equal(lines[0].get_xydata()[:, 1], [3, 2.5, 2])
  with pytest.raises(UserError, match="Known: loss, knn/top1"):
    figures.training_curves(metrics, ["lss"])
  with pytest.raises(UserError, match="train first"):
    figures.training_curves(tmp_path / "none.jsonl")


def test_joint_matrix_shows_the_chosen_blocks():
  matrix = np.arange(36, dtype=np.float32).reshape(6, 6) / 36
  figure = figures.joint_matrix(matrix, 2, [2, 0])
  shown = figure.axes[0].images[0].get_array()
  rows = [4, 5, 0, 1]
  np.testing.assert_array_equal(
    shown.filled(0), matrix[np.ix_(rows, rows)].astype(np.float64)
  )
  figure.canvas.draw()
  labels = [t.get_text() for t in figure.axes[1].get_yticklabels()]
  assert "0.1" in labels
  assert not any("$" in label for label in labels)
  with pytest.raises(UserError, match=r"0\.\.2"):
    figures.joint_matrix(matrix, 2, [3])


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (3, 2, 8, 8, 3)).astype(np.uint8)


def test_embedding_vectors_mark_agreeing_variables(images):
  q = np.zeros((3, 2, 4, 5), np.float32)
  q[..., 0] = 1
  q[:, 1, 2] = [0, 0, 1, 0, 0]
  figure = figures.embedding_vectors(images, q, max_images=1)
  codes = [axes for axes in figure.axes if axes.get_ylabel()]
  assert len(codes) == 2
  np.testing.assert_array_equal(codes[1].images[0].get_array(), q[0, 1].T)
  np.testing.assert_array_equal(codes[1].get_xticks(), [0, 1, 3])


@pytest.mark.parametrize("suffix", figures.FORMATS)
def test_formats_and_reproducible_files(suffix, tmp_path, images):
  written = []
  for run in range(2):
    figure = figures.sample_grid(
      [list(images[:, 0]), [images[0, 1]]], ["bin $0", "bin <1>"]
    )
    path = tmp_path / str(run) / f"grid.{suffix}"
    figures.save(figure, path, dpi=60)
    written.append(path.read_bytes())
  assert written[0] == written[1]
  start = {"pdf": b"%PDF", "svg": b"<?xml", "png": b"\x89PNG"}[suffix]
  assert written[0].startswith(start)


def test_unknown_format(tmp_path, images):
  figure = figures.sample_grid([[images[0, 0]]], ["one"])
  with pytest.raises(UserError, match=r"\.pdf, \.svg, \.png"):
    figures.save(figure, tmp_path / "grid.bmp")
  with pytest.raises(UserError, match="one title per row"):
    figures.sample_grid([], [])


def test_other_figures_draw(tmp_path, images):
  rng = np.random.default_rng(0)
  maps = {"Grad-CAM": rng.random((3, 4, 4)), "gradients": rng.random((3, 8, 8))}
  rows = figures.attribution_rows(images[:, 0], maps, ["a", "b", "c"])
  assert len(rows.axes) == 9
  table = rng.random((6, 2))
  factors = figures.factor_table(
    {"before": table * 0.1, "after": table}, ["shape", "hue"]
  )
  assert factors.axes[1].images[0].get_clim() == pytest.approx((0, table.max()))
  points = figures.embedding_map(
    rng.normal(size=(30, 2)),
    rng.integers(-1, 3, 30),
    ["x", "y", "z"],
    explained=[0.5, 0.2],
  )
  assert "50%" in points.axes[0].get_xlabel()
  path = tmp_path / "map.png"
  figures.save(points, path, dpi=80)
  assert np.ptp(matplotlib_image.imread(path)) > 0.5


def test_information_matrix_needs_the_joint():
  empty = Analysis(np.arange(3), np.zeros(2), np.arange(3), np.zeros((3, 2)))
  with pytest.raises(UserError, match="joint=True"):
    figures.information_matrix(empty)
