"""The trainer with a state that is split over the devices."""

import shutil

import jax
import numpy as np
import pytest

from imsvd_jax.runs import metrics
from imsvd_jax.runs.encoder import load_encoder
from imsvd_jax.train import train_and_evaluate
from tests.train_child import small_config


def config_of(mode):
  return small_config(
    **{
      "sharding.state": mode,
      "optimizer.name": "lars",
      # With a target network, which two of the modes split.
      "objective.name": "mveb",
    }
  )


@pytest.mark.proof
def test_a_run_goes_on_in_another_mode(tmp_path, capsys):
  """Saved whole, continued in parts, and evaluated on the way."""
  expected = train_and_evaluate(config_of("replicated"), str(tmp_path / "one"))
  train_and_evaluate(config_of("all"), str(tmp_path / "two"))
  for step in ("8", "9"):
    shutil.rmtree(tmp_path / "two" / "checkpoints" / step)
  state = train_and_evaluate(config_of("optimizer"), str(tmp_path / "two"))
  said = capsys.readouterr().err
  assert "from the checkpoint of step 6." in said
  assert "WARNING" not in said
  trees = (expected.params, expected.target), (state.params, state.target)
  for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
  one, two = (metrics.read_metrics(str(tmp_path / n)) for n in ("one", "two"))
  for a, b in zip(one, two, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      # Rounding may change the neighbors of one image.
      tolerance = 0.1 if name == "online/knn" else 1e-4
      assert b[name] == pytest.approx(a[name], rel=1e-3, abs=tolerance), name
  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
  features = [
    load_encoder(str(tmp_path / name)).features(images)
    for name in ("one", "two")
  ]
  np.testing.assert_allclose(*features, rtol=1e-3, atol=1e-4)
