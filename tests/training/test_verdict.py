"""The verdict on a run, from the numbers of its metrics alone."""

import math

import numpy as np
import pytest

from imsvd_jax.training import verdict

GOOD = {
  "embedding_std": 0.9,
  "information": 0.7,
  "marginal_entropy_mean": 0.98,
  "dead_bins": 0.0,
  "max_probability": 0.8,
}
ONLINE = {
  "online/collapse/rank_me/embeddings": 20.0,
  "online/collapse/uniformity": -2.0,
  "online/collapse/alignment": 0.2,
  "online/collapse/codes/kappa": 0.8,
}


def run_of(losses, every=10, rate=0.1, **numbers):
  return [
    {"step": every * i, "loss": float(x), "learning_rate": rate}
    | GOOD
    | numbers
    for i, x in enumerate(losses, 1)
  ]


def falling(count, decay):
  noise = 0.01 * np.random.default_rng(0).standard_normal(count)
  return -6 + 3 * np.exp(-decay * np.arange(count) / count) + noise


@pytest.mark.parametrize(
  ("decay", "state"),
  [(2.0, "learning"), (3.5, "slowing"), (40.0, "converged")],
)
def test_how_fast_the_loss_still_moves_is_the_progress(decay, state):
  found = verdict.judge(run_of(falling(100, decay)))
  assert found.state == state
  assert found.kind == ""
  assert set(found.numbers) == {"loss", "moved in the last fifth"}


def test_a_run_warms_up_while_it_is_short_or_the_rate_rises():
  assert verdict.judge([]) is None
  short = verdict.judge(run_of(falling(5, 2)))
  assert short.state == "warming up"
  at_end = verdict.at_end(short)
  assert at_end.state == "too short to judge"
  assert "needs 50 steps and 10 logged ones" in str(at_end)
  lines = run_of(falling(100, 2))
  lines[-1]["learning_rate"] = 0.2
  assert verdict.judge(lines).state == "warming up"


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_neither_progress_nor_the_end(seed):
  noise = np.random.default_rng(seed).standard_normal(60)
  found = verdict.judge(run_of(3 + 0.01 * noise))
  assert found.state == "warming up"
  assert "learning_rate" in found.advice


@pytest.mark.parametrize(
  ("numbers", "kind"),
  [
    ({"embedding_std": 0.01}, "constant"),
    ({"information": 0.001}, "constant"),
    ({"marginal_entropy_mean": 0.3}, "dead bins"),
    ({"dead_bins": 0.8}, "dead bins"),
  ],
)
def test_a_collapse_shows_in_the_numbers_of_a_step(numbers, kind):
  found = verdict.judge(run_of(falling(20, 2), **numbers))
  assert (found.state, found.kind) == ("collapsing", kind)
  assert found.is_bad
  assert found.advice
  assert next(iter(numbers.values())) in found.numbers.values()
  early = verdict.judge(run_of(falling(4, 2), **numbers))
  assert not early.is_bad  # A random network may look like this.


@pytest.mark.parametrize(
  ("numbers", "kind"),
  [
    ({"online/collapse/rank_me/embeddings": 1.2}, "dimensional"),
    ({"online/collapse/alignment": 1.9}, "views disagree"),
    ({"online/collapse/codes/kappa": 0.0}, "views disagree"),
  ],
)
def test_a_collapse_shows_in_an_evaluation(numbers, kind):
  lines = [{"step": 0} | ONLINE, *run_of(falling(20, 2))]
  assert not verdict.judge([*lines, {"step": 200} | ONLINE]).is_bad
  found = verdict.judge([*lines, {"step": 200} | ONLINE | numbers])
  assert (found.state, found.kind) == ("collapsing", kind)


def test_embeddings_that_come_closer_and_closer_collapse():
  lines, found = run_of(falling(20, 2)), []
  for i, uniformity in enumerate((-2.0, -1.5, -0.9, -1.1, -0.9, -0.8)):
    numbers = {
      "online/collapse/uniformity": uniformity,
      "online/collapse/alignment": 0.3,
    }
    lines.append({"step": 200 + i} | ONLINE | numbers)
    found.append(verdict.judge(lines).name)
  # Once below half of the best is no collapse.
  assert [name == "collapsing (constant)" for name in found] == [False] * 5 + [
    True
  ]


def test_a_spread_of_views_that_disagree_is_nothing_to_lose():
  lines = run_of(falling(20, 2))
  for uniformity, alignment in ((-3.5, 1.4), (-1.5, 0.3), (-1.5, 0.3)):
    numbers = {
      "online/collapse/uniformity": uniformity,
      "online/collapse/alignment": alignment,
    }
    lines.append({"step": 200} | ONLINE | numbers)
  assert not verdict.judge(lines).is_bad


@pytest.mark.parametrize("last", [math.nan, math.inf, 1e5])
def test_a_loss_that_is_not_finite_or_blows_up_diverges(last):
  losses = [*falling(20, 2), last, last]
  found = verdict.judge(run_of(losses))
  assert found.state == "diverged"
  assert "base_learning_rate" in found.advice


def test_one_high_loss_is_no_divergence():
  assert not verdict.judge(run_of([*falling(20, 2), 50.0])).is_bad
  assert not verdict.judge(run_of([*falling(20, 2), 50.0, -5.0])).is_bad


def test_scores_are_those_of_the_latest_step():
  lines = run_of(falling(20, 2))
  assert verdict.scores(lines) == {}
  lines.append({"step": 200, "online/knn": 0.5} | ONLINE)
  assert verdict.scores(lines) == {"label_free": 1.6, "online/knn": 0.5}
  lines.append({"step": 210, "loss": -5.0} | GOOD)
  assert verdict.scores(lines) == {}


def test_a_collapsed_state_has_no_label_free_score():
  lines = run_of(falling(20, 2), embedding_std=0.01)
  lines.append({"step": 200, "online/knn": 0.5} | ONLINE)
  assert verdict.scores(lines) == {"online/knn": 0.5}


def test_a_score_that_is_not_finite_is_none():
  lines = [*run_of(falling(20, 2)), {"step": 200, "online/knn": math.nan}]
  assert verdict.scores(lines) == {}


def test_while_the_rate_rises_an_evaluation_proves_no_collapse():
  lines = [{"step": 0} | ONLINE, *run_of(falling(20, 2))]
  lines[-1]["learning_rate"] = 0.2
  lines.append({"step": 200} | ONLINE | {"online/collapse/codes/kappa": 0.0})
  assert verdict.judge(lines).state == "warming up"
