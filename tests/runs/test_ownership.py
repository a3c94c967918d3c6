"""Which runs may name the data to be read: this user's own."""

import json
import stat

import pytest
from ml_collections import ConfigDict

from configs import common
from imsvd_jax import data
from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import ownership


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
  return tmp_path / "state"


@pytest.fixture
def config():
  config = common.base()
  config.data.name, config.data.path = "folder", "/photos"
  return config


@pytest.fixture
def run(tmp_path, config):
  """A run that this user trained."""
  folder = tmp_path / "run"
  folder.mkdir()
  ownership.sign(folder, config)
  return folder


def check(run, config, trusted=False):
  ownership.check_data(run, config, trusted=trusted)


def refuse(run, config, reason):
  with pytest.raises(UserError, match=reason) as raised:
    check(run, config)
  message = str(raised.value)
  assert "folder in /" in message
  assert "--data=NAME=PATH" in message
  assert "--trust_workdir" in message
  assert "\n" not in message
  check(run, config, trusted=True)


def test_ones_own_run_needs_no_confirmation(run, config, state):
  check(run, config)
  # As a checkpoint stores it, and where the run has moved to.
  stored = ConfigDict(json.loads(json.dumps(config.to_dict())))
  moved = run.rename(run.with_name("moved"))
  check(moved, stored)
  key = state / "imsvd_jax" / "key"
  assert stat.S_IMODE(key.stat().st_mode) == 0o600
  assert [p.name for p in key.parent.iterdir()] == ["key"]


def test_another_path_is_another_signature(run, config):
  signed = config.copy_and_resolve_references()
  config.data.path = "/secrets"
  refuse(run, config, "not signed with your key")
  ownership.sign(run, config)  # As a resumed run with another path does.
  check(run, config)
  check(run, signed)  # For its earlier checkpoints.


def test_a_strangers_run_is_refused(run, config, state):
  (state / "imsvd_jax" / "key").write_bytes(b"x" * 32)
  refuse(run, config, "not signed with your key")
  (state / "imsvd_jax" / "key").unlink()
  refuse(run, config, "your key cannot be read")


@pytest.mark.parametrize("content", ["", "{", "5", "{}", '{"signatures": 5}'])
def test_a_damaged_file_is_no_signature(run, config, content):
  (run / ownership.OWNER_FILE).write_text(content)
  refuse(run, config, "not signed with your key")
  ownership.sign(run, config)
  check(run, config)


def test_a_file_of_weights_is_a_strangers(tmp_path, config):
  (tmp_path / "encoder.npz").write_bytes(b"")
  refuse(tmp_path / "encoder.npz", config, "it is a file of weights")


def test_without_a_home_a_run_is_not_signed(
  tmp_path, config, monkeypatch, state
):
  state.write_text("a file, not a folder")
  said = []
  monkeypatch.setattr(console, "say", said.append)
  ownership.sign(tmp_path, config)
  (line,) = said
  assert line.startswith("This run is not signed as yours")
  refuse(tmp_path, config, "your key cannot be read")


def test_images_that_are_generated_need_no_signature(tmp_path, config, state):
  for name in data.SOURCES:
    config.data.name = name
    if name in ownership.GENERATED:
      ownership.sign(tmp_path, config)
      check(tmp_path, config)
    else:
      with pytest.raises(UserError):
        check(tmp_path, config)
  assert set(data.SOURCES) - set(ownership.GENERATED) == {
    "arrays",
    "folder",
    "pack",
    "tar",
    "tfds",
  }
  assert not state.exists()
