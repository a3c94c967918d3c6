"""Damage is seen, and the newest good step is found."""

import logging
import pathlib
import re
import shutil
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import unfinished_io, verification
from tests.runs.checkpoint_child import make_state, same
from tests.runs.made_runs import files_of, open_run


@pytest.mark.parametrize(
  "dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]
)
def test_checksum_sees_each_element_and_their_order(dtype):
  values = np.arange(24).reshape(4, 6).astype(jnp.dtype(dtype))
  checksum = int(verification.checksum(values)[0])
  for index in np.ndindex(values.shape):
    changed = values.copy()
    changed[index] = not changed[index] if dtype == "bool" else 77
    assert int(verification.checksum(changed)[0]) != checksum, index
  swapped = values.copy()
  swapped[0, :2] = swapped[0, 1::-1]
  assert int(verification.checksum(swapped)[0]) != checksum


def test_checksum_tells_zero_from_minus_zero_and_nan_from_nan():
  words = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001], np.uint32)
  values = words.view(np.float32)
  assert len({int(verification.checksum(v[None])[0]) for v in values}) == 4


def test_checksum_does_not_depend_on_the_devices():
  values = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  sharded = jax.device_put(values, jax.NamedSharding(mesh, jax.P("data")))
  assert np.array_equal(
    verification.checksum(values), verification.checksum(sharded)
  )


@pytest.mark.parametrize(
  "dtype",
  ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "complex64"],
)
def test_host_and_device_agree_on_a_checksum(dtype):
  values = np.random.default_rng(0).normal(size=(5, 7, 3)) * 50
  for array in (values, values[1:3, ::2], values[0, 0, 0], values[:0]):
    array = np.asarray(array).astype(jnp.dtype(dtype))
    expected = int(verification.checksum(jnp.asarray(array))[0])
    assert verification.host_checksum(array) == expected


def flip(position):
  def damage(path):
    data = bytearray(path.read_bytes())
    data[min(int(position * len(data)), len(data) - 1)] ^= 0x10
    path.write_bytes(data)

  return damage


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
  "deleted": pathlib.Path.unlink,
  "truncated": truncate,
  "first byte": flip(0.0),
  "middle byte": flip(0.5),
  "last byte": flip(1.0),
}


def kind_of(path, step_directory):
  """The path without the random part of data files' names."""
  return re.sub("[0-9a-f]{32}", "*", str(path.relative_to(step_directory)))


# Where one leaf cannot be read, those of the others end as they may.
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_the_newest_step(saved, tmp_path, how):
  """Any file: the state that comes back is right, or it is the older one."""
  newest = saved / "checkpoints" / "2"
  restored_steps = {}
  for number, path in enumerate(files_of(newest)):
    copy = shutil.copytree(saved, tmp_path / str(number))
    name = path.relative_to(saved)
    DAMAGE[how](copy / name)
    run = open_run(copy)
    restored, step = run.restore(make_state(0))
    run.close()
    assert same(restored, make_state(step)), name
    restored_steps.setdefault(kind_of(path, newest), set()).add(step)
    shutil.rmtree(copy)
  # The fallback was really exercised, and not by every harmless file.
  assert restored_steps["meta/metadata"] == {1}
  assert restored_steps["state/manifest.ocdbt"] == {1}
  data = [kind for kind in restored_steps if kind.endswith("/d/*")]
  assert any(1 in restored_steps[kind] for kind in data)


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_to_all_steps(saved, tmp_path, how):
  """Each kind of file in every step: right, or an error and nothing lost."""
  root = saved / "checkpoints"
  kinds = {kind_of(path, root / "2") for path in files_of(root / "2")}
  refused = set()
  for number, kind in enumerate(sorted(kinds)):
    copy = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
    for step in (copy / "checkpoints").iterdir():
      for path in files_of(step):
        if kind_of(path, step) == kind:
          DAMAGE[how](path)
    before = files_of(copy)
    run = open_run(copy)
    try:
      restored, step = run.restore(make_state(0))
    except UserError as error:
      refused.add(kind)
      message = str(error)
    else:
      assert same(restored, make_state(step)), kind
      continue
    finally:
      run.close()
    assert "No usable checkpoint" in message
    assert files_of(copy) == before
  assert {"meta/metadata", "state/manifest.ocdbt"} <= refused


def test_readable_but_wrong_content_is_damage(run_copy, caplog):
  """Step 1's arrays under step 2's name: only the checksums can tell."""
  root = run_copy / "checkpoints"
  shutil.rmtree(root / "2" / "state")
  shutil.copytree(root / "1" / "state", root / "2" / "state")
  run = open_run(run_copy)
  with caplog.at_level(logging.ERROR):
    restored, step = run.restore(make_state(0))
  run.close()
  assert step == 1
  assert same(restored, make_state(1))
  assert "SKIPPING damaged checkpoint 2: the checksum is wrong" in caplog.text
  assert "params/backbone/kernel" in caplog.text
  assert "FALLING BACK to step 1" in caplog.text


def test_damaged_step_is_set_aside_and_can_be_written_again(run_copy):
  root = run_copy / "checkpoints"
  for already in ("damaged-2", "damaged-2-2"):
    (root / already).mkdir()
  (root / "2" / "state" / "_METADATA").unlink()
  run = open_run(run_copy, keep_last=1)
  _, step = run.restore(make_state(0))
  assert step == run.latest_step() == 1
  assert (root / "damaged-2-3" / "meta" / "metadata").exists()
  assert run.save(2, make_state(2))
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))


def test_steps_without_commit_marker_do_not_start_from_scratch(run_copy):
  for path in run_copy.rglob("commit_success.txt"):
    path.unlink()
  run = open_run(run_copy)
  restored, step = run.restore(make_state(0))
  run.close()
  assert step == 2
  assert same(restored, make_state(2))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda state: state.replace(params={"backbone": {"kernel": state.step}}),
      r"params/backbone/kernel is float32\[32, 64\] in the checkpoint,"
      r" int32\[\] here; params/projector/bias is bfloat16\[16\]",
    ),
    (
      lambda state: state.replace(target={"params": state.params}),
      r"target/params/backbone/kernel is absent in the checkpoint, float32",
    ),
  ],
)
def test_another_shape_is_not_damage(run_copy, change, message):
  before = files_of(run_copy)
  run = open_run(run_copy)
  with pytest.raises(UserError, match=message):
    run.restore(change(make_state(0)))
  run.close()
  assert files_of(run_copy) == before


def test_only_unfinished_reads_are_ignored(monkeypatch):
  shown = []
  monkeypatch.setattr(sys, "unraisablehook", shown.append)
  unfinished_io.ignore()
  unfinished_io.ignore()
  closed = SimpleNamespace(
    object=None, exc_value=RuntimeError("Event loop is closed")
  )
  other = SimpleNamespace(object=None, exc_value=RuntimeError("another"))
  for unraisable in (closed, other):
    sys.unraisablehook(unraisable)
  assert shown == [other]
