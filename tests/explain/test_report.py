"""The whole report, with and without a discrete code."""

import dataclasses

import jax
import numpy as np
import pytest

from imsvd_jax import explain
from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.explain import health, images, probes, report
from imsvd_jax.explain.analysis import Code, Features, Pairs
from imsvd_jax.explain.factors import Factor
from tests.explain import chromium, shapes_subject

N = 48


def constant(subject):
  """The same encoder, untrained: every image falls into the same bins."""
  variables = subject.variables | {
    "direction": subject.variables["direction"] * 0
  }
  return dataclasses.replace(subject, variables=variables)


def test_report_of_a_discrete_code(tmp_path, monkeypatch):
  monkeypatch.setattr(probes, "PROBES", {"mirror": probes.flip})
  lines = []
  subject = shapes_subject.make_subject(3, 4)
  data_set = shapes_subject.images_of(
    N, 24, count=N, label_names=shapes_subject.SHAPES
  )
  found = explain.explain(
    subject,
    data_set,
    tmp_path / "out",
    explain.ExplainOptions(
      num_top=3,
      thumbnail_size=16,
      grad_cam_per_bin=1,
      integrated_per_bin=0,
      max_flip_images=30,
      figure_format="svg",
      variables=(2, 0),
    ),
    untrained=constant(subject),
    records=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
    report=lines.append,
  )
  assert all(report._FIGURE.fullmatch(path.name) for path in found.figures)
  assert " ".join(sorted(path.stem for path in found.figures)) == (
    "attribution cross_joint embedding_map embedding_vectors factors joint "
    "mutual_information samples_variable_0 samples_variable_2 training_curves"
  )
  assert all(path.read_text().startswith("<?xml") for path in found.figures)
  assert found.index.is_file()
  again = explain.Analysis.load(tmp_path / "out" / "analysis.npz")
  np.testing.assert_array_equal(again.pairs.joint, found.analysis.pairs.joint)
  assert again.edits.factors == ("mirror",)
  assert again.captions == found.analysis.captions is not None
  chosen = images.some_of(np.arange(N), 30)
  expected = probes.measure(
    subject,
    images.only(data_set.batches(), chosen),
    mesh=devices.make_mesh(jax.devices()),
  )
  np.testing.assert_array_equal(again.edits.flips, expected.flips)
  assert chosen.max() > 30
  assert any(f"{N} images in 0:" in line for line in lines)
  assert (again.scores.nmi_untrained == 0).all()
  (row,) = health.best_factors(again)
  assert row["nmi"][0] == again.scores.nmi.max() > row["untrained"] == 0
  table = report.factor_lines(again)
  assert table[1].startswith(f"  label  v{row['variables'][0]} ")
  assert "(random weights 0.00, chance" in table[1]
  assert set(table) <= set(lines)
  levels = {i.name: i.level for i in health.indicators(again)}
  assert set(levels.values()) <= {"good", "fair", "poor", "no verdict"}
  assert "Agreement of views" in levels


def test_a_former_report_is_removed_and_nothing_else(tmp_path):
  ours = ["figures/samples_variable_7.pdf", "explorer/data/variable_9.js"]
  ours += ["explorer/sprites/5.png"]
  others = ["figures/mine.pdf", "notes.txt", "explorer/index.html"]
  for name in (*ours, *others):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
  report._remove_former(tmp_path)
  assert all((tmp_path / name).exists() for name in ours), "not a report yet"
  (tmp_path / report.ANALYSIS).write_text("x")
  report._remove_former(tmp_path)
  assert not any((tmp_path / name).exists() for name in ours)
  assert not (tmp_path / report.ANALYSIS).exists()
  assert all((tmp_path / name).exists() for name in others)


def test_images_are_chosen_from_all_classes():
  """In a folder sorted by class, the first images are of one class."""
  labels = np.repeat(np.arange(10), 100)
  chosen = images.some_of(np.arange(1000), 200)
  assert len(np.unique(chosen)) == 200
  counts = np.bincount(labels[chosen])
  assert counts.min() >= 8
  assert counts.max() <= 32
  every = np.arange(960)
  given = [
    {"image": part[:, None, None, None], "index": part}
    for part in np.split(every, 15)
  ]
  found = list(images.only(given, chosen))
  assert {len(batch["image"]) for batch in found[:-1]} == {64}
  wanted = chosen[chosen < 960]
  for name in ("image", "index"):
    values = np.concatenate([batch[name].ravel() for batch in found])
    np.testing.assert_array_equal(values, wanted)
  assert len(np.unique(labels[images.some_of(np.arange(1000), 6)])) >= 4


@pytest.fixture(scope="module")
def continuous(tmp_path_factory):
  lines = []
  found = explain.explain(
    shapes_subject.make_continuous_subject(),
    shapes_subject.images_of(N, 24, label_names=shapes_subject.SHAPES),
    tmp_path_factory.mktemp("continuous"),
    explain.ExplainOptions(thumbnail_size=32, figure_format="png"),
    report=lines.append,
  )
  return found, lines


def test_report_without_a_code_says_so(continuous):
  found, lines = continuous
  assert [path.stem for path in found.figures] == ["embedding_map"]
  assert any("VICReg" in line and "no bins" in line for line in lines)
  assert found.analysis.code is None
  data = {path.stem for path in (found.index.parent / "data").iterdir()}
  assert data == {"core", "duplicates", "images", "map", "neighbors"}


def test_explorer_without_a_code(continuous):
  found, _ = continuous
  with chromium.Browser(dark=True) as browser:
    browser.open(found.index)
    assert "VICReg" in browser.text(".note")
    tabs = browser.text("#tabs").split()
    assert tabs == ["Overview", "Images", "Map", "Duplicates"]
    for page in ("image/3", "images", "map", "duplicates"):
      browser.go(f"#/{page}")
    browser.go("#/variables")
    assert browser.text("h1") == "Not found"
    assert browser.log() == []


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"variables": (1, 3)}, r"no variable 3; .* numbered 0\.\.2"),
    ({"figure_format": "gif"}, "'gif'"),
  ],
)
def test_user_mistake_is_found_before_the_work(tmp_path, wrong, message):
  with pytest.raises(UserError, match=message):
    explain.explain(
      shapes_subject.make_subject(3, 4),
      shapes_subject.images_of(N, 24),
      tmp_path,
      explain.ExplainOptions(**wrong),
    )


def shared_information(shared, values):
  """The verdict on two variables of four bins that share a part of all."""
  marginal = np.full((2, 4), 0.25)
  code = Code(
    codes=np.zeros((100, 2), np.uint8),
    marginal=marginal,
    usage=np.full((2, 4), 25),
    conditional_entropy=np.zeros(2),
    confidence=np.ones(2),
    top_scores=np.zeros((2, 4, 1)),
    top_indices=np.zeros((2, 4, 1), int),
  )
  information = np.full((2, 2), shared * np.log(4))
  pairs = Pairs(np.zeros((8, 8)), information, np.zeros((2, 2)))
  factors = () if values is None else (Factor("label", values, ("x",) * 50),)
  features = Features(np.zeros(1), np.arange(1), np.zeros((1, 1)))
  found = explain.Analysis(
    np.arange(100), features, code, pairs, factors=factors
  )
  every = {i.name: i for i in health.indicators(found)}
  return every["Shared information"]


def test_shared_information_knows_what_the_images_tell():
  three, six, many = (np.arange(300) % k for k in (3, 6, 50))
  assert shared_information(0.02, None).level == "good"
  assert shared_information(0.45, None).level == "fair"  # A good quick start.
  assert shared_information(0.6, None).level == "poor"
  assert shared_information(0.6, many).level == "poor"
  # The variables have log 4 nats each.
  found = shared_information(0.75, three)  # log 3 / log 4: 79%.
  assert found.level == "fair"
  assert found.meaning.endswith(
    "told the label, 1.10 nats, as well as they can would share 79%."
  )
  assert shared_information(0.8, three).level == "poor"
  assert shared_information(0.65, six).level == "fair"  # 2 - log 6 / log 4.
  assert shared_information(0.75, six).level == "poor"


@pytest.mark.parametrize(
  ("usage", "confidence", "level"),
  [
    ([[25, 25, 25, 25]], 0.95, "good"),
    ([[97, 1, 1, 1]], 0.95, "poor"),
    ([[25, 25, 25, 25]], 0.3, "no verdict"),  # As random weights.
    ([[97, 1, 1, 1]], 0.3, "poor"),
  ],
)
def test_health_of_good_and_collapsed_variables(usage, confidence, level):
  usage = np.array(usage)
  code = Code(
    codes=np.zeros((100, 1), np.uint8),
    marginal=usage / 100,
    usage=usage,
    conditional_entropy=np.array([0.1]),
    confidence=np.array([confidence]),
    top_scores=np.zeros((1, 4, 1)),
    top_indices=np.zeros((1, 4, 1), int),
  )
  features = Features(np.zeros(1), np.arange(1), np.zeros((1, 1)))
  found = explain.Analysis(np.arange(100), features, code)
  levels = {i.name: i.level for i in health.indicators(found)}
  assert levels["Entropy used"] == level
  assert levels["Collapsed variables"] == level
  assert levels["Confidence"] == ("good" if confidence > 0.5 else "poor")
  assert levels["Empty bins"] == ("good" if confidence > 0.5 else "no verdict")
