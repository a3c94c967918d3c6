"""The command that explains a run, on a run of three steps."""

import dataclasses
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs import shapes
from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import augmented_views, collapse, protocols
from imsvd_jax.explain import probes, run_subject
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.explain.explain_options import RunOptions
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.training import experiment
from imsvd_jax.training import step as step_lib


def make_run(workdir, objective="imsvd", **overrides):
  config = shapes.get_config("debug")
  config.data.name = "shapes"
  config.data.num_examples = 48
  config.data.image_size = config.data.resize = config.data.crop = 32
  config.objective.name = objective
  config.update_from_flattened_dict(overrides)
  config.model.projector = (32, 16)  # Two variables of eight bins.
  state = jax.jit(lambda: step_lib.init_state(experiment.build(config, 48)))()
  checkpointer = Checkpointer(workdir, keep_last=1, config=config.to_dict())
  checkpointer.save(3, state)
  checkpointer.close()
  return str(workdir)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def encoder(run):
  return load_encoder(run)


@pytest.fixture(scope="module")
def source(encoder):
  return data.make_source(encoder.config.data, "train")


@pytest.fixture(scope="module")
def report(run):
  options = RunOptions(
    figure_format="png", num_top=1, integrated_per_bin=0, max_images=30
  )
  with pytest.MonkeyPatch.context() as patch:
    # One augmentation of eleven, because each compiles the network again.
    patch.setattr(probes, "PROBES", {"mirror": probes.flip})
    return run_subject.explain_run(run, options)


def test_the_numbers_are_those_of_the_encoder(encoder, source, report):
  q = encoder.probabilities(source.images)
  found = Analysis.load(report.index.parents[1] / "analysis.npz")
  assert found.num_images == 48
  assert found.edits.factors[0] == "mirror"
  assert found.edits.flips.shape == (len(found.edits.factors), 2)
  np.testing.assert_allclose(
    found.code.marginal, q.mean(0), rtol=1e-4, atol=1e-6
  )
  joint = np.einsum("imd,ine->mdne", q, q) / len(q)
  np.testing.assert_allclose(
    found.pairs.joint.reshape(joint.shape), joint, rtol=1e-3, atol=1e-6
  )


def test_random_weights_are_those_of_the_seed(encoder, report):
  other = run_subject.untrained_subject(
    run_subject.subject_of(encoder, "run"), encoder
  )
  # The run was saved at its first step, so trained is untrained.
  jax.tree.map(
    np.testing.assert_array_equal, other.variables, encoder.variables
  )
  np.testing.assert_array_equal(
    report.analysis.scores.nmi_untrained, report.analysis.scores.nmi
  )


def test_of_many_images_some_are_shown(report):
  text = (report.index.parent / "data" / "images.js").read_text()
  names = json.loads(re.search(r'"names": (\[.*?\])', text)[1])
  assert len(names) == 30
  shown = [int(name.removeprefix("record ")) for name in names]
  # The best of every bin are among them, and they are not just the first.
  assert set(report.analysis.code.top_indices.ravel()) <= set(shown)
  assert max(shown) > 30


def test_the_factors_of_the_shapes_are_named(report):
  text = "".join(
    path.read_text() for path in (report.index.parent / "data").glob("*.js")
  )
  for name in (
    "shape",
    '"texture"',
    "foreground red",
    '"stripes"',
    "ring/dots",
  ):
    assert name in text
  assert report.index.exists()
  assert all(path.stat().st_size > 1000 for path in report.figures)


def test_a_subject_has_the_codes_and_the_attention_of_patches(tmp_path):
  vit = {"model.backbone": "vit_micro", "model.patch_size": 8}
  encoder = load_encoder(make_run(tmp_path / "vit", **vit))
  subject = run_subject.subject_of(encoder, "vit")
  images = data.make_source(encoder.config.data, "train").images[:8]
  _, expected = encoder.feature_maps_and_codes(images)
  found = jax.jit(subject.patch_codes)(subject.variables, images)
  assert found.shape == (8, 4, 4, 2)
  np.testing.assert_array_equal(found, expected)
  weights = jax.jit(subject.attention)(subject.variables, images)
  assert weights.shape == (8, 4, 4)
  assert (weights.sum((1, 2)) < 1).all()  # The rest is the class token's.


def test_patches_are_compared_with_the_masks_of_the_shapes(report):
  found = Analysis.load(report.index.parents[1] / "analysis.npz").patches
  assert found.patch_iou.shape == (2, 2, 8)
  assert found.patch_iou.max() <= found.patch_limits[:, 1].max() < 1
  assert found.patch_limits.min() > 0.1
  # The run was saved at its first step, so trained is untrained.
  np.testing.assert_array_equal(found.patch_iou_untrained, found.patch_iou)
  data = (report.index.parent / "data" / "variable_0.js").read_text()
  assert '"patches": {"perBin": 1, "height": 4, "width": 4' in data
  assert '"attention"' not in data


def test_several_labels_are_left_out(encoder, source):
  settings = encoder.config.data
  (one,) = run_subject.batches_of(source, settings, 48)
  np.testing.assert_array_equal(one["label"], source.labels)
  labels = np.eye(source.num_classes, dtype=np.int32)[source.labels]
  several = dataclasses.replace(source, multi_label=True, labels=labels)
  (batch,) = run_subject.batches_of(several, settings, 48)
  assert "label" not in batch
  np.testing.assert_array_equal(batch["image"], one["image"])


def test_agreement_is_that_of_the_collapse_evaluator(encoder, source, report):
  """The same crops and colors, seen through the same network."""
  embedder = augmented_views.ViewEmbedder(
    encoder.model, encoder.config, discrete=True, batch_size=16
  )
  protocol = protocols.PROTOCOLS["collapse/online"]
  assert protocol.seed == encoder.config.seed
  inputs = embedder.inputs(encoder.variables, source, protocol)
  statistics = collapse.code_statistics(inputs["codes"])
  found = report.analysis.views
  one_image = 1 / inputs["codes"][:, 0, :, 0].size
  assert found.agreement.mean() == pytest.approx(
    statistics.agreement, abs=1.01 * one_image
  )
  np.testing.assert_allclose(
    found.soft_agreement.mean(), statistics.soft_agreement, rtol=1e-4
  )
  q = inputs["codes"].astype(np.float64)
  joint = np.einsum("imd,ine->mdne", q[:, 0], q[:, 1]) / len(q)
  np.testing.assert_allclose(
    found.cross_joint.reshape(joint.shape), joint, rtol=1e-3, atol=1e-6
  )
  np.testing.assert_allclose(
    found.example_probabilities, q[found.example_indices], rtol=1e-3, atol=1e-5
  )


def test_an_unreadable_image_has_no_views(encoder, monkeypatch):
  """Another image takes its place in training, and is no second example."""
  given = [
    {
      "views": (np.zeros((4, 2, 1, 1, 1), np.uint8),),
      "index": np.array(indices),
      "epoch": np.array(epochs),
      "bad": np.array(indices) == 3,
    }
    for indices, epochs in (
      ([5, 3, 0, 1], [0, 0, 0, 0]),
      ([4, 2, 3, 1], [0, 0, 1, 1]),
      ([0, 2, 5, 4], [1, 1, 1, 1]),
    )
  ]
  monkeypatch.setattr(
    augmented_views, "train_crops", lambda *args, **options: iter(given)
  )
  source = types.SimpleNamespace(num_examples=6)
  views = run_subject.two_views(source, encoder.config, 4)
  seen = [batch["index"][batch["mask"]].tolist() for batch in views.crops()]
  assert seen == [[5, 0, 1], [4, 2]]


def test_a_run_without_a_code_gets_a_sentence(tmp_path, capsys):
  workdir = make_run(tmp_path, objective="vicreg")
  found = run_subject.explain_run(workdir, RunOptions(figure_format="png"))
  assert found.analysis.code is None
  assert "vicreg" in capsys.readouterr().err


def test_edits_look_at_all_classes(encoder, source):
  """The data lie sorted by class, as in a folder."""
  order = np.argsort(source.labels, kind="stable")
  source = dataclasses.replace(
    source, images=source.images[order], labels=source.labels[order]
  )
  config = encoder.config
  images = run_subject.images_of(source, config.data, config, 16)
  (batch,) = images.some(12)
  labels = batch["label"][batch["mask"]]
  assert len(labels) == 12
  assert labels.max() > source.labels[23]  # Beyond the first half.


def test_some_images_keep_their_indices(encoder, source):
  config = encoder.config
  images = run_subject.images_of(source, config.data, config, 16)
  (batch,) = images.some(12)
  mask = batch["mask"]
  np.testing.assert_array_equal(
    batch["image"][mask], source.images[batch["index"][mask]]
  )


def test_changed_factors_and_names_are_written(report):
  folder = report.index.parents[1]
  rows = (folder / "interventions.csv").read_text().splitlines()
  names = {row.partition(",")[0] for row in rows[1:]}
  assert {"shape", "texture", "foreground", "background", "size"} <= names
  rows = (folder / "edits.csv").read_text().splitlines()
  assert rows[1].startswith("mirror,0,")
  assert (folder / "captions.csv").read_text().startswith("variable,bin,text")
  # The drawings are the images themselves before a factor changes.
  found = report.analysis.interventions
  assert found.flips.shape == (8, 2)
  assert found.images.max() <= 48


def test_reports_do_not_share_a_folder():
  name_of = lambda **options: run_subject.folder_name(3, RunOptions(**options))
  made = [
    name_of(target=target, split=split, data=name)
    for target in (False, True)
    for split in ("train", "eval")
    for name in ("", "digits", "folder=a/b", "folder=a-b", "folder=~/x")
  ]
  assert len(set(made)) == len(made)
  assert made[0] == "explain-3"
  assert made[1] == "explain-3-digits"
  assert all(re.fullmatch(r"[-.\w]+", name, re.ASCII) for name in made)


def test_the_output_is_where_the_user_says(run, monkeypatch, tmp_path):
  asked = {}

  def explain(subject, images, output, options, **others):
    asked.update(others, output=output)

  monkeypatch.setattr(run_subject.report_lib, "explain", explain)
  monkeypatch.setenv("HOME", str(tmp_path))
  run_subject.explain_run(run, RunOptions(output="~/x", untrained=False))
  assert asked["output"] == f"{tmp_path}/x"
  assert asked["untrained"] is None
  run_subject.explain_run(run, RunOptions(split="eval"))
  assert asked["output"] == pathlib.Path(run) / "explain-3-eval"
  assert asked["untrained"] is not None


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"step": 7}, "7"),
    ({"data": "nonsense"}, r"'nonsense'.*shapes"),
    ({"target": True}, "no EMA target"),
    ({"variables": (1, 2)}, r"no variable 2; .* numbered 0\.\.1"),
    ({"workdir": __file__}, "is a file.*import_weights --file="),
    ({"output": "gs://bucket/x"}, "gs://bucket/x is not .*local directory"),
    ({"workdir": "gs://bucket/x"}, "gs://bucket/x is not .*local directory"),
  ],
)
def test_a_mistake_is_one_clear_line(run, arguments, message):
  workdir = arguments.pop("workdir", run)
  with pytest.raises(UserError, match=message) as error:
    run_subject.explain_run(workdir, RunOptions(**arguments))
  assert "\n" not in str(error.value)


def test_the_data_that_a_foreign_run_names_need_a_word(tmp_path, monkeypatch):
  for number in range(2):
    path = tmp_path / "images" / "deep" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path)
  run = make_run(
    tmp_path / "run",
    **{
      "data.name": "folder",
      "data.path": str(tmp_path / "images"),
      "data.num_examples": 0,
    },
  )
  with pytest.raises(UserError, match="may be someone else's"):
    run_subject.explain_run(run)
  shown = {}
  explain = lambda subject, images, *_, **__: shown.update(images=images)
  monkeypatch.setattr(run_subject.report_lib, "explain", explain)
  run_subject.explain_run(run, RunOptions(trust_workdir=True, untrained=False))
  assert shown["images"].names(1) == "deep/1.png"
  # From RUN/explain-N/explorer.
  assert shown["images"].links(1) == "../../../images/deep/1.png"
  options = RunOptions(trust_workdir=True, untrained=False, absolute_paths=True)
  run_subject.explain_run(run, options)
  assert shown["images"].names(1) == f"{tmp_path}/images/deep/1.png"
  uri = shown["images"].links(1)
  assert uri == (tmp_path / "images" / "deep" / "1.png").as_uri()


def test_a_link_is_escaped_and_tells_no_place_by_default(tmp_path):
  image = tmp_path / "a b" / "1#%3C.png"
  image.parent.mkdir()
  image.write_bytes(b"x")
  page = tmp_path / "out" / "explorer"
  link = lambda path, absolute=False: run_subject._link(
    str(path), str(page), absolute
  )
  assert link(image) == "../../a%20b/1%23%253C.png"
  assert link(image, absolute=True) == image.as_uri()
  assert link(tmp_path / "missing.png") == ""
  assert link(f"3 of images in {image}") == ""  # Of arrays.
  elsewhere = next(p for p in pathlib.Path("/etc").iterdir() if p.is_file())
  assert link(elsewhere) == ""  # Its link would be its whole path.
  assert link(elsewhere, absolute=True) == elsewhere.as_uri()
