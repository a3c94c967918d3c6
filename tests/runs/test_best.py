"""The best checkpoints of a run: kept, found again, named `best`."""

import json

import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import best, run_directory, weights
from tests.runs.checkpoint_child import make_state
from tests.runs.made_runs import open_run

BEST = {"keep_last": 1, "keep_best": 1}


def save(run, step, score=None):
  scores = {} if score is None else {"label_free": score}
  assert run.save(step, make_state(step), {"scores": scores})
  run.wait()


def steps_in(workdir):
  return run_directory.steps_on_disk(workdir / run_directory.CHECKPOINTS)


def test_the_best_step_is_kept_beside_the_newest(tmp_path):
  run = open_run(tmp_path, **BEST)
  for step, score in enumerate([3.0, 7.0, 5.0, None, 6.0], 1):
    save(run, step, score)
  assert steps_in(tmp_path) == [2, 5]
  assert best.find_step(tmp_path, "best") == 2
  save(run, 6, 8.0)
  assert steps_in(tmp_path) == [6]
  run.close()


def test_of_equal_scores_the_newest_is_kept(tmp_path):
  run = open_run(tmp_path, **BEST)
  for step in (1, 2, 3):
    save(run, step, 4.0)
  save(run, 4, 1.0)
  assert steps_in(tmp_path) == [3, 4]
  run.close()


def test_a_resumed_run_knows_the_best(tmp_path):
  run = open_run(tmp_path, **BEST)
  save(run, 1, 9.0)
  save(run, 2, 2.0)
  run.close()
  run = open_run(tmp_path, **BEST)
  assert run.improves({"label_free": 10.0})
  assert not run.improves({"label_free": 8.0})
  save(run, 3, 3.0)
  assert steps_in(tmp_path) == [1, 3]
  run.close()


def test_without_keep_best_nothing_improves(tmp_path):
  run = open_run(tmp_path, keep_last=1)
  assert not run.improves({"label_free": 1.0})
  save(run, 1, 9.0)
  save(run, 2, 2.0)
  assert steps_in(tmp_path) == [2]
  run.close()


def test_a_score_that_is_missing_or_not_finite_never_improves(tmp_path):
  run = open_run(tmp_path, **BEST)
  assert not run.improves({})
  assert not run.improves({"label_free": float("nan")})
  assert not run.improves({"online/knn": 1.0})
  run.close()


def test_the_old_best_stays_until_the_new_one_is_complete(
  tmp_path, monkeypatch
):
  run = open_run(tmp_path, **BEST)
  save(run, 1, 1.0)
  save(run, 2, 0.5)

  def incomplete(step):
    raise UserError(f"step {step} is not whole")

  monkeypatch.setattr(run, "_check_saved", incomplete)
  assert run.save(3, make_state(3), {"scores": {"label_free": 5.0}})
  with pytest.raises(UserError, match="not whole"):
    run.wait()
  assert {1, 2} <= set(steps_in(tmp_path))


def test_a_damaged_best_is_not_the_best(tmp_path):
  run = open_run(tmp_path, keep_last=3)
  for step, score in ((1, 5.0), (2, 9.0), (3, 4.0)):
    save(run, step, score)
  run.close()
  for path in (tmp_path / "checkpoints" / "2" / "meta").iterdir():
    path.write_text("{")
  assert best.find_step(tmp_path, "best") == 1


def test_without_scores_best_is_one_clear_line(tmp_path):
  run = open_run(tmp_path)
  save(run, 1)
  run.close()
  with pytest.raises(UserError, match="records the score 'label_free'"):
    weights.load_variables(tmp_path, "best")


@pytest.mark.parametrize("step", ["bst", "-1", "1.5", ""])
def test_a_step_is_a_number_or_best(tmp_path, step):
  with pytest.raises(UserError, match="expected a whole number, or 'best'"):
    best.find_step(tmp_path, step)


def test_a_number_may_be_text(tmp_path):
  assert best.find_step(tmp_path, "12") == 12
  assert best.find_step(tmp_path, 12) == 12
  assert best.find_step(tmp_path, None) is None


def test_the_score_to_keep_by_is_the_configs(tmp_path):
  config = {"checkpoint": {"keep_best_by": "online/knn"}}
  run = open_run(
    tmp_path, config=config, keep_last=3, keep_best_by="online/knn"
  )
  for step, knn in ((1, 0.9), (2, 0.4)):
    scores = {"label_free": step, "online/knn": knn}
    assert run.save(step, make_state(step), {"scores": scores})
  run.close()
  assert best.find_step(tmp_path, "best") == 1
  assert json.loads((tmp_path / "config.json").read_text()) == config
