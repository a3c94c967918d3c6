"""Runs of the trainer under random faults, each compared with a quiet run.

  python -m tests.soak.chaos TRIALS [--jobs=2] [--first=0] [--minutes=60]

Trial i is drawn from the seed i: one process, or two in every fourth trial; one
to three starts with a fault each, then starts without until the run is
finished. The faults: kill -9, SIGTERM, SIGINT, SIGSTOP, a second start on the
same workdir, a disk that is full from some file operation on, a file operation
that fails once with EIO, a flipped byte in the newest checkpoint or in the
metrics, the death of a peer. `faults.c` counts all file operations below the
workdir, those of libraries too, and strikes at one drawn at random.

A trial fails if the state or a line of the metrics differs from the quiet run
of as many processes, if a start prints a traceback, ends with a code that it
should not, ends without a word, or takes longer than DEADLINE seconds. Needs a
C compiler. The logs of trials that fail are kept.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from etils import epath

from imsvd_jax.runs import metrics, verification, weights
from tests.soak import zygote

ROOT = pathlib.Path(__file__).parents[2]
RECIPE = "tests/train_child.py:chaos"
DEADLINE = 300  # Seconds of a start, and of a second start; machines are busy.
STOPPED = 2.0  # Seconds of SIGSTOP of a process without peers.

# The exit codes of docs/reliability.md; a negative one is a signal.
FINISHED, USER_ERROR, PEER, SAVED = 0, 2, 4, 75
ALONE = {
  "kill": {FINISHED, -signal.SIGKILL},
  "term": {FINISHED, SAVED, -signal.SIGTERM},
  "interrupt": {FINISHED, SAVED, 130, -signal.SIGINT},
  "stop": {FINISHED},
  "second start": {FINISHED},
  "full disk": {FINISHED, USER_ERROR},
  "eio": {FINISHED, USER_ERROR},
  "flip checkpoint": {FINISHED},
  "flip metrics": {FINISHED},
}
# With a peer each may also lose the other: code 4, or JAX's abort.
LOST = {PEER, -signal.SIGABRT}
PAIR = {
  "kill": ALONE["kill"] | LOST,
  "term": ALONE["term"] | LOST,
  "stop": {FINISHED, -signal.SIGKILL} | LOST,
  "second start": {FINISHED},
  "full disk": ALONE["full disk"] | LOST,
  "eio": ALONE["eio"] | LOST,
}


@dataclasses.dataclass
class Trial:
  """One run from its first start to its end.

  Attributes:
    number: Also the seed.
    workdir: Of the run; logs and reports lie beside it.
    quiet: What the quiet run of as many processes left.
    trainers: Where the processes come from.
  """

  number: int
  workdir: pathlib.Path
  quiet: dict
  trainers: zygote.Starts
  complaints: list[str] = dataclasses.field(default_factory=list)
  faults: list[str] = dataclasses.field(default_factory=list)
  kinds: list[str] = dataclasses.field(default_factory=list)
  starts: int = 0

  def __post_init__(self):
    self.rng = random.Random(self.number)
    self.num_processes = processes_of(self.number)

  def run(self) -> "Trial":
    """Makes all starts; `complaints` says what went wrong."""
    kinds = list(PAIR if self.num_processes > 1 else ALONE)
    for _ in range(self.rng.randint(1, 3)):
      # By number, so that every kind comes up equally often.
      kind = kinds[(self.number // 4 + self.starts) % len(kinds)]
      self.kinds.append(kind)
      self.one_start(kind)
    for _ in range(3):
      if self.one_start("none"):
        break
    else:
      self.complain("did not finish in three starts without a fault")
    self.compare()
    return self

  def one_start(self, kind: str) -> bool:
    """Starts the run once under a fault; returns whether it finished."""
    self.starts += 1
    if kind.startswith("flip"):
      self.flip(kind)
    victim = self.rng.randrange(self.num_processes)
    strike = self.strike_of(kind)
    port = free_port()
    runs = [
      self.start(f"start{self.starts}", index, port, strike, index == victim)
      for index in range(self.num_processes)
    ]
    if strike.get("by_clock"):
      time.sleep(self.rng.uniform(0.0, self.quiet["seconds"]))
    if kind == "second start":
      self.second_start()
    elif strike.get("by_clock") and runs[victim].poll() is None:
      runs[victim].send_signal(strike["by_clock"])
    if kind == "stop":
      self.let_stopped_go_on(runs, victim)
    codes = [self.code_of(run) for run in runs]
    self.judge(kind, codes)
    self.note(kind, codes)
    return set(codes) == {FINISHED}

  def strike_of(self, kind: str) -> dict:
    """Returns how a fault is made: by a signal, or at a file operation."""
    signals = {
      "kill": signal.SIGKILL,
      "term": signal.SIGTERM,
      "interrupt": signal.SIGINT,
      "stop": signal.SIGSTOP,
      "second start": 0,
    }
    at_operation = {
      "kill": "kill",
      "term": "term",
      "stop": "stop",
      "full disk": "enospc",
      "eio": "eio",
    }
    by_clock = kind in signals and self.rng.random() < 0.5
    if kind in at_operation and not by_clock:
      number = self.rng.randint(1, self.quiet["operations"])
      return {"FAULT_ACTION": at_operation[kind], "FAULT_AT": str(number)}
    return {"by_clock": signals[kind]} if kind in signals else {}

  def start(self, name, index, port, strike, is_victim) -> zygote.Start:
    environ = {
      "FAULT_ROOT": str(self.workdir),
      "FAULT_REPORT": str(self.report(name, index)),
    }
    if is_victim and "FAULT_AT" in strike:
      environ |= strike
    command = [f"--config={RECIPE}", f"--workdir={self.workdir}"]
    if self.num_processes > 1:
      command += [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={self.num_processes}",
        f"--process_id={index}",
      ]
    log = self.log(name, index)
    return self.trainers.start(command, environ, log)

  def log(self, name: str, index: int) -> pathlib.Path:
    return self.workdir.with_name(f"{self.workdir.name}.{name}.{index}.log")

  def report(self, name: str, index: int) -> pathlib.Path:
    return self.log(name, index).with_suffix(".faults")

  def second_start(self) -> None:
    """Starts the run again at the same time: one of the two is refused.

    Neither is if one ends before the other begins.
    """
    port = free_port()
    runs = [
      self.start(f"second{self.starts}", index, port, {}, False)
      for index in range(self.num_processes)
    ]
    codes = [self.code_of(run) for run in runs]
    self.judge("second start", codes, name="second")
    logs = self.workdir.parent.glob(f"{self.workdir.name}.*{self.starts}.0.log")
    refused = [
      log for log in logs if "in use by another run" in log.read_text()
    ]
    if len(refused) > 1:
      self.complain(f"start {self.starts}: both were refused")

  def let_stopped_go_on(self, runs, victim) -> None:
    """A process alone goes on; one with peers is lost to them and killed."""
    if self.num_processes == 1:
      deadline = time.monotonic() + DEADLINE
      while runs[0].poll() is None and time.monotonic() < deadline:
        time.sleep(STOPPED)
        runs[0].send_signal(signal.SIGCONT)
      return
    for index, run in enumerate(runs):
      if index != victim:
        self.code_of(run)
    runs[victim].kill()

  def code_of(self, run: zygote.Start) -> int:
    try:
      return run.wait(DEADLINE)
    except subprocess.TimeoutExpired:
      run.kill()
      self.complain(f"{run.log.name}: still running after {DEADLINE} s")
      return run.wait()

  def judge(self, kind, codes, name="start") -> None:
    """Complains about codes, tracebacks and ends without a word."""
    allowed = (PAIR if self.num_processes > 1 else ALONE).get(kind, {FINISHED})
    for index, code in enumerate(codes):
      log = self.log(f"{name}{self.starts}", index)
      text = log.read_text(errors="replace")
      is_refused = kind == "second start" and "in use by another run" in text
      if code == USER_ERROR and is_refused:
        code = FINISHED  # The other one's code tells.
      if code not in allowed:
        self.complain(f"{log.name}: code {code} after {kind}")
      if "Traceback (most recent" in text:
        self.complain(f"{log.name}: a traceback")
      if code > 0 and not text.strip():
        self.complain(f"{log.name}: code {code} without a word")

  def flip(self, kind: str) -> None:
    """Flips a byte of the newest checkpoint, or of the metrics."""
    folder = self.workdir / "checkpoints"
    steps = [p for p in folder.glob("*") if p.name.isdigit()]
    path = self.workdir / "metrics.jsonl"
    if kind == "flip checkpoint" and steps:
      newest = max(steps, key=lambda p: int(p.name))
      files = [p for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
      path = self.rng.choice(sorted(files))
    if not path.is_file() or not path.stat().st_size:
      return
    content = bytearray(path.read_bytes())
    content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
    path.write_bytes(content)

  def compare(self) -> None:
    """Complains where the run differs from the quiet one."""
    try:
      found = outcome(self.workdir)
    except Exception as error:  # Whatever it is, the trial has failed.
      self.complain(f"cannot be read: {type(error).__name__}: {error}")
      return
    if found["leaves"] != self.quiet["leaves"]:
      self.complain("the last state differs from the quiet run's")
    # A line that a flipped byte changed is reported, and its file kept aside.
    aside = list(self.workdir.glob("metrics.jsonl.damaged*"))
    spared = 2 if aside and "flip metrics" in self.kinds else 0
    mine, theirs = found["lines"], self.quiet["lines"]
    missing = collections.Counter(theirs) - collections.Counter(mine)
    foreign = collections.Counter(mine) - collections.Counter(theirs)
    if max(missing.total(), foreign.total()) > spared:
      self.complain(
        f"metrics: {missing.total()} lines lost, {foreign.total()} doubled or"
        " changed"
      )

  def complain(self, what: str) -> None:
    self.complaints.append(what)

  def note(self, kind: str, codes) -> None:
    if kind == "none":
      return
    reports = self.workdir.parent.glob(
      f"{self.workdir.name}.start{self.starts}.*.faults"
    )
    struck = [
      line.removeprefix("fault at ").split(",")[0]
      for report in reports
      for line in report.read_text().splitlines()
      if line.startswith("fault at")
    ]
    where = f" at {struck[0]}" if struck else ""
    self.faults.append(f"{kind}{where}: {','.join(map(str, codes))}")


def processes_of(number: int) -> int:
  return 2 if number % 4 == 3 else 1


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def outcome(workdir: pathlib.Path) -> dict:
  """Returns checksums of the last state and lines of the metrics of a run."""
  folder = workdir / "checkpoints"
  step = max(int(p.name) for p in folder.glob("*") if p.name.isdigit())
  meta = verification.read_meta(epath.Path(folder / str(step)))
  weights.load_variables(workdir, step)  # Verifies the arrays.
  lines = (workdir / metrics.METRICS_FILE).read_text().splitlines()
  return {"leaves": meta["leaves"], "lines": lines}


def prepare(scratch: pathlib.Path) -> dict[str, str]:
  """Compiles the faults; returns the environment of each process."""
  library = scratch / "faults.so"
  source = ROOT / "tests" / "soak" / "faults.c"
  subprocess.run(
    ["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True
  )
  flags = (
    "--xla_force_host_platform_device_count=1"
    " --xla_backend_optimization_level=0"
  )
  return {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(scratch / "xla"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_PLATFORMS": "cpu",
    "LD_PRELOAD": str(library),
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": flags,
  }


def quiet_run(
  number: int, scratch: pathlib.Path, trainers: zygote.Starts
) -> dict:
  """Trains without a fault, twice; returns the outcome, and what it took.

  The first run compiles, so that only the second tells how long one takes.
  """
  for name in ("first", "quiet"):
    workdir = scratch / f"{name}{processes_of(number)}"
    quiet = Trial(number, workdir, {}, trainers)
    begin = time.monotonic()
    if not quiet.one_start("none"):
      sys.exit(f"The quiet run failed: {quiet.complaints}; see {scratch}.")
    seconds = time.monotonic() - begin
  report = quiet.report("start1", 0).read_text()
  operations = int(report.rpartition(":")[2])
  print(
    f"{quiet.num_processes} process(es): {seconds:.0f} s, {operations} file"
    " operations in the first process of a run.",
    flush=True,
  )
  taken = {"seconds": seconds, "operations": operations}
  return {**outcome(quiet.workdir), **taken}


def main() -> int:
  """Runs the trials and prints what they found."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("trials", type=int)
  parser.add_argument("--first", type=int, default=0, help="first seed")
  parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
  parser.add_argument("--minutes", type=float, default=60, help="at most")
  options = parser.parse_args()
  begin = time.monotonic()
  scratch = pathlib.Path(tempfile.mkdtemp(prefix="imsvd_jax_chaos_"))
  trainers = zygote.Starts(prepare(scratch))
  quiet = {processes_of(n): quiet_run(n, scratch, trainers) for n in (0, 3)}

  def one(number: int) -> Trial | None:
    if time.monotonic() - begin > 60 * options.minutes:
      return None
    workdir = scratch / f"trial{number}"
    trial = Trial(number, workdir, quiet[processes_of(number)], trainers)
    trial.run()
    if not trial.complaints:
      shutil.rmtree(workdir, ignore_errors=True)
    return trial

  numbers = range(options.first, options.first + options.trials)
  done, faults = [], collections.Counter()
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    for trial in pool.map(one, numbers):
      if trial is None:
        continue
      done.append(trial)
      faults.update(
        fault.split(":")[0].split(" at ")[0] for fault in trial.faults
      )
      verdict = "; ".join(trial.complaints) or "the same"
      print(
        f"[{time.monotonic() - begin:5.0f} s] trial {trial.number}"
        f" ({trial.num_processes} process(es), {trial.starts} starts;"
        f" {'; '.join(trial.faults)}): {verdict}",
        flush=True,
      )
  trainers.close()
  failed = [trial for trial in done if trial.complaints]
  what = ", ".join(f"{n} {kind}" for kind, n in sorted(faults.items()))
  print(
    f"{len(done)} trials, {sum(t.starts for t in done)} starts, {what};"
    f" {len(failed)} failed; {time.monotonic() - begin:.0f} s."
  )
  if failed:
    print(f"Logs: {scratch}")
  else:
    shutil.rmtree(scratch, ignore_errors=True)
  return 1 if failed or len(done) < options.trials else 0


if __name__ == "__main__":
  sys.exit(main())
