"""One owner of a run's directory."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import lock
from tests.runs import fake_bucket

OWNER = (
  "import sys, time\n"
  "from imsvd_jax.runs import lock\n"
  "with lock.owned(sys.argv[1]):\n"
  "  print('owned', flush=True)\n"
  "  time.sleep(1000)\n"
)


@pytest.fixture
def other(tmp_path):
  """Another process that owns the run in tmp_path."""
  command = [sys.executable, "-c", OWNER, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "owned\n"
    yield process
    process.kill()


def snapshot(folder):
  return {
    path: (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
    for path in folder.rglob("*")
  } | {folder: os.stat(folder).st_mtime_ns}


def take(folder):
  with lock.owned(str(folder)):
    pass


def test_the_loser_says_who_owns_the_run_and_changes_nothing(other, tmp_path):
  before = snapshot(tmp_path)
  with pytest.raises(UserError, match="in use by another run") as error:
    take(tmp_path)
  assert "\n" not in str(error.value)
  assert f"process {other.pid} on {os.uname().nodename}" in str(error.value)
  assert snapshot(tmp_path) == before
  other.send_signal(signal.SIGKILL)
  other.wait()
  take(tmp_path)  # The kernel has released it.


def test_it_is_released_whatever_happens_and_held_only_once(tmp_path):
  def fail():
    with lock.owned(str(tmp_path)):
      with pytest.raises(UserError, match="in use by another run"):
        take(tmp_path)
      raise KeyError

  with pytest.raises(KeyError):
    fail()
  take(tmp_path)


def test_a_lock_file_that_says_nothing_is_no_traceback(tmp_path):
  for content in (b"", b"\xff", b"5", b"[" * 99999, b'{"pid": []}'):
    (tmp_path / lock.LOCK_FILE).write_bytes(content)
    take(tmp_path)
  with lock.owned(str(tmp_path)):
    (tmp_path / lock.LOCK_FILE).write_bytes(b"\xff")
    with pytest.raises(UserError, match="process unknown on unknown"):
      take(tmp_path)


def test_a_lock_that_cannot_be_taken_is_one_line(tmp_path, monkeypatch):
  def fails(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(lock.fcntl, "flock", fails)
  with pytest.raises(UserError, match="Input/output error") as error:
    take(tmp_path)
  assert "\n" not in str(error.value)


def test_without_locks_a_living_owner_on_this_machine_counts(
  other, tmp_path, monkeypatch
):
  def unsupported(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(lock.fcntl, "flock", unsupported)
  before = snapshot(tmp_path)
  with pytest.raises(UserError, match=f"process {other.pid} on"):
    take(tmp_path)
  assert snapshot(tmp_path) == before
  other.kill()
  other.wait()
  take(tmp_path)


def test_a_removed_lock_is_taken_again(tmp_path):
  with lock.owned(str(tmp_path)) as own:
    (tmp_path / lock.LOCK_FILE).unlink()
    own.check()
    with pytest.raises(UserError, match="in use by another run"):
      take(tmp_path)
  with lock.owned(str(tmp_path)) as own:
    (tmp_path / lock.LOCK_FILE).unlink()
    with lock.owned(str(tmp_path)), pytest.raises(UserError, match="taken ov"):
      own.check()


def test_in_a_bucket_the_newest_start_owns_the_run(tmp_path, monkeypatch):
  fake_bucket.install(monkeypatch, tmp_path / "buckets")
  with lock.owned("gs://bucket/run") as old:
    old.check()
    with lock.owned("gs://bucket/run") as new:
      new.check()
      with pytest.raises(UserError, match="has taken over gs://") as error:
        old.check()
  assert "\n" not in str(error.value)
  stored = json.loads((tmp_path / "buckets/bucket/run/lock").read_text())
  assert stored["pid"] == os.getpid()
