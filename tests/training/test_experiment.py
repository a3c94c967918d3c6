"""A config is checked in one place, before anything is compiled or written."""

import fnmatch

import pytest
from ml_collections import ConfigDict

from configs import common
from imsvd_jax.base.config import ADDED_KEYS, as_json, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.objectives import OBJECTIVES
from imsvd_jax.training import experiment
from tests.train_child import small_config

_SCHEDULE = "views.resolution_schedule"


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"batch_size": 1}, "batch_size=1; expected 2 or more"),
    ({"batch_size": 12}, r"batch_size=12 .*8 devices.* such as 8 or 16"),
    ({"eval.batch_size": 12}, r"eval\.batch_size=12 .*8 devices"),
    ({"epochs": 0.0}, r"epochs=0\.0; expected more than 0"),
    ({"data.std": (0.5, 0.0, 0.5)}, r"data\.std=.*finite numbers more than 0"),
    ({"data.mean": (float("nan"),)}, r"data\.mean=.*expected finite numbers"),
    ({"data.holdout": 1.0}, r"data\.holdout=1\.0; expected 0 to 0\.9"),
    ({"epochs": float("nan")}, "epochs=nan; expected more than 0"),
    ({"epochs": float("inf")}, "epochs=inf; expected more than 0"),
    ({"target_momentum": 1.5}, r"target_momentum=1\.5; expected 0 to 1"),
    ({"optimizer.weight_decay": -1.0}, r"weight_decay=-1\.0; expected 0 or"),
    ({"views.view1.blur_prob": 1.5}, r"view1\.blur_prob=1\.5; expected 0 to 1"),
    ({"views.local.flip_prob": -0.1}, r"local\.flip_prob=-0\.1; expected 0 to"),
    ({"views.view2.hue": 0.6}, r"view2\.hue=0\.6; expected 0 to 0\.5"),
    ({"views.num_local": -1}, "num_local=-1; expected 0 or more"),
    ({"views.view1.size": 16}, None),
    ({"views.view1.size": 8}, r"view1\.size=8 differs from .*size=16"),
    ({"accumulate_steps": 0}, "accumulate_steps=0; expected 1 or more"),
    ({"accumulate_steps": 2}, None),
    ({"accumulate_steps": 3}, "accumulate_steps=3 micro-batches.* as 24"),
    ({"accumulate_steps": 4}, "over 8 device.* multiple of 32"),
    ({_SCHEDULE: ((0, 8), (1.5, 16))}, None),
    ({_SCHEDULE: ((1, 8), (2, 16))}, "the first epoch is 0"),
    ({_SCHEDULE: ((0, 8), (3, 16))}, r"less than epochs=3"),
    ({_SCHEDULE: ((0, 8), (1, 12))}, r"the last size is views\.view1\.size=16"),
    ({_SCHEDULE: ((0, 12), (1, 8), (2, 16))}, "both grow"),
    ({_SCHEDULE: ((0, 8), (2, 12), (1, 16))}, "both grow"),
    ({_SCHEDULE: tuple((i / 2, 12 + i) for i in range(5))}, "up to 4 pairs"),
    ({_SCHEDULE: (0, 16)}, "pairs of"),
    ({_SCHEDULE: ((0, 16, 3),)}, "pairs of"),
    ({_SCHEDULE: ((0, 0), (1, 16))}, "expected"),
    ({_SCHEDULE: ((0, 7.5), (1, 16))}, "expected"),
    ({_SCHEDULE: (("0", 8), (1, 16))}, "expected"),
    ({_SCHEDULE: ((float("nan"), 8), (1, 16))}, "expected"),
    ({"views.view1.crop_scale": (0.5, 1.5)}, "more than 0, at most 1"),
    ({"views.view1.crop_scale": (0.9, 0.5)}, "smallest first"),
    ({"views.view1.crop_scale": (0.5,)}, r"crop_scale is \(0\.5,\)"),
    ({"views.view2.crop_ratio": (0.0, 1.0)}, "crop_ratio is .*more than 0"),
    ({"views.view2.blur_sigma": (-1.0, 1.0)}, "blur_sigma is .*0 or more"),
    ({"data.mean": (0.5, 0.5)}, "data.mean has 2 values"),
    ({"data.crop": 20}, r"data\.crop is 20, larger than data\.resize, 16"),
    ({"model.projector": (32, 60)}, "60.*num_bins.*8"),
    ({"model.init": "torch"}, "init 'torch'.*Known: fan_out_normal"),
    ({"model.dtype": "float16"}, "dtype 'float16'.*bfloat16"),
    ({"log.every_steps": 0}, r"log\.every_steps=0; expected 1 or more"),
    ({"checkpoint.every_steps": -1}, r"checkpoint\.every_steps=-1"),
    ({"checkpoint.every_minutes": -1.0}, r"checkpoint\.every_minutes=-1"),
    ({"checkpoint.keep_last": 0}, r"keep_last=0; expected 1 or more"),
    ({"checkpoint.keep_every": -1}, r"keep_every=-1; expected 0 or more"),
    ({"eval.every_epochs": -1.0}, r"eval\.every_epochs=-1"),
    ({"sharding.state": "fsdp"}, r"sharding\.state='fsdp'; expected one of"),
    ({"not_finite.policy": "ignore"}, r"policy='ignore'; expected 'skip' or"),
    ({"not_finite.max_in_a_row": -1}, r"max_in_a_row=-1; expected 0 or"),
  ],
  ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_values_are_one_clear_line(overrides, message):
  config = small_config(**overrides)
  if message is None:
    experiment.check(config, 8)
    return
  with pytest.raises(UserError, match=message) as error:
    experiment.check(config, 8)
  assert "\n" not in str(error.value)


def test_a_run_of_an_earlier_version_has_the_defaults():
  """What an added key was before is its default now, as a run stores it."""
  defaults = as_json(flatten(common.base()))
  assert {key: defaults[key] for key in ADDED_KEYS} == ADDED_KEYS


def test_every_number_of_a_recipe_has_limits():
  limits = [*experiment._LIMITS, *experiment._RANGES]
  unlimited = {
    key
    for key, value in flatten(common.base()).items()
    if not isinstance(value, str | bool)
    and not any(fnmatch.fnmatchcase(key, pattern) for pattern in limits)
  }
  # The objective checks its own.
  unlimited = {k for k in unlimited if not k.startswith("objective.")}
  checked_otherwise = {"model.projector", "data.mean", "data.std", _SCHEDULE}
  assert unlimited == {"seed", "allow_changes", *checked_otherwise}


def test_a_recipe_of_an_earlier_version_makes_the_network_of_then():
  config = small_config()
  old = config.model.to_dict()
  for key in ("init", "projector_last_bias"):
    del old[key]
  imsvd = OBJECTIVES["imsvd"]
  new = experiment.make_model(config.model, imsvd)
  assert experiment.make_model(ConfigDict(old), imsvd) == new
