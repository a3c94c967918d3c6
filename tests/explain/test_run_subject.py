"""The command that explains a run, on a run of three steps."""

import dataclasses
import json
import pathlib
import re
import string

import jax
import numpy as np
import pytest

from configs import shapes
from imsvd_jax import data
from imsvd_jax.base.errors import UserError
from imsvd_jax.commands import explain as command
from imsvd_jax.explain import run_subject
from imsvd_jax.explain.analysis import Analysis
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.training import experiment
from imsvd_jax.training import step as step_lib


def make_run(workdir, objective="imsvd"):
  config = shapes.get_config("debug")
  config.data.name = "shapes"
  config.data.num_examples = 48
  config.data.image_size = config.data.resize = config.data.crop = 32
  config.objective.name = objective
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
def report(run):
  return run_subject.explain_run(
    run, figure_format="png", num_top=1, integrated_per_bin=0, max_images=30
  )


def test_the_numbers_are_those_of_the_encoder(run, report):
  encoder = load_encoder(run)
  source = data.make_source(encoder.config.data, "train")
  q = encoder.probabilities(source.images)
  found = Analysis.load(report.index.parents[1] / "analysis.npz")
  assert found.num_images == 48
  np.testing.assert_allclose(found.marginal, q.mean(0), rtol=1e-4, atol=1e-6)
  joint = np.einsum("imd,ine->mdne", q, q) / len(q)
  np.testing.assert_allclose(
    found.joint.reshape(joint.shape), joint, rtol=1e-3, atol=1e-6
  )


def test_random_weights_are_those_of_the_seed(run, report):
  encoder = load_encoder(run)
  other = run_subject.untrained_subject(
    run_subject.subject_of(encoder, "run"), encoder
  )
  # The run was saved at its first step, so trained is untrained.
  jax.tree.map(
    np.testing.assert_array_equal, other.variables, encoder.variables
  )
  np.testing.assert_array_equal(
    report.analysis.nmi_untrained, report.analysis.nmi
  )


def test_of_many_images_some_are_shown(report):
  text = (report.index.parent / "data" / "images.js").read_text()
  names = json.loads(re.search(r'"names": (\[.*?\])', text)[1])
  assert len(names) == 30
  shown = [int(name.removeprefix("record ")) for name in names]
  # The best of every bin are among them, and they are not just the first.
  assert set(report.analysis.top_indices.ravel()) <= set(shown)
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


def test_several_labels_are_left_out(run):
  settings = load_encoder(run).config.data
  source = data.make_source(settings, "train")
  (one,) = run_subject.batches_of(source, settings, 48)
  np.testing.assert_array_equal(one["label"], source.labels)
  labels = np.eye(source.num_classes, dtype=np.int32)[source.labels]
  several = dataclasses.replace(source, multi_label=True, labels=labels)
  (batch,) = run_subject.batches_of(several, settings, 48)
  assert "label" not in batch
  np.testing.assert_array_equal(batch["image"], one["image"])


def test_a_view_follows_its_recipe(run):
  config = load_encoder(run).config
  images = np.full((6, 32, 32, 3), 200, np.uint8)
  keys = jax.random.split(jax.random.key(0), 6)
  plain = config.copy_and_resolve_references().views.view1
  for name in plain:
    if name.endswith("_prob"):
      plain[name] = 0.0
  # A crop of a constant image is that image, whatever the box.
  np.testing.assert_allclose(run_subject.view_of(plain)(keys, images), images)
  plain.invert_prob = 1.0
  np.testing.assert_allclose(
    run_subject.view_of(plain)(keys, images), 255.0 - images, atol=1e-3
  )
  ramp = np.broadcast_to(np.arange(0, 256, 8)[:, None, None], (6, 32, 32, 3))
  plain.invert_prob = 0.0
  cut = run_subject.view_of(plain)(keys, ramp.astype(np.uint8))
  assert np.std([row.min() for row in np.asarray(cut)]) > 1  # Boxes differ.


def test_a_run_without_a_code_gets_a_sentence(tmp_path, capsys):
  workdir = make_run(tmp_path, objective="vicreg")
  found = run_subject.explain_run(workdir, figure_format="png")
  assert not found.analysis.has_codes
  assert "vicreg" in capsys.readouterr().err


def test_flip_rates_look_at_all_classes(run):
  """The data lie sorted by class, as in a folder."""
  settings = load_encoder(run).config.data
  source = data.make_source(settings, "train")
  order = np.argsort(source.labels, kind="stable")
  source = dataclasses.replace(
    source, images=source.images[order], labels=source.labels[order]
  )
  (batch,) = run_subject.some_batches(source, settings, 16, 12)
  labels = batch["label"][batch["mask"]]
  assert len(labels) == 12
  assert labels.max() > source.labels[23]  # Beyond the first half.


def test_reports_do_not_share_a_folder():
  made = [
    run_subject.folder_name(3, use_target=target, split=split, data_set=name)
    for target in (False, True)
    for split in ("train", "eval")
    for name in ("", "digits", "folder=a/b", "folder=a-b", "folder=~/x")
  ]
  assert len(set(made)) == len(made)
  assert made[0] == "explain-3"
  assert made[1] == "explain-3-digits"
  assert all(
    set(name) <= set("-._" + string.ascii_letters + string.digits)
    for name in made
  )


def test_the_output_is_where_the_user_says(run, monkeypatch, tmp_path):
  asked = {}

  def explain(subject, batches, output, **options):
    asked.update(options, output=output)

  monkeypatch.setattr(run_subject.report, "explain", explain)
  monkeypatch.setenv("HOME", str(tmp_path))
  run_subject.explain_run(run, output="~/x", untrained=False)
  assert asked["output"] == f"{tmp_path}/x"
  assert asked["some_batches"] is not None
  run_subject.explain_run(run, split="eval", untrained=False)
  assert asked["output"] == pathlib.Path(run) / "explain-3-eval"


def test_variables_are_numbers():
  assert command._numbers(["3", " 7"]) == [3, 7]
  assert command._numbers(None) is None
  for wrong in (["v3"], ["-1"], []):
    with pytest.raises(UserError, match="such as 3,7; found"):
      command._numbers(wrong)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"step": 7}, "7"),
    ({"data_set": "nonsense"}, r"'nonsense'.*shapes"),
    ({"use_target": True}, "no EMA target"),
    ({"figure_variables": [1, 2]}, r"no variable 2; .* numbered 0\.\.1"),
    ({"workdir": __file__}, "is a file.*import_weights --file="),
    ({"output": "gs://bucket/x"}, "gs://bucket/x is not .*local directory"),
    ({"workdir": "gs://bucket/x"}, "gs://bucket/x is not .*local directory"),
  ],
)
def test_a_mistake_is_one_clear_line(run, arguments, message):
  with pytest.raises(UserError, match=message) as error:
    run_subject.explain_run(**({"workdir": run} | arguments))
  assert "\n" not in str(error.value)
