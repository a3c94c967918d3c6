"""One level out of many."""

from ml_collections import ConfigDict

from imsvd_jax.base.config import flatten

NESTED = {"seed": 1, "data": {"name": "digits", "crops": {"size": (8, 8)}}}
FLAT = {"seed": 1, "data.name": "digits", "data.crops.size": (8, 8)}


def test_every_leaf_has_its_path():
  assert flatten(NESTED) == FLAT
  assert flatten(ConfigDict(NESTED)) == FLAT


def test_an_empty_level_is_not_lost():
  assert flatten({"a": {"b": {}}, "c": {}}) == {"a.b": {}, "c": {}}
