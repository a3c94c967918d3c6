"""Starts of the trainer that share their imports, for tests/soak/chaos.py.

A process that has imported everything forks for each start: imports take most
of a short run's time, and no fault there can cost anything. It has not touched
a device by then, and has no threads.
"""

import ctypes
import json
import os
import pathlib
import selectors
import signal
import subprocess
import sys
import threading

ROOT = pathlib.Path(__file__).parents[2]


class Starts:
  """The forking process, seen from the soak."""

  def __init__(self, environ: dict[str, str]) -> None:
    self._process = subprocess.Popen(
      [sys.executable, "-m", "tests.soak.zygote"],
      cwd=ROOT,
      env=environ,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._lock = threading.Lock()
    self._changed = threading.Condition()
    self._pids: dict[int, int] = {}
    self._codes: dict[int, int] = {}
    self._count = 0
    threading.Thread(target=self._listen, daemon=True).start()

  def start(
    self, argv: list[str], environ: dict[str, str], log: pathlib.Path
  ) -> "Start":
    """Starts the trainer with further environment variables."""
    with self._lock:
      self._count += 1
      number = self._count
      line = json.dumps([number, argv, environ, str(log)])
      self._process.stdin.write(f"{line}\n")
      self._process.stdin.flush()
    with self._changed:
      self._changed.wait_for(lambda: number in self._pids)
    return Start(self, number, self._pids[number], log)

  def code(self, number: int, timeout: float | None = None) -> int | None:
    """Returns an exit code as `subprocess` does; None after the time."""
    with self._changed:
      self._changed.wait_for(lambda: number in self._codes, timeout)
      return self._codes.get(number)

  def close(self) -> None:
    self._process.kill()

  def _listen(self) -> None:
    for line in self._process.stdout:
      kind, number, value = json.loads(line)
      with self._changed:
        (self._pids if kind == "pid" else self._codes)[number] = value
        self._changed.notify_all()


class Start:
  """One start of the trainer; `log` is the file that it prints to."""

  def __init__(
    self, starts: Starts, number: int, pid: int, log: pathlib.Path
  ) -> None:
    self._starts, self._number, self._pid = starts, number, pid
    self.log = log

  def poll(self) -> int | None:
    return self._starts.code(self._number, 0)

  def wait(self, timeout: float | None = None) -> int:
    code = self._starts.code(self._number, timeout)
    if code is None:
      raise subprocess.TimeoutExpired("trainer", timeout)
    return code

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self._pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


# --- The forking process ------------------------------------------------------


def _serve() -> None:
  """Forks for each line of standard input; reports pids and codes."""
  reports = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # What else is printed must not look like a report.
  numbers: dict[int, int] = {}
  reads, writes = os.pipe()
  os.set_blocking(writes, False)
  signal.signal(signal.SIGCHLD, lambda *_: None)
  signal.set_wakeup_fd(writes)
  requests = os.fdopen(0, "rb", buffering=0)
  selector = selectors.DefaultSelector()
  selector.register(requests, selectors.EVENT_READ)
  selector.register(reads, selectors.EVENT_READ)
  pending = b""
  while True:
    for key, _ in selector.select():
      if key.fileobj == reads:
        os.read(reads, 4096)
        continue
      received = requests.read(65536)
      if not received:
        return
      *lines, pending = (pending + received).split(b"\n")
      for line in lines:
        number, argv, environ, log = json.loads(line)
        pid = os.fork()
        if not pid:
          signal.set_wakeup_fd(-1)
          signal.signal(signal.SIGCHLD, signal.SIG_DFL)
          _become(argv, environ, log)
        numbers[pid] = number
        print(json.dumps(["pid", number, pid]), file=reports)
    while numbers:
      pid, status = os.waitpid(-1, os.WNOHANG)
      if not pid:
        break
      code = os.waitstatus_to_exitcode(status)
      print(json.dumps(["code", numbers.pop(pid), code]), file=reports)


def _become(argv: list[str], environ: dict[str, str], log: str) -> None:
  """Turns the forked process into the trainer."""
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
  null = os.open(os.devnull, os.O_RDONLY)
  os.dup2(null, 0)
  os.dup2(file, 1)
  os.dup2(file, 2)
  os.environ.update(environ)
  ctypes.CDLL(None).faults_start()
  sys.argv = ["imsvd_jax.main", *argv]
  # Late: flags look at sys.argv when they are defined.
  from imsvd_jax import main

  main.run()
  os._exit(1)  # `run` does not return.


if __name__ == "__main__":
  import imsvd_jax.train

  del imsvd_jax
  _serve()
