"""The registry, the protocols, the results file, the cache, the suite."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from imsvd_jax.base import hashing
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import (
  binder,
  feature_cache,
  registry,
  results,
  scores,
  transfer_sets,
)
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.inputs import Inputs
from imsvd_jax.evaluation.protocols import PROTOCOLS, SUITES, choose, describe
from imsvd_jax.evaluation.registry import EVALUATORS

# --- Protocols and registry ---------------------------------------------------

# As `protocols.describe` says: a change of a published protocol must be meant.
PUBLISHED = """
linear/imsvd learning_rate=0.02 scale_by_batch=False optimizer=sgd momentum=0.9
  weight_decay=1e-06 batch_size=256 epochs=100 schedule=cosine
  initial_deviation=0.01 crops.size=224 crops.scale=0.08,1 crops.test_resize=256
linear/vicreg learning_rate=0.02 weight_decay=1e-06
linear/barlow learning_rate=0.3 weight_decay=1e-06
linear/simsiam learning_rate=0.1 scale_by_batch=True optimizer=lars
  weight_decay=0 batch_size=4096 epochs=90
linear/cifar learning_rate=30 weight_decay=0 batch_size=256 epochs=100
  schedule=steps milestones=60,80
  crops.size=32 crops.scale=0.8,1 crops.test_resize=36
linear/lbfgs metric=top1
linear/probe
linear/online epochs=10
knn/imsvd num_neighbors=20 temperatures=0.07
knn/mveb num_neighbors=200 temperatures=0.1
knn/dino num_neighbors=20,10,100,200 temperatures=0.07
finetune/1pct fraction=0.01
finetune/10pct fraction=0.1
collapse lidar_groups=1000 lidar_views=50
collapse/online"""


def test_every_protocol_is_as_published():
  described = "".join(f"\n{text}" for text in describe(PROTOCOLS))
  published, found = (
    {entry.split()[0]: set(entry.split()[1:]) for entry in entries}
    for entries in (
      re.findall(r"(?m)^\S.*(?:\n .*)*", text)
      for text in (PUBLISHED, described)
    )
  )
  assert set(PROTOCOLS) == {*published, *SUITES["transfer"]}
  for name, settings in published.items():
    assert settings <= found[name]
    json.dumps(dataclasses.asdict(PROTOCOLS[name]))


def test_every_protocol_has_its_evaluator():
  assert {p.evaluator for p in PROTOCOLS.values()} == set(EVALUATORS)


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_binder_makes_all_that_an_evaluator_needs(name):
  known = {field.name for field in dataclasses.fields(Inputs)}
  for need in EVALUATORS[name].needs:
    assert need in known
    assert callable(getattr(binder._Subject, need))


@pytest.fixture(scope="module")
def inputs():
  """What every evaluator needs, of three easy classes."""
  generator = np.random.default_rng(0)
  labels = np.arange(120) % 3
  centres = 3 * np.eye(3, 5)
  features = centres[labels] + generator.normal(size=(120, 5))
  features = features.astype(np.float32)
  train = Features(features[:60], labels[:60])
  test = Features(features[60:], labels[60:])
  batches = [{"image": train.features, "label": train.labels}]
  embeddings = generator.normal(size=(20, 2, 5)).astype(np.float32)
  codes = np.asarray(jax.nn.softmax(embeddings[:, :, None, :]))
  return Inputs(
    train=train,
    test=test,
    num_classes=3,
    embed=jnp.asarray,
    train_epochs=lambda chosen: lambda epoch: batches,
    test_crops=test,
    sample=train,
    embeddings=embeddings,
    view_groups=embeddings,
    codes=codes,
  )


# One of each evaluator is enough; k-NN and linear differ in data alone.
ONE_OF_EACH = ["linear/imsvd", "linear/lbfgs", "linear/probe", "knn/dino"]


SMALL = choose(
  ONE_OF_EACH, ["epochs=3", "num_neighbors=5,1", "learning_rates=0.1"]
)


@pytest.mark.parametrize("protocol", SMALL.values(), ids=SMALL)
def test_every_labelled_evaluator_gives_a_headline(inputs, protocol):
  values = dict(registry.evaluate(protocol, inputs))
  assert 0.6 < values["low"] < values["final"] <= values["best"]
  assert values["final"] <= values["high"]
  assert values["top1"] == values["final"]
  assert values["top5"] == 1.0


def test_every_evaluator_is_covered():
  covered = {PROTOCOLS[n].evaluator for n in ONE_OF_EACH}
  elsewhere = {"collapse", "finetune", "transfer"}  # test_offline.py
  assert covered | elsewhere == set(EVALUATORS)


def test_collapse_needs_no_labels(inputs):
  values = dict(registry.evaluate(PROTOCOLS["collapse"], inputs))
  assert "final" not in values
  assert "lidar" in values


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "collapse", "finetune/1pct"])
def test_what_is_absent_is_named(name):
  protocol = PROTOCOLS[name]
  with pytest.raises(UserError, match="This protocol needs "):
    list(registry.evaluate(protocol, Inputs()))


# --- results.json -------------------------------------------------------------


def some_result(**changes):
  fields = {
    "protocol": "knn/imsvd",
    "evaluator": "knn",
    "hyperparameters": {"num_neighbors": (20,), "temperatures": (0.07,)},
    "data": {"name": "digits", "train": "train", "test": "test"},
    "step": 300,
    "seed": 0,
    "values": dict(
      scores.headline(scores.Score(0.9, (0.85, 0.94)), 0.92),
      top5=0.99,
    ),
    "num_images": 360,
    "seconds": 1.234,
  }
  fields |= changes
  values = fields.pop("values")
  return results.with_values(results.Result(**fields), values)


def test_results_say_how_they_were_made(tmp_path):
  path = tmp_path / "new" / "results.json"
  results.write_results(path, [some_result()])
  content = json.loads(path.read_text())
  assert content["schema"] == 1
  (entry,) = content["results"]
  written = entry.pop("written")
  assert written.endswith("Z")
  assert entry == {
    "protocol": "knn/imsvd",
    "evaluator": "knn",
    "hyperparameters": {"num_neighbors": [20], "temperatures": [0.07]},
    "data": {"name": "digits", "train": "train", "test": "test"},
    "step": 300,
    "seed": 0,
    "final": 0.9,
    "best": 0.92,
    "interval": [0.85, 0.94],
    "num_images": 360,
    "values": {"top5": 0.99},
    "seconds": 1.234,
    "online": False,
    "skipped": None,
    "version": entry["version"],
    "encoder": "trained",
    "weights": None,
  }
  assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_repeated_measurement_replaces_its_last(tmp_path):
  path = tmp_path / "results.json"
  results.write_results(path, [some_result(), some_result(step=600)])
  results.write_results(path, [some_result(seconds=9.0)])
  entries = results.read_results(path)
  assert [e["step"] for e in entries] == [300, 600]
  assert [e["seconds"] for e in entries] == [9.0, 1.234]
  results.write_results(path, [some_result(online=True), some_result(seed=1)])
  assert len(results.read_results(path)) == 4


def test_other_weights_of_a_step_are_another_measurement(tmp_path):
  path = tmp_path / "results.json"
  for weights in ("abc", "abd", "abc"):
    results.write_results(path, [some_result(weights=weights)])
  found = [entry["weights"] for entry in results.read_results(path)]
  assert found == ["abc", "abd"]


def test_a_measurement_is_found_again_for_the_same_weights_alone(tmp_path):
  path = tmp_path / "results.json"
  made = some_result(weights="abc")
  results.write_results(path, [made])
  entries = results.read_results(path)
  planned = dataclasses.replace(made, final=None, interval=None)
  assert results.find(entries, planned).final == 0.9
  for change in ({"weights": "abd"}, {"step": 1}, {"version": "0"}):
    other = dataclasses.replace(planned, **change)
    assert results.find(entries, other) is None
  results.write_results(path, [dataclasses.replace(made, skipped="no")])
  assert results.find(results.read_results(path), planned) is None


def test_scalars_leave_out_the_very_many():
  values = {"final": 0.5, "top5": 0.75, "codes/variable/3/entropy": 1.0}
  found = results.scalars(some_result(values=values))
  assert found == {"knn/imsvd/final": 0.5, "knn/imsvd/top5": 0.75}


def test_a_number_that_is_none_is_null(tmp_path):
  path = tmp_path / "results.json"
  results.write_results(path, [some_result(values={"rank_me": np.nan})])
  (entry,) = results.read_results(path)
  assert entry["values"] == {"rank_me": None}
  assert entry["final"] is None


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("{", "is not a results file"),
    ("[]", "is not a results file"),
    ('{"schema": 1, "results": [{}]}', "is not a results file"),
    ('{"schema": 9, "results": []}', "has schema 9; expected 1"),
  ],
)
def test_a_foreign_file_is_not_overwritten(tmp_path, text, message):
  path = tmp_path / "results.json"
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    results.write_results(path, [some_result()])
  assert path.read_text() == text


def test_table():
  rows = [
    some_result(),
    some_result(protocol="collapse", values={"rank_me": 12.3456}),
    results.Result("transfer/dtd", "lbfgs", {}, {}, 300, 0, skipped="run: x"),
    some_result(online=True),
  ]
  assert results.table(rows).splitlines() == [
    "protocol            data      final    95% interval   best  images    s",
    "knn/imsvd           digits    90.00  85.00 to 94.00  92.00     360  1.2",
    "collapse            digits                                     360  1.2",
    "transfer/dtd                skipped",
    "knn/imsvd (online)  digits    90.00  85.00 to 94.00  92.00     360  1.2",
    "collapse rank_me 12.35",
    "run: x",
  ]


# --- The feature cache --------------------------------------------------------

KEY = {"weights": "abc", "data": "digits", "preprocessing": {"crop": 16}}


@pytest.fixture
def counted():
  calls = []

  def compute(labels=True):
    calls.append(1)
    features = np.arange(12, dtype=np.float32).reshape(4, 3) + len(calls)
    known = np.array([0, 1, 0, 1], np.int32) if labels else None
    return Features(features, known)

  compute.calls = calls
  return compute


def test_features_are_computed_once(tmp_path, counted):
  first = feature_cache.cached_features(tmp_path, KEY, counted)
  again = feature_cache.cached_features(
    tmp_path, dict(reversed(KEY.items())), counted
  )
  assert len(counted.calls) == 1
  for one, other in zip(first, again, strict=True):
    np.testing.assert_array_equal(one, other)
    assert one.dtype == other.dtype
  assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", list(KEY))
def test_another_key_is_another_file(tmp_path, counted, name):
  feature_cache.cached_features(tmp_path, KEY, counted)
  feature_cache.cached_features(tmp_path, KEY | {name: "other"}, counted)
  assert len(counted.calls) == 2
  assert len(list(tmp_path.iterdir())) == 2


def test_no_labels_stay_none(tmp_path, counted):
  for _ in range(2):
    found = feature_cache.cached_features(
      tmp_path, KEY, lambda: counted(labels=False)
    )
    assert found.labels is None
  assert len(counted.calls) == 1


def test_a_damaged_file_is_made_anew(tmp_path, counted, capsys):
  first = feature_cache.cached_features(tmp_path, KEY, counted)
  (path,) = tmp_path.iterdir()
  whole = path.read_bytes()
  place = whole.index(first.features.tobytes()) + 5
  flipped = bytearray(whole)
  flipped[place] ^= 1
  for damaged in (bytes(flipped), whole[: len(whole) // 2], b"", b"what?"):
    path.write_bytes(damaged)
    before = len(counted.calls)
    feature_cache.cached_features(tmp_path, KEY, counted)
    assert len(counted.calls) == before + 1
  assert capsys.readouterr().err.count("are damaged") == 4


def test_checksum_sees_one_bit_a_place_and_a_type():
  tree = {"a": np.zeros(3, np.float32), "b": jnp.ones((2, 2))}
  same = {"b": np.ones((2, 2), np.float32), "a": jnp.zeros(3)}
  assert hashing.checksum(tree) == hashing.checksum(same)
  others = [
    tree | {"a": np.array([0, 0, np.float32(1e-45)], np.float32)},
    tree | {"a": np.zeros((3, 1), np.float32)},
    tree | {"a": np.zeros(3, np.int32)},
    {"b": tree["a"], "a": tree["b"]},
  ]
  assert len({hashing.checksum(t) for t in [tree, *others]}) == 5


# --- The transfer suite -------------------------------------------------------


def test_the_suite_is_complete():
  names = "food101 cifar10 cifar100 sun397 cars196 aircraft voc2007 dtd pets"
  names += " caltech101 flowers102"
  assert list(transfer_sets.TRANSFER) == names.split()
  metrics = {s.metric for s in transfer_sets.TRANSFER.values()}
  assert metrics == set(scores.METRICS)
  for name, chosen in transfer_sets.TRANSFER.items():
    assert PROTOCOLS[f"transfer/{name}"].metric == chosen.metric
  assert PROTOCOLS["transfer/voc2007"].metric == "map_11_point"


def test_a_set_is_prepared_as_the_runs_images_are(monkeypatch):
  own = {"name": "digits", "path": "", "train_split": "train"}
  own |= {"eval_split": "test", "num_examples": 9, "crop": 16}
  prepared = lambda name, folder: transfer_sets.own_data(
    PROTOCOLS[f"transfer/{name}"], ml_collections.ConfigDict(own), folder
  )
  assert prepared("voc2007", "/sets")[0].to_dict() == {
    "name": "tfds:voc/2007",
    "path": "/sets",
    "train_split": "train+validation",
    "eval_split": "test",
    "num_examples": 0,
    "crop": 16,
  }
  settings, remedy = prepared("aircraft", "/sets")
  assert settings.path == "/sets/aircraft"
  assert "sort its images into" in remedy
  # By default, where TensorFlow Datasets puts it.
  monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
  assert prepared("dtd", "")[0].path == "/somewhere"
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert prepared("dtd", "")[0].path.endswith("/tensorflow_datasets")


def test_a_pipe_is_no_results_file(tmp_path):
  os.mkfifo(tmp_path / results.FILE_NAME)
  with pytest.raises(UserError, match="is not a regular file; move it away"):
    results.read_results(tmp_path / results.FILE_NAME)
