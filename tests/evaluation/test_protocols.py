"""Hyper-parameters from the command line, by name and type."""

import dataclasses

import pytest

from configs import digits
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import protocols

NAMES = "linear/imsvd linear/cifar linear/lbfgs linear/probe knn/dino"
CHOSEN = protocols.choose([*NAMES.split(), "finetune/1pct"])
OWN = protocols.Crops(size=16, scale=(0.4, 1.0), test_resize=18)


def with_settings(*settings, run_crops=OWN):
  return protocols.with_settings(CHOSEN, settings, run_crops=run_crops)


def test_a_setting_is_for_every_protocol_that_has_it():
  found = with_settings("epochs=3", "num_neighbors=5,1", "temperatures=1")
  assert [found[n].epochs for n in ("linear/imsvd", "linear/cifar")] == [3, 3]
  assert found["knn/dino"].num_neighbors == (5, 1)
  assert found["knn/dino"].temperatures == (1.0,)
  assert CHOSEN["linear/imsvd"].epochs == 100


def test_a_setting_for_one_protocol():
  found = with_settings("linear/cifar:milestones=1,2")
  assert found["linear/cifar"].milestones == (1, 2)
  assert found["linear/imsvd"] == CHOSEN["linear/imsvd"]


def test_crops_one_by_one_or_the_runs_own():
  found = with_settings("crops.size=20")["linear/imsvd"].crops
  assert (found.size, found.test_resize) == (20, 256)
  found = with_settings("crops=run", "crops.flip_probability=0")
  assert found["linear/imsvd"].crops == protocols.Crops(
    size=16, scale=(0.4, 1.0), test_resize=18, flip_probability=0.0
  )
  with pytest.raises(UserError, match="do not say with what crops"):
    with_settings("crops=run", run_crops=None)


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ("epochs", "is not KEY=VALUE"),
    ("=3", "is not KEY=VALUE"),
    ("epoch=3", "have no 'epoch'. Did you mean 'epochs'"),
    ("knn/dino:epochs=3", "knn/dino has no 'epochs'"),
    ("knn/x:epochs=3", "Unknown protocol in --set 'knn/x'"),
    ("epochs=ten", "epochs='ten'; expected a value like '100'"),
    ("epochs=0", "epochs='0'; expected a whole number from 1"),
    ("milestones=0", "milestones='0'; expected whole numbers from 1"),
    ("metric=top2", "metric='top2'; expected one of top1, mean_per_class"),
    ("epochs=1.5", "epochs='1.5'; expected"),
    ("scale_by_batch=1", "scale_by_batch='1'; expected"),
    ("num_neighbors=a,b", "num_neighbors='a,b'; expected"),
    ("crops=3", r"crops='3'; expected 'run', or one of crops\.size"),
    ("crops.side=3", "crops have no 'side'"),
    ("optimizer=adam", "optimizer='adam'; expected one of sgd, lars"),
    ("schedule=linear", "schedule='linear'; expected one of cosine, steps"),
    ("inverse_penalties=-1.0", "inverse_penalties='-1'; expected numbers ab"),
    ("inverse_penalties=()", "inverse_penalties=''; expected numbers above 0"),
    ("inverse_penalties=1,1e999", "inverse_penalties='1,inf'; expected"),
    ("held_out=2.0", "held_out='2'; expected a number above 0 and below 1"),
    ("held_out=0.0", "held_out='0'; expected a number above 0 and below 1"),
    ("learning_rates=-1.0", "learning_rates='-1'; expected numbers above 0"),
    ("learning_rate=-1", "learning_rate='-1'; expected a number above 0"),
    ("momentum=1", "momentum='1'; expected from 0 and below 1"),
    ("weight_decay=-1", "weight_decay='-1'; expected 0 or more"),
    ("temperatures=0", "temperatures='0'; expected numbers above 0"),
    ("num_neighbors=0", "num_neighbors='0'; expected whole numbers from 1"),
    ("fraction=2", "fraction='2'; expected a number above 0, at most 1"),
    ("crops.scale=0.5", "scale='0.5'; expected two parts of the area"),
    ("crops.ratio=2,1", "ratio='2,1'; expected two numbers above 0"),
    ("crops.flip_probability=2", "flip_probability='2'; expected from 0 to 1"),
    ("linear/probe:seed=-1", "seed='-1'; expected from 0 to 2"),
  ],
)
def test_a_mistake_is_one_clear_line(setting, message):
  with pytest.raises(UserError, match=message) as error:
    with_settings(setting)
  assert "\n" not in str(error.value)


def test_a_hyper_parameter_without_a_limit_is_an_error():
  @dataclasses.dataclass(frozen=True)
  class Mine(protocols.Settings):
    size: int = 3

  with pytest.raises(TypeError, match=r"Mine\.size has no limit"):
    Mine()


def test_a_suite_is_all_of_its_protocols():
  chosen = protocols.choose(["transfer", "knn/imsvd"], seed=3)
  assert list(chosen) == [*protocols.SUITES["transfer"], "knn/imsvd"]
  assert chosen["transfer/dtd"].seed == 3
  assert chosen["transfer/dtd"].data_set == "dtd"


def test_a_training_run_measures_by_its_own_settings():
  settings = digits.get_config().eval
  settings.num_neighbors, settings.temperature = 5, 0.5
  settings.linear_epochs, settings.collapse_images = 3, 80
  online, final = protocols.online(settings), protocols.final(settings)
  assert list(online) == ["knn/online", "linear/online", "collapse/online"]
  assert online["knn/online"] == final["knn/final"]
  assert final["knn/final"] == protocols.Knn((5,), (0.5,))
  assert online["linear/online"].epochs == 3
  collapse = online["collapse/online"]
  assert (collapse.max_images, collapse.lidar_groups) == (80, 10)
  assert list(final) == list(protocols.FINAL)
  settings.linear_epochs = settings.collapse_images = 0
  assert list(protocols.online(settings)) == ["knn/online"]


def test_the_description_has_every_hyper_parameter():
  text = "\n".join(protocols.describe(protocols.PROTOCOLS))
  assert all(len(line) <= 80 for line in text.splitlines())
  words = text.split()
  for name in protocols.PROTOCOLS:
    assert name in words
  assert "crops.test_resize=36" in words
  assert "num_neighbors=20,10,100,200" in words
