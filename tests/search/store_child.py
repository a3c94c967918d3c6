"""Kills the writer of an index at every write, in turn, and goes on."""

import os
import signal
import stat
import sys

import numpy as np

from imsvd_jax.base import files
from imsvd_jax.search import store

LAYOUT = store.Layout(3, 2, 4, "weights")
CHUNKS = 3
ROWS = 5


def rows(chunk):
  numbers = np.arange(chunk * ROWS, (chunk + 1) * ROWS)
  digests = np.repeat(numbers, 16).reshape(ROWS, 16).astype(np.uint8)
  return store.Rows(
    vectors=np.repeat(numbers, 3).reshape(ROWS, 3),
    codes=np.stack([numbers % 4, numbers % 3], 1),
    contents=digests,
    keys=digests,
    stamps=digests,
    names=[b"x" * int(n) for n in numbers],
    thumbnails=[b"%d" % n for n in numbers],
  )


def write(folder):
  """Writes what is missing, as a build does."""
  with store.open_to_append(folder, LAYOUT) as writer:
    known = store.Store(folder).count
    assert known % ROWS == 0
    for chunk in range(known // ROWS, CHUNKS):
      writer.append(rows(chunk))


def write_and_die(folder, at):
  """Dies at write number `at`, which gets half of its bytes to the disk."""
  left, real = [at], os.fsync

  def fsync(descriptor):
    left[0] -= 1
    if not left[0]:
      found = os.fstat(descriptor)
      if stat.S_ISREG(found.st_mode):
        torn = found.st_size - found.st_size // 2 % 7
        os.truncate(f"/proc/self/fd/{descriptor}", torn)
      os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)

  os.fsync = files.os.fsync = fsync
  write(folder)
  os._exit(0)


def check(folder):
  found = store.Store(folder)
  numbers = np.arange(CHUNKS * ROWS)
  assert found.count == len(numbers)
  assert found.vectors[:, 0].tolist() == numbers.tolist()
  assert found.keys[:, 15].tolist() == numbers.tolist()
  assert [found.name(n) for n in numbers] == ["x" * n for n in numbers]
  assert [found.thumbnail(n) for n in numbers] == [b"%d" % n for n in numbers]


def main(top):
  at, status = 0, 1
  while status:
    at += 1
    folder = os.path.join(top, str(at))
    child = os.fork()
    if not child:
      write_and_die(folder, at)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    write(folder)
    check(folder)
  print(at - 1)


if __name__ == "__main__":
  main(sys.argv[1])
