import types

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import figures
from imsvd_jax.explain.images import as_shown

RECORDS = [
  {"step": 0, "loss": 3.0, "note": "start", "flag": True},
  {"step": 10, "loss": 2.0, "knn/top1": 0.5},
  {"step": 5, "loss": 9.0},
  {"step": 5, "loss": 2.5},
]


def test_curves_are_by_step_and_the_later_record_counts():
  found = figures.curves_of(RECORDS)
  assert set(found) == {"loss", "knn/top1"}
  np.testing.assert_array_equal(found["loss"], [[0, 3], [5, 2.5], [10, 2]])


def test_training_curves():
  figure = figures.training_curves(figures.curves_of(RECORDS))
  assert [axes.get_title() for axes in figure.axes] == ["Loss"]
  (line,) = figure.axes[0].lines
  np.testing.assert_array_equal(line.get_xydata()[:, 1], [3, 2.5, 2])


def test_training_curves_are_about_twelve_panels_in_groups():
  names = ["loss", "learning_rate", "gradient_norm", "off_diagonal", "mine"]
  names += ["diagonal", "invariance", "information", "argmax_agreement"]
  names += ["marginal_entropy_mean", "marginal_entropy_min", "embedding_std"]
  names += [f"online/collapse/codes/number_{i}" for i in range(20)]
  names += ["online/knn", "online/linear", "online/collapse/alignment"]
  records = [
    {"step": s, "off_diagonal_floor": -5.0, "dead_bins": 0.0, "skipped": 0.0}
    | {name: float(s) for name in names}
    for s in range(3)
  ]
  records.append({"step": 2, "final_knn": 0.9})
  figure = figures.training_curves(figures.curves_of(records))
  titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
  assert titles[:2] == ["Loss", "Term diagonal"]
  assert len(titles) == 12
  assert {"Accuracy", "Learning rate", "Term mine"} <= set(titles)
  assert "Dead bins" not in titles  # A constant.
  accuracy = figure.axes[titles.index("Accuracy")]
  assert [line.get_label() for line in accuracy.lines] == ["k-NN", "linear"]
  off_diagonal = figure.axes[titles.index("Term off_diagonal")]
  floor = off_diagonal.lines[-1]
  assert floor.get_label() == "floor"
  assert set(floor.get_ydata()) == {-5.0}


def test_constants_and_single_values_are_no_curves():
  records = [{"step": s, "loss": 1.0} for s in range(3)]
  records.append({"step": 2, "final_knn": 0.9})
  assert figures.panels_of(figures.curves_of(records)) == []


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


@pytest.mark.filterwarnings("error")
def test_names_in_any_script(tmp_path, capsys, monkeypatch):
  """A font that has the characters is chosen, or one line says what lacks."""
  points, values = np.eye(2), np.array([0, 1])
  names = ["\u732b and caf\u00e9", "\u03a9"]
  installed = types.SimpleNamespace(ttflist=[])
  monkeypatch.setattr(figures, "fontManager", installed)
  figures._fonts_for.cache_clear()
  for _ in range(2):
    figure = figures.embedding_map(points, values, names)
    figures.save(figure, tmp_path / "map.png")
  said = capsys.readouterr().err
  assert said.count("No font of this machine has '\u732b'") == 1
  figures._fonts_for.cache_clear()
  font = types.SimpleNamespace(name="Cats", style="normal", fname="cats.ttf")
  installed.ttflist.append(font)
  monkeypatch.setattr(
    figures,
    "_characters_of",
    lambda path: {
      ord(c)
      for c in (
        "\u732b"
        if path == "cats.ttf"
        else "abcdefghijklmnopqrstuvwxyz\u00e9\u03a9"
      )
    },
  )
  assert figures._fonts_for(frozenset("\u732bcaf\u00e9")) == ("Cats",)
  assert not capsys.readouterr().err
  figures._fonts_for.cache_clear()


@pytest.mark.parametrize(
  ("channels", "shown"), [(1, 1), (3, 3), (4, 3), (13, 1)]
)
def test_pixels_of_any_kind_can_be_shown(channels, shown):
  levels = np.linspace(0, 255, 5 * channels, dtype=np.float32)
  levels = levels.reshape(1, 5, channels)
  found = as_shown(levels)
  assert found.dtype == np.uint8
  assert found.shape == (1, 5, shown)
  expected = levels.mean(-1) if shown == 1 else levels[..., 0]
  np.testing.assert_array_equal(found[..., 0], np.rint(expected))
