"""Helpers for nested configs."""

import json
from collections.abc import Mapping
from typing import Any

# Keys that change neither the state nor the data. A resumed run may change
# them, and runs that differ only in them are the same experiment.
HARMLESS_KEYS = (
  "allow_changes",
  "checkpoint",
  "data.max_pixels",  # Runs of earlier versions have none.
  "data.placement",  # Likewise.
  "eval",
  "log",
  "init_from",
  "not_finite",
  "sharding",
  "stop",
)

# Keys that recipes of earlier versions lack, and what those versions did, as
# JSON stores it.
ADDED_KEYS: dict[str, Any] = {
  "accumulate_steps": 1,
  "data.antialias": False,
  "data.train_interpolation": "",
  "data.background": -1,
  "data.exif": False,
  "data.holdout": 0.0,
  "data.holdout_seed": 0,
  "data.image_key": "",
  "data.label_key": "",
  "data.labels": "",
  "data.max_pixels": 178_956_970,
  "data.value_range": "",
  "model.init": "fan_out_normal",
  "model.patch_size": 0,
  "model.pool": "token",
  "model.pool_grid": 1,
  "model.registers": 0,
  "model.layer_scale": 0.0,
  "model.drop_path": 0.0,
  "model.projector_last_bias": False,
  "optimizer.schedule": "cosine",
  "sharding.state": "replicated",
  "views.resolution_schedule": [],
}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns {"data.name": "digits", ...}.

  Args:
    config: Nested dicts or ConfigDicts. An empty one counts as a value, so
      that removing it is a change.
  """
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if hasattr(value, "items") and value:
      flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def as_json(config: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the config as JSON stores it, where a tuple is a list."""
  return json.loads(json.dumps(config))
