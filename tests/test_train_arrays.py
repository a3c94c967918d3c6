"""Runs on images in memory: from devices and host, without TensorFlow."""

import json
import pathlib
import shutil
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.data import placement
from imsvd_jax.runs import metrics
from imsvd_jax.train import train_and_evaluate
from tests.train_child import small_config

ROOT = pathlib.Path(__file__).parents[1]
LOCAL = {"views.num_local": 2, "views.local.size": 8}


@pytest.fixture(scope="module")
def array_file(tmp_path_factory):
  """Images of 20 x 24 pixels, two classes."""
  path = tmp_path_factory.mktemp("arrays") / "file.npz"
  rng = np.random.default_rng(0)
  arrays = {}
  for split, count in (("train", 40), ("test", 12)):
    labels = np.arange(count) % 2
    images = rng.integers(0, 128, (count, 20, 24, 3), np.uint8)
    images += (100 * labels[:, None, None, None]).astype(np.uint8)
    arrays |= {f"{split}_images": images, f"{split}_labels": labels[:, None]}
  np.savez(path, **arrays)
  return path


def config_of(path, **overrides):
  return small_config(
    **{
      "data.name": "arrays",
      "data.path": str(path),
      "data.num_examples": 0,
      "data.eval_split": "test",
      **LOCAL,
      **overrides,
    }
  )


@pytest.fixture(scope="module")
def finished(array_file, tmp_path_factory):
  """A run whose images stay on the devices."""
  workdir = tmp_path_factory.mktemp("run") / "run"
  config = config_of(array_file, **{"data.placement": "device"})
  return train_and_evaluate(config, str(workdir)), workdir


def assert_same_state(a, b):
  states = (jax.tree.leaves(s.replace(rng=None)) for s in (a, b))
  for x, y in zip(*states, strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("where", ["host", "device"])
def test_host_and_parts_on_devices_give_the_same_run(
  array_file, finished, tmp_path, monkeypatch, where
):
  state, workdir = finished
  # The finished run has a copy on every device; here there is no room for one.
  monkeypatch.setattr(placement, "_device_memory", lambda mesh: 1.0)
  config = config_of(array_file, **{"data.placement": where})
  other = train_and_evaluate(config, str(tmp_path))
  assert_same_state(state, other)
  assert metrics.read_metrics(workdir) == metrics.read_metrics(tmp_path)


def test_a_run_resumes_with_another_placement(array_file, finished, tmp_path):
  state, workdir = finished
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(int(state.step)))
  config = config_of(array_file, **{"data.placement": "host"})
  other = train_and_evaluate(config, str(tmp_path / "run"))
  assert_same_state(state, other)
  lines = [metrics.read_metrics(w) for w in (workdir, tmp_path / "run")]
  assert lines[0] == lines[1]


def test_an_unknown_placement_is_one_clear_line(array_file, tmp_path):
  config = config_of(array_file, **{"data.placement": "devices"})
  with pytest.raises(UserError, match="expected one of auto, device, host"):
    train_and_evaluate(config, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def without_tensorflow(program, tmp_path):
  """Runs a program where the three packages cannot be imported."""
  blocked = """
    import sys
    for name in ("tensorflow", "tensorflow_datasets", "clu"):
      sys.modules[name] = None
    """
  result = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(blocked) + textwrap.dedent(program)],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stderr


@pytest.mark.proof
def test_arrays_need_no_tensorflow(array_file, tmp_path):
  """Training, resuming, online and final evaluation, evaluate and explain."""
  said = without_tensorflow(
    f"""
    import json, pathlib, shutil
    from imsvd_jax.evaluation import offline
    from imsvd_jax.evaluation.evaluate_options import Options
    from imsvd_jax.explain import run_subject
    from imsvd_jax.interop import image_embeddings
    from imsvd_jax.train import train_and_evaluate
    from tests.test_train_arrays import config_of
    workdir = pathlib.Path({str(tmp_path)!r}) / "run"
    config = config_of({str(array_file)!r}, **{{"eval.final": True}})
    last = train_and_evaluate(config, str(workdir)).step
    shutil.rmtree(workdir / "checkpoints" / str(int(last)))
    train_and_evaluate(config, str(workdir))
    options = Options(workdir=[str(workdir)], protocol=["knn/imsvd"])
    offline.evaluate_runs(options)
    run_subject.explain_run(str(workdir))
    image_embeddings.write_embeddings(
      str(workdir / "features.npz"), str(workdir), "arrays=" + config.data.path
    )
    """,
    tmp_path,
  )
  assert said.count("need the package clu") >= 2
  names = set().union(*metrics.read_metrics(tmp_path / "run"))
  assert {"loss", "online/knn", "final_knn", "final_linear"} <= names
  results = json.loads((tmp_path / "run" / "results.json").read_text())
  assert "knn/imsvd" in json.dumps(results)
  assert list((tmp_path / "run").glob("explain-*/explorer/index.html"))
  with np.load(tmp_path / "run" / "features.npz") as found:
    assert len(found["features"]) == len(found["paths"]) == 40


@pytest.mark.parametrize("name", ["folder", "tfds:cifar10"])
def test_what_needs_tensorflow_says_so(name, tmp_path):
  without_tensorflow(
    f"""
    from imsvd_jax import data
    from imsvd_jax.base.errors import UserError
    from configs import digits
    settings = digits.get_config("debug").data
    settings.name, settings.num_examples = {name!r}, 0
    try:
      data.make_source(settings, "train")
    except UserError as error:
      assert "TensorFlow, which cannot be imported" in str(error), error
    else:
      raise AssertionError("no error")
    """,
    tmp_path,
  )
