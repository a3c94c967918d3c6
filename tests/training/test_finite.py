"""Updates that are not finite: discarded, counted, reported."""

import jax
import numpy as np
import pytest

from imsvd_jax.base.errors import EXIT_NOT_FINITE, Stopped
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import finite
from imsvd_jax.training import step as step_lib
from imsvd_jax.training.finite import Skips
from tests import breaking_objective
from tests.breaking_objective import NAN_GRADIENT, NAN_LOSS


def test_an_update_that_is_not_finite_changes_nothing(monkeypatch):
  experiment = experiment_lib.build(breaking_objective.config(monkeypatch), 48)
  rng = np.random.default_rng(0)
  batch = {
    "views": (rng.integers(0, 256, (16, 2, 16, 16, 3), np.uint8),),
    "index": np.arange(16, dtype=np.int32),
    "epoch": np.zeros(16, np.int32),
  }
  step = jax.jit(lambda state: step_lib.train_step(experiment, state, batch))
  state = step_lib.init_state(experiment)
  rates = []
  for number in range(1, 10):
    before = state
    state, values = step(state)
    rates.append(float(values["learning_rate"]))
    assert int(state.step) == number
    same = [
      np.array_equal(a, b)
      for field in ("params", "batch_stats", "opt_state")
      for a, b in zip(
        jax.tree.leaves(getattr(before, field)),
        jax.tree.leaves(getattr(state, field)),
        strict=True,
      )
    ]
    skipped = number in NAN_LOSS + NAN_GRADIENT
    assert all(same) if skipped else not any(same[:3]), number
    assert np.isfinite(values["loss"]) == (number not in NAN_LOSS)
    assert np.isfinite(values["gradient_norm"]) == (not skipped)
  names = finite.checked_names(values)
  bits = sum(1 << names.index(n) for n in ("loss", "gradient_norm", "variance"))
  assert jax.tree.map(int, state.skips) == Skips(3, 0, 2, 5, 8, bits)
  # The schedule waits for the optimizer.
  assert rates[5] == rates[6] == rates[4]
  assert rates[7] != rates[6]


NAMES = ["gradient_norm", "loss", "variance"]


def test_skips_are_reported_once(capsys):
  limit = finite.SkipLimit("skip", 2, seen=1)
  limit.check(Skips(1, 0, 1, 5, 5, 0b010), NAMES)
  assert not capsys.readouterr().err
  limit.check(Skips(3, 2, 2, 5, 8, 0b011), NAMES)
  said = capsys.readouterr().err
  assert "WARNING: 2 update(s) were not finite" in said
  assert "3 so far, between steps 5 and 8; not finite: gradient_norm, loss" in (
    said
  )
  limit.check(Skips(3, 0, 2, 5, 8, 0b011), NAMES)
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  ("policy", "reason"),
  [
    ("stop", "not_finite.policy is 'stop'"),
    ("skip", "3 in a row, not_finite.max_in_a_row=2"),
  ],
)
def test_too_many_skips_stop_the_run(policy, reason, capsys):
  limit = finite.SkipLimit(policy, 2, seen=0)
  with pytest.raises(Stopped) as stopped:
    limit.check(Skips(3, 0, 3, 5, 7, 0b111), NAMES)
  assert stopped.value.code == EXIT_NOT_FINITE
  assert reason in capsys.readouterr().err
