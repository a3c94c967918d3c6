"""`python -m imsvd_jax evaluate`: named protocols on a run, end to end.

The run is an untrained network on real digits: the numbers are those of its
random features, and good enough to tell right from wrong.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from configs import digits
from imsvd_jax import data
from imsvd_jax.base import devices
from imsvd_jax.base.errors import UserError
from imsvd_jax.base.hashing import checksum
from imsvd_jax.data import part
from imsvd_jax.evaluation import (
  augmented_views,
  binder,
  collapse,
  feature_cache,
  finetune,
  offline,
  protocols,
  transfer_sets,
)
from imsvd_jax.evaluation.data_set import DataSet
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.evaluation.protocols import PROTOCOLS
from imsvd_jax.evaluation.results import read_results
from imsvd_jax.runs import ownership
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.evaluation.pair import ROOT, run_pair


def digits_config(**overrides):
  config = digits.get_config("debug")
  config.update_from_flattened_dict(
    {
      "data.name": "digits",
      "data.num_examples": 0,
      "data.image_size": 16,
      "data.resize": 16,
      "data.crop": 16,
      "views.view1.size": 16,
      "views.view2.size": 16,
      # Crops alone make views here; an operation of no strength costs nothing.
      "views.view1.jitter_prob": 0.0,
      "views.view2.jitter_prob": 0.0,
      **overrides,
    }
  )
  return config


def save_run(workdir, config):
  experiment = experiment_lib.build(config, 1437)
  state = jax.jit(lambda: step_lib.init_state(experiment))()
  checkpointer = Checkpointer(workdir, keep_last=1, config=config.to_dict())
  checkpointer.save(7, state)
  checkpointer.close()
  return str(workdir)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp("run"), digits_config())


@pytest.fixture(scope="module")
def encoder(workdir):
  return load_encoder(workdir)


@pytest.fixture(scope="module")
def sources():
  settings = digits_config().data
  return [data.make_source(settings, split) for split in ("train", "eval")]


def evaluate(workdirs, *names, settings=(), **others):
  """Evaluates as the command does."""
  return offline.evaluate_runs(
    Options(tuple(workdirs), names, tuple(settings), **others)
  )


def opened(workdir, *names, settings=()):
  return offline.Run(workdir, Options((workdir,), names, tuple(settings)))


def entries_of(folder):
  return read_results(pathlib.Path(folder) / "results.json")


# --- Features: k-NN and its kin -----------------------------------------------


@pytest.fixture(scope="module")
def measured(workdir):
  """Three protocols on one run, and what they leave in its directory."""
  chosen = Options(
    workdir=(workdir,),
    protocol=("knn/imsvd", "knn/dino", "linear/online"),
    set=("knn/imsvd:temperatures=1000", "num_neighbors=20", "epochs=2"),
    seed=3,
    batch_size=100,
  )
  return chosen, offline.evaluate_runs(chosen)


def test_the_numbers_are_those_of_the_encoder(measured, encoder, sources):
  train, test = sources
  judge = KNeighborsClassifier(20, metric="cosine", algorithm="brute")
  judge.fit(encoder.features(train.images), train.labels)
  expected = judge.score(encoder.features(test.images), test.labels)
  # At a high temperature every neighbor has the same vote.
  found = measured[1][0]
  assert found.final == pytest.approx(expected, abs=0.006)
  assert found.final > 0.5
  assert found.num_images == 360


def test_results_say_how_they_were_made(measured, workdir, encoder):
  entries = entries_of(workdir)[:3]
  assert tuple(e["protocol"] for e in entries) == measured[0].protocol
  probe = entries[2]
  assert probe["hyperparameters"]["epochs"] == 2
  assert probe["hyperparameters"]["seed"] == probe["seed"] == 3
  assert probe["data"] == {
    "name": "digits",
    "train": "train",
    "test": "test",
    "preprocessing": {
      "resize": 16,
      "crop": 16,
      "interpolation": "bicubic",
      "channels": 3,
      "mean": [0.5, 0.5, 0.5],
      "std": [0.5, 0.5, 0.5],
    },
  }
  assert probe["step"] == 7
  assert probe["weights"] == checksum(encoder.variables)
  for entry in entries:
    low, high = entry["interval"]
    assert 0 < low < entry["final"] <= entry["best"] <= 1
    assert entry["final"] < high
    assert entry["seconds"] > 0
    assert entry["written"]
  folder = pathlib.Path(workdir)
  assert len(list((folder / "features").iterdir())) == 2, "shared: two splits"
  assert list((folder / "tensorboard" / "evaluate").glob("events*"))


def test_features_come_from_the_cache(
  measured, workdir, tmp_path, monkeypatch, capsys
):
  def unexpected(*args, **kwargs):
    raise AssertionError("features were computed again")

  monkeypatch.setattr(binder, "extract", unexpected)
  (result,) = evaluate([workdir], "knn/imsvd", settings=["num_neighbors=5"])
  printed = capsys.readouterr().out.splitlines()
  assert printed[0].split()[:3] == ["protocol", "data", "final"]
  shown = ["knn/imsvd", "digits", f"{100 * result.final:.2f}"]
  assert printed[1].split()[:3] == shown
  with pytest.raises(AssertionError, match="computed again"):
    evaluate([workdir], "knn/imsvd", cache=str(tmp_path))


def test_reuse_measures_nothing_again(measured, monkeypatch):
  def unexpected(*args, **kwargs):
    raise AssertionError("measured again")

  monkeypatch.setattr(binder, "evaluate", unexpected)
  chosen, before = measured
  again = dataclasses.replace(chosen, reuse=True)
  found = offline.evaluate_runs(again)
  assert [r.final for r in found] == [r.final for r in before]
  with pytest.raises(AssertionError, match="measured again"):
    offline.evaluate_runs(dataclasses.replace(again, seed=4))


def test_several_runs_are_compared(workdir, tmp_path, capsys):
  other = save_run(tmp_path / "other", digits_config(seed=1))
  found = evaluate([workdir, other], "knn/imsvd", markdown=True)
  printed = capsys.readouterr().out.splitlines()
  assert printed[0] == "| run | data | seeds | knn/imsvd |"
  mean = 50 * sum(r.final for r in found)
  assert printed[2].startswith(f"| imsvd | digits | 2 | {mean:.1f} (")
  assert len(entries_of(other)) == 1


# --- Probes on crops, and fine-tuning -----------------------------------------


LINEAR = {"settings": ["crops=run", "epochs=4", "learning_rate=3"]}


def test_a_full_protocol_probe_leaves_the_backbone_alone(workdir, encoder):
  run = opened(workdir, "linear/imsvd", **LINEAR)
  (result,) = run.measure_all()
  assert result.final > 0.3  # chance is 0.1; 32 features of a random network
  crops = protocols.Crops(16, (0.4, 1.0), flip_probability=0.0, test_resize=16)
  assert result.hyperparameters["crops"] == dataclasses.asdict(crops)
  assert result.values["train_loss"] < np.log(10)
  assert checksum(run.encoder.variables) == checksum(encoder.variables)


def test_a_backbone_that_changes_is_noticed(workdir, monkeypatch):
  run = opened(workdir, "linear/imsvd", **LINEAR)
  variables = run.encoder.variables

  def careless(protocol, inputs):
    statistics = variables["batch_stats"]
    variables["batch_stats"] = jax.tree.map(lambda x: x + 1e-3, statistics)
    yield "final", 1.0

  monkeypatch.setattr(binder, "evaluate", careless)
  with pytest.raises(RuntimeError, match="frozen encoder changed"):
    list(run.measure_all())


TUNE = protocols.choose(
  ["finetune/10pct"],
  [
    "crops.size=16",
    "crops.test_resize=16",
    "crops.flip_probability=0",
    "batch_size=16",
    "epochs=3",
    "initial_deviation=0",
  ],
)["finetune/10pct"]


@pytest.fixture(scope="module")
def subject(encoder, sources):
  """The encoder on the digits, as the binder binds them to fine-tuning."""
  bound = binder.Binding(
    binder.Binder(offline._network(encoder), batch_size=256),
    binder.Weights("trained", 7, encoder.variables, None),
  )
  digits_data = DataSet(encoder.config.data, *sources)
  return binder._Subject(bound, digits_data, TUNE)


@pytest.fixture(scope="module")
def tuned(encoder, subject):
  before = checksum(encoder.variables)
  values = dict(finetune.run(subject.inputs(finetune.EVALUATOR), TUNE))
  assert checksum(encoder.variables) == before
  return values


def test_fine_tuning_learns_from_a_tenth_of_the_labels(tuned, sources):
  assert tuned["train_images"] == 140  # 14 of each class.
  assert 0.2 < tuned["low"] < tuned["final"] <= tuned["best"]
  assert tuned["top1"] == tuned["final"]
  labels = sources[0].labels
  chosen = finetune.labelled_part(labels, TUNE)
  np.testing.assert_array_equal(np.bincount(labels[chosen]), [14] * 10)
  everything = dataclasses.replace(TUNE, fraction=1.0)
  assert finetune.labelled_part(labels, everything) is None
  with pytest.raises(UserError, match="several labels each"):
    finetune.labelled_part(labels[:, None], TUNE)


def moved(before, after):
  changes = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
  return jax.tree.leaves(changes)


def test_a_step_of_fine_tuning_is_sgd(subject, sources):
  """With a head of zeros, the first step is known by hand."""
  backbone = subject.backbone()
  state = finetune._initial_state(backbone, 10, TUNE, devices.make_mesh())
  step = jax.jit(
    lambda s, b: finetune._train_step(
      backbone.apply, TUNE, s, b, jnp.float32(0.5)
    )
  )
  labels = np.array([0, 0, 0, 1, 2, 3, 3, 9] * 2)
  mask = np.arange(16) < 8
  batch = {"image": sources[0].images[:16], "label": labels, "mask": mask}
  new, loss = step(state, batch)
  assert float(loss) == pytest.approx(np.log(10), rel=1e-5)
  counts = np.bincount(labels[:8], minlength=10)
  gradient = 0.1 - counts / 8
  np.testing.assert_allclose(
    new.params["head"]["bias"], -0.5 * 0.1 * gradient, atol=1e-6
  )
  before, after = state.params["backbone"], new.params["backbone"]
  assert not any(moved(before, after)), "no gradient passes a head of zeros"
  statistics = moved(state.batch_stats, new.batch_stats)
  assert all(statistics), "statistics are the batch's"
  # From now on the backbone learns too, at its own rate.
  newer, _ = step(new, batch)
  assert any(moved(after, newer.params["backbone"]))


# --- Collapse -----------------------------------------------------------------


def test_collapse_looks_at_true_groups_of_views(workdir, capsys):
  settings = ["max_images=96", "lidar_groups=20", "lidar_views=4"]
  (result,) = evaluate([workdir], "collapse", settings=settings)
  values = result.values
  assert result.num_images == 96
  assert result.final is None
  names = {"rank_me/features", "rank_me/embeddings", "lidar", "alignment"}
  names |= {"uniformity", "codes/dead_bins", "codes/saturated_bins"}
  names |= {"codes/mutual_information_mean", "codes/kappa"}
  names |= {f"codes/variable/{m}/entropy" for m in range(8)}
  assert names <= set(values)
  assert 1 < values["lidar"] < 20
  # Views of one image are nearer than images are to each other.
  assert values["alignment"] < 1
  printed = capsys.readouterr().out
  assert "collapse lidar" in printed
  assert "variable" not in printed


def test_views_are_the_recipes_own_and_every_image_has_its(encoder, sources):
  some = augmented_views.some_images(sources[0], 10, seed=0)
  embedder = augmented_views.ViewEmbedder(
    encoder.model, encoder.config, discrete=True, batch_size=16
  )
  views = embedder.embed(encoder.variables, some, num_views=5, seed=0)
  assert views.shape == (10, 6, 64)
  assert np.isfinite(views).all()
  # Views of one image differ less than those of all: of groups put together
  # at random, 5/6 of the variance would lie within.
  within, whole = views.var(axis=1).mean(), views.var(axis=(0, 1)).mean()
  assert within < 0.75 * whole
  # A view depends on the image, the epoch and the seed; not on how many.
  pair = embedder.embed(encoder.variables, some, num_views=2, seed=0)
  np.testing.assert_allclose(pair, views[:, :2], rtol=1e-4, atol=1e-5)
  other = embedder.embed(encoder.variables, some, num_views=6, seed=1)
  assert not np.allclose(other, views)


# --- Transfer -----------------------------------------------------------------


class TinyScenes(tfds.core.GeneratorBasedBuilder):
  """Colours, any of three in an image; some do not count."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    label = tfds.features.ClassLabel(names=["red", "green", "blue"])
    names = ("labels", "labels_no_difficult")
    features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(shape=(20, 18, 3))}
      | {name: tfds.features.Sequence(label) for name in names}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, dl_manager):
    return {"train": self._scenes(0, 48), "test": self._scenes(1, 24)}

  def _generate_examples(self):
    raise NotImplementedError

  def _scenes(self, seed, count):
    rng = np.random.default_rng(seed)
    for i in range(count):
      present = [c for c in range(3) if i >> c & 1]
      image = rng.integers(0, 60, (20, 18, 3))
      image[..., present] += 150
      counted = [c for c in present if i % 12]
      example = {"image": image.astype(np.uint8), "labels": present}
      yield i, example | {"labels_no_difficult": counted}


def test_transfer_sets_lie_where_the_user_says(workdir, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  output = str(tmp_path / "output")
  (result,) = evaluate(
    [workdir], "transfer/dtd", data_dir="~/sets", output=output
  )
  assert result.data["path"] == f"{tmp_path}/sets"
  assert f"{tmp_path}/sets/dtd" in result.skipped


def test_transfer_runs_what_is_prepared(workdir, tmp_path, monkeypatch, capsys):
  TinyScenes(data_dir=tmp_path).download_and_prepare()
  scenes = dataclasses.replace(
    transfer_sets.TRANSFER["voc2007"], name="tfds:tiny_scenes", train="train"
  )
  monkeypatch.setitem(transfer_sets.TRANSFER, "voc2007", scenes)
  found = evaluate(
    [workdir],
    "transfer",
    settings=["transfer/voc2007:inverse_penalties=0.1"],
    data_dir=str(tmp_path),
    output=str(tmp_path / "output"),
  )
  names = [f"transfer/{name}" for name in transfer_sets.TRANSFER]
  assert [r.protocol for r in found] == names
  (done,) = (r for r in found if not r.skipped)
  assert done.protocol == "transfer/voc2007"
  assert done.hyperparameters["metric"] == "map_11_point"
  assert done.hyperparameters["inverse_penalties"] == (0.1,)
  assert done.data["name"] == "tfds:tiny_scenes"
  assert 0.8 < done.interval[0] <= done.final <= 1
  assert done.num_images == 24
  printed = capsys.readouterr().out
  assert "'dtd' is not prepared: found nothing at" in printed
  assert "TensorFlow Datasets has no FGVC-Aircraft: sort its" in printed
  assert len(entries_of(tmp_path / "output")) == len(names)


# --- Mistakes -----------------------------------------------------------------


def refused(message, workdirs, *names, **others):
  with pytest.raises(UserError, match=message) as error:
    evaluate(workdirs, *names, **others)
  assert "\n" not in str(error.value)


def test_a_mistake_is_one_clear_line(workdir, tmp_path, monkeypatch):
  def too_late(*args, **kwargs):
    raise AssertionError("images were embedded before the mistake was seen")

  monkeypatch.setattr(binder, "extract", too_late)
  monkeypatch.setattr(feature_cache, "cached_features", too_late)
  run, knn = [workdir], "knn/imsvd"
  refused("--workdir names no run", [], knn)
  refused("--protocol names none", run)
  refused(
    "Unknown protocol 'knn/imsdv'. Did you mean 'knn/imsvd'", run, "knn/imsdv"
  )
  refused("no such|does not exist|No run|no checkpoint", [str(tmp_path)], knn)
  refused("holds no step 9; it holds", run, knn, step=9)
  refused("no EMA target network", run, knn, target=True)
  refused("Unknown data source 'digit'", run, knn, data="digit")
  refused("expected two names", run, knn, splits=["train"])
  both = (knn, "linear/lbfgs")  # Not a line for each.
  refused("has no split 'val'", run, *both, splits=["train", "val"])
  refused("seed='-1'; expected from 0", run, "linear/online", seed=-1)
  (tmp_path / "file").write_text("")
  for output in ("file", "file/below"):
    refused("file is a file; --output", run, knn, output=str(tmp_path / output))
  refused("--output=x for 2 runs", [workdir] * 2, knn, output="x")
  many = ["num_neighbors=2000"]
  refused("knn/imsvd: k-NN with k = 2000 over a", run, knn, settings=many)
  refused(
    "finetune/1pct: The labelled part has 10 images, fewer than a batch of 256",
    run,
    "finetune/1pct",
    settings=["crops=run"],
  )
  (tmp_path / "results.json").write_text("{")
  refused("is not a results file", run, knn, output=str(tmp_path))


def test_images_without_labels(workdir, tmp_path):
  for split in ("train", "test"):
    (tmp_path / split).mkdir()
    for i in range(2):
      image = Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8))
      image.save(tmp_path / split / f"{i}.png")
  folder = f"folder={tmp_path}"
  for name in ("knn/imsvd", "finetune/1pct"):
    refused("The train images have no labels", [workdir], name, data=folder)


@pytest.mark.parametrize(
  "name", ["knn/imsvd", "linear/imsvd", "finetune/10pct"]
)
def test_a_class_that_train_lacks(workdir, sources, monkeypatch, name):
  kept = part.take(sources[0], np.flatnonzero(sources[0].labels != 4))
  made = {"train": kept, "eval": sources[1]}
  monkeypatch.setattr(data, "make_source", lambda settings, split: made[split])
  refused(
    r"1 of the 10 test classes never occur in train \(4\)",
    [workdir],
    name,
    settings=["crops=run", "batch_size=16"] if name != "knn/imsvd" else (),
  )


def test_features_that_are_not_finite(workdir, tmp_path, monkeypatch):
  nan = lambda self, _, images: np.full((len(images), 3), np.nan, np.float32)
  monkeypatch.setattr(binder.Binder, "embed", nan)
  message = "knn/imsvd: 1437 of 1437 train features hold NaN"
  refused(message, [workdir], "knn/imsvd", cache=str(tmp_path))


def test_a_file_of_weights_needs_an_output(tmp_path):
  path = tmp_path / "weights.npz"
  path.write_bytes(b"")
  refused("is a file of weights; name", [str(path)], "collapse")


# --- The command --------------------------------------------------------------


def run_command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "imsvd_jax", "evaluate", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )


def test_the_command_evaluates(workdir, measured, tmp_path):
  del measured  # Its cache makes this quick.
  result = run_command(
    f"--workdir={workdir}",
    "--protocol=knn/imsvd",
    "--set=num_neighbors=3",
    f"--output={tmp_path}",
    f"--cache={workdir}/features",
  )
  assert result.returncode == 0, result.stderr
  header, row = result.stdout.splitlines()
  assert header.startswith("protocol")
  (entry,) = entries_of(tmp_path)
  assert row.split()[2] == f"{100 * entry['final']:.2f}"
  assert json.dumps(entry["hyperparameters"]["num_neighbors"]) == "[3]"


def test_the_command_lists_the_protocols():
  listed = run_command("--protocol=help")
  assert listed.returncode == 0
  assert all(name in listed.stdout for name in PROTOCOLS)
  assert listed.stderr == ""


@pytest.mark.slow
def test_the_command_answers_a_mistake_in_one_line(tmp_path):
  result = run_command(f"--workdir={tmp_path}", "--protocol=knn/imsvd")
  assert result.returncode == 2
  assert result.stdout == ""
  assert result.stderr.startswith("error: ")
  assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.slow
def test_two_processes_measure_what_one_does(workdir, tmp_path):
  names = ("knn/imsvd", "linear/imsvd", "finetune/10pct", "collapse")
  settings = (
    "crops=run",
    "epochs=2",
    "learning_rate=3",
    "finetune/10pct:batch_size=16",
    "max_images=50",
    "lidar_groups=20",
    "lidar_views=4",
  )
  alone = evaluate(
    [workdir], *names, settings=settings, output=str(tmp_path / "one")
  )
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  command = lambda port, i: [
    *(sys.executable, "-m", "imsvd_jax", "evaluate"),
    f"--workdir={workdir}",
    f"--protocol={','.join(names)}",
    *(f"--set={setting}" for setting in settings),
    f"--output={tmp_path / 'two'}",
    f"--coordinator_address=127.0.0.1:{port}",
    "--num_processes=2",
    f"--process_id={i}",
  ]
  printed = [
    [x for x in output.splitlines() if not x.startswith("[Gloo]")]
    for output in run_pair(command, environment)
  ]
  assert printed[0][0].startswith("protocol")
  assert printed[1] == [], "process 0 prints, alone"
  found = entries_of(tmp_path / "two")
  for one, two in zip(alone, found, strict=True):
    assert two["num_images"] == one.num_images
    for name, value in one.values.items():
      # Rounding may change the class of one image, or the bin of a variable.
      assert two["values"][name] == pytest.approx(value, rel=0.02, abs=0.01)


def test_a_protocol_that_fails_does_not_take_the_others(workdir, tmp_path):
  with pytest.raises(UserError) as raised:
    evaluate(
      [workdir],
      *("knn/imsvd", "linear/online"),
      settings=("num_neighbors=1438", "epochs=1"),
      output=str(tmp_path),
    )
  assert str(raised.value).startswith("knn/imsvd: k-NN with k = 1438")
  assert [e["protocol"] for e in entries_of(tmp_path)] == ["linear/online"]


def test_each_failure_of_a_protocol_is_a_line(
  workdir, tmp_path, monkeypatch, capfd
):
  def fails(*_, **__):
    raise MemoryError("no room")

  monkeypatch.setattr(collapse, "lidar", fails)
  monkeypatch.setattr(binder, "extract", fails)
  with pytest.raises(UserError) as raised:
    evaluate(
      [workdir],
      *("knn/imsvd", "collapse/online"),
      settings=("max_images=24",),
      output=str(tmp_path),
    )
  assert str(raised.value).splitlines() == [
    "knn/imsvd: MemoryError: no room",
    "collapse/online: MemoryError: no room",
  ]
  assert not entries_of(tmp_path)


# --- Runs from elsewhere ------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
  """A run that names a folder of someone's images, and was not trained here."""
  root = tmp_path_factory.mktemp("foreign")
  for split in ("train", "val"):
    for number in range(8):
      path = root / "images" / split / "ab"[number % 2] / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.new("RGB", (16, 16), (number * 20, 0, 0)).save(path)
  named = {"data.name": "folder", "data.path": str(root / "images")}
  config = digits_config(**named)
  return save_run(root / "run", config), root, config


def test_the_data_that_a_foreign_run_names_need_a_word(foreign, tmp_path):
  run, root, _ = foreign
  few = {"settings": ("num_neighbors=2",), "output": str(tmp_path)}
  with pytest.raises(UserError, match="may be someone else's") as raised:
    evaluate([run], "knn/imsvd", **few)
  assert str(root / "images") in str(raised.value)
  assert not entries_of(tmp_path)
  for word in (
    {"trust_workdir": True},
    {"data": f"folder={root / 'images'}"},
  ):
    (result,) = evaluate([run], "knn/imsvd", **few, **word)
    assert result.num_images == 8


def test_sets_that_a_protocol_brings_need_no_word(foreign, tmp_path):
  (result,) = evaluate(
    [foreign[0]],
    "transfer/aircraft",
    output=str(tmp_path),
    data_dir=str(tmp_path),
  )
  assert "has no FGVC-Aircraft" in result.skipped


def test_a_signed_run_needs_no_word(foreign, tmp_path):
  run, _, config = foreign
  own = shutil.copytree(run, tmp_path / "own")
  ownership.sign(own, config)
  (result,) = evaluate([str(own)], "knn/imsvd", settings=("num_neighbors=2",))
  assert result.num_images == 8
