"""The launch scripts: lint, dry runs, and runs with stand-ins.

A stand-in is a small program first in PATH that answers like gcloud, srun or
nvidia-smi, so that every line of a script runs without renting anything.
"""

import contextlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
RECIPE = "--config=configs/digits.py"
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-16"]
FLAGS = ["--", "--config=configs/imagenet_r50.py", "--workdir=gs://b/a run"]


# Without Python they check no recipe, which takes seconds.
WITHOUT = {"PYTHON": "true"}
QUICK = {"tpu_pod.sh": WITHOUT, "xpk.sh": WITHOUT}


def run(script: str, *arguments: str, **environment: str):
  return subprocess.run(
    [str(LAUNCH / script), *arguments],
    env={**os.environ, **QUICK.get(script, {}), **environment},
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )


@pytest.fixture
def path_with(tmp_path):
  """Returns a function that puts stand-ins first in PATH."""
  (tmp_path / "bin").mkdir()

  def add(**programs: str) -> str:
    for name, body in programs.items():
      program = tmp_path / "bin" / name.replace("_", "-")
      program.write_text(f"#!/usr/bin/env bash\n{body}\n")
      program.chmod(0o755)
    return f"{tmp_path / 'bin'}:{os.environ['PATH']}"

  return add


def commands(stdout: str) -> list[list[str]]:
  """The commands that a dry run prints."""
  text = stdout.replace("\n+ ", "\n\0")
  lines = text.removeprefix("+ ").split("\n\0")
  # bash quotes with $'...' where there are newlines; let bash read it.
  result = []
  for line in lines:
    words = subprocess.run(
      ["bash", "-c", f'printf "%s\\0" {line}'],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    result.append(words.split("\0")[:-1])
  return result


# --- All of them -------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script):
  if not shutil.which("shellcheck"):
    pytest.skip("shellcheck is not installed")
  result = subprocess.run(
    ["shellcheck", str(script)], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_say_how_they_are_used(script):
  result = run(script.name)
  assert result.returncode == 2
  assert f"launch/{script.name}" in result.stderr
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""
  if script.suffix == ".sh":
    assert os.access(script, os.X_OK)
  for word in ("--help", "-h"):
    result = run(script.name, word)
    assert result.returncode == 0
    assert f"launch/{script.name}" in result.stdout
    assert "set -" not in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["supervise.sh", "--fast", "true"], "found --fast"),
    (["supervise.sh", ""], "found nothing"),
    (["worker.sh", "--fast"], "found --fast"),
    (["worker.sh", "fly"], "found fly"),
    (["worker.sh", "start"], "start needs a command"),
    (["worker.sh", "start", "--fast"], "start needs a command"),
    (["worker.sh", "stop", "--fast"], "unknown option '--fast'"),
    (["gpu_node.sh", "--dry-run"], "CONFIG is missing"),
    (["gpu_node.sh", "--config="], "CONFIG is missing"),
    (["gpu_node.sh", "--fast"], "found --fast"),
    (["local.sh", "--dry-run"], "CONFIG is missing"),
    (["local.sh", "--dry-run", "2"], "CONFIG is missing"),
    (["local.sh", "2", "--config="], "CONFIG is missing"),
    (["local.sh", "--fast", "2"], "unknown option --fast"),
    (["slurm.sbatch", "--dry-run"], "--config is missing"),
    (["slurm.sbatch", "--workdir=x"], "--config is missing"),
    (["slurm.sbatch", "--chekc"], "found: --chekc"),
    (["slurm.sbatch", "--config="], "--config is missing"),
    (["xpk.sh", "--dry-run"], "error: CLUSTER is missing"),
    (["xpk.sh", "--config=x"], "error: CLUSTER is missing"),
    (["xpk.sh", "a", "b", "--config=x", "-v"], "error: IMAGE is missing"),
    (["xpk.sh", "a", "v6e-8", "b"], "error: --config is missing"),
    (["xpk.sh", "a", "banana", "b", *FLAGS[1:]], "found banana"),
    (["xpk.sh", "a", "v6e-8", "b", "--config=x"], "--workdir is missing"),
    (["xpk.sh", "a", "v6e-8", "b", "--workdir=runs/x"], "or relative"),
    (["supervise.sh", "nosuchcommand"], "no command that can be found"),
    (["check_recipe.sh"], "--config is missing"),
    (["tpu_pod.sh", "--fast"], "'--fast'"),
    (["tpu_pod.sh", "--dry-run"], "an action is missing"),
  ],
)
def test_a_wrong_word_is_one_line(words, message):
  result = run(*words)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


def test_no_name_in_tmp_can_be_foreseen():
  for script in SCRIPTS:
    assert "/tmp" not in re.sub("#.*", "", script.read_text()), script


def test_the_container_copies_what_exists():
  text = (LAUNCH / "Dockerfile").read_text()
  copied = [
    source
    for line in text.splitlines()
    if line.startswith("COPY ")
    for source in line.split()[1:-1]
  ]
  assert len(copied) > 4
  sent = (ROOT / ".dockerignore").read_text().splitlines()
  for source in copied:
    assert (ROOT / source).exists(), source
    assert f"!{source.split('/')[0]}" in sent, source
  assert 'ENTRYPOINT ["python", "-m", "imsvd_jax.main"]' in text


def test_what_the_container_copies_first_can_be_installed(tmp_path):
  """Its dependencies are a layer of their own, below most of the code."""
  text = (LAUNCH / "Dockerfile").read_text().partition("RUN pip install")[0]
  for line in re.findall("^COPY (.+)$", text, re.MULTILINE):
    *sources, folder = line.split()
    for source in sources:
      place = tmp_path / (source if folder == "./" else folder)
      place.parent.mkdir(exist_ok=True)
      shutil.copy(ROOT / source, place)
  build = "from setuptools import build_meta; build_meta.build_editable('.')"
  done = subprocess.run(
    [sys.executable, "-c", build],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert list(tmp_path.glob("imsvd_jax-*.whl"))


# --- TPU pods ----------------------------------------------------------------


def test_a_dry_run_prints_every_command_of_a_pod():
  result = run(
    "tpu_pod.sh",
    *POD,
    "--spot",
    "--project=mine",
    "--data_dir=gs://b/tfds",
    "--dry-run",
    *["up", "install", "run", "down"],
    *FLAGS,
  )
  assert result.returncode == 0, result.stderr
  done = commands(result.stdout)
  tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
  verbs = [c[4] for c in done if c[:4] == tpu]
  assert verbs == ["create", "scp", "ssh", "ssh", "ssh", "ssh", "delete"]
  create = done[0]
  assert create[5:] == [
    "pod",
    "--zone=us-west4-a",
    "--project=mine",
    "--accelerator-type=v5litepod-16",
    "--version=v2-alpha-tpuv5-lite",
    "--spot",
  ]
  assert all("--project=mine" in c for c in done if c[:4] == tpu)
  start = next(c[-1] for c in done if "worker.sh start" in c[-1])
  words = shlex.split(start.removeprefix("--command="))
  assert words[words.index("start") + 1 :] == [
    "env",
    "TFDS_DATA_DIR=gs://b/tfds",
    "../venv/bin/python",
    "-m",
    "imsvd_jax.main",
    *FLAGS[1:],
  ]
  assert "--worker=all" in next(c for c in done if "worker.sh start" in c[-1])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--zone=z", "up"], "--name is missing"),
    (["--name=n", "up"], "--zone is missing"),
    (["--name=n", "--zone=z", "up"], "--type is missing"),
    (["--name=n", "--zone=z", "--type=banana", "up"], "type=banana is no type"),
    (["--name=n", "--zone=z", "fly"], "'fly'"),
    ([*POD, "run"], "--config and --workdir"),
    ([*POD, "run", "--", "--config=c", "--workdir=runs/x"], "gs://"),
  ],
)
def test_a_mistake_is_one_clear_line(arguments, message):
  result = run("tpu_pod.sh", "--dry-run", *arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.count("\n") == 1
  assert result.stdout == ""


def test_flags_may_be_two_words():
  """As absl reads them; they are checked before the slice is created."""
  words = ["--", "--config", "configs/x.py", "--workdir", "gs://b/run"]
  result = run("tpu_pod.sh", "--dry-run", *POD, "run", *words)
  assert result.returncode == 0, result.stderr
  assert r"--config\ configs/x.py\ --workdir\ gs://b/run" in result.stdout
  result = run("tpu_pod.sh", "--dry-run", *POD, "run", *words[:-1], "runs/x")
  assert result.returncode == 2
  assert "gs://" in result.stderr


# A cloud of one machine, this one: `ssh` runs here, in a separate home, and the
# slice is preempted the first time its log is requested.
GCLOUD = r"""
echo "$*" >> "$CLOUD/calls"
name=$5
case $4 in
  describe) cat "$CLOUD/state" 2>/dev/null || exit 1 ;;
  create) echo READY > "$CLOUD/state"; mkdir -p "$CLOUD/home" ;;
  delete) rm -rf "$CLOUD/state" "$CLOUD/home" ;;
  scp) cp "$5" "$CLOUD/home/" ;;
  ssh)
    command=${*: -1}
    command=${command#--command=}
    case $command in
      *"uv pip"*)
        cd "$CLOUD/home" && mkdir imsvd_jax &&
          tar --extract --gzip --file=imsvd_jax.tar.gz --directory=imsvd_jax
        mkdir -p venv/bin && cp "$CLOUD/python" venv/bin/python
        exit ;;
      *"worker.sh logs"*)
        if [ ! -f "$CLOUD/preempted" ]; then
          touch "$CLOUD/preempted"
          echo PREEMPTED > "$CLOUD/state"
          exit 255
        fi ;;
    esac
    [ "$(cat "$CLOUD/state")" = READY ] || exit 255
    cd "$CLOUD/home" && HOME=$CLOUD/home bash -c "$command" ;;
esac
"""
TRAINER = r"""
echo "training: $*"
tries=$(cat "$CLOUD/tries" 2>/dev/null || echo 0)
echo $((tries + 1)) > "$CLOUD/tries"
[ "$tries" -ge 1 ] || exit 4
sleep 0.5
echo finished
"""


def test_a_preempted_pod_is_created_again_and_a_crash_restarted(
  path_with, tmp_path
):
  if not (ROOT / ".git").exists():
    pytest.skip("the script installs a commit, and this is no git checkout")
  cloud = tmp_path / "cloud"
  cloud.mkdir()
  (cloud / "python").write_text(f"#!/usr/bin/env bash\n{TRAINER}")
  (cloud / "python").chmod(0o755)
  result = run(
    "tpu_pod.sh",
    *POD,
    *["up", "install", "run", "down"],
    *FLAGS,
    PATH=path_with(gcloud=GCLOUD),
    CLOUD=str(cloud),
    RESTART_SECONDS="0",
    RECONNECT_SECONDS="0",
  )
  assert result.returncode == 0, result.stderr
  assert "The slice is gone; creating it again." in result.stderr
  assert "The run ended with code 0." in result.stderr
  assert "finished" in result.stdout
  assert "--workdir=gs://b/a run" in result.stdout
  calls = (cloud / "calls").read_text()
  assert calls.count(" create ") == 2
  assert calls.count(" delete ") == 2  # The preempted one, and at the end.
  assert not (cloud / "home").exists()


# --- A run that outlives its connection --------------------------------------


@pytest.fixture
def worker(tmp_path):
  """Calls worker.sh; ends what it started."""
  environment = {"RUN_DIR": str(tmp_path / "run"), "RESTART_SECONDS": "0"}

  def call(*arguments):
    return run("worker.sh", *arguments, **environment)

  yield call
  pid = tmp_path / "run" / "pid"
  if pid.exists():
    with contextlib.suppress(ProcessLookupError):
      os.kill(int(pid.read_text()), signal.SIGKILL)


def wait_for(condition, seconds=20):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, "waited too long"
    time.sleep(0.05)


def test_a_detached_run_has_a_log_and_a_result(worker):
  assert worker("start", "bash", "-c", "echo hello; exit 3").returncode == 0
  wait_for(lambda: worker("result").stdout)
  assert worker("result").stdout == "3\n"
  assert "hello" in worker("logs").stdout


def test_the_log_of_no_run_is_one_line(worker):
  result = worker("logs")
  assert result.returncode == 2
  assert "no run was started on" in result.stderr
  assert result.stderr.count("\n") == 1


def test_a_detached_run_is_stopped_and_may_save(worker, tmp_path):
  script = (
    "trap 'echo saved; exit 75' TERM; echo up; while :; do sleep .1; done"
  )
  assert worker("start", "bash", "-c", script).returncode == 0
  log = tmp_path / "run" / "log"
  wait_for(lambda: "up" in log.read_text())
  assert worker("result").stdout == ""
  second = worker("start", "true")
  assert second.returncode == 2
  assert "in progress" in second.stderr
  assert worker("stop").returncode == 0
  wait_for(lambda: worker("result").stdout)
  assert worker("result").stdout == "75\n"
  assert "saved" in log.read_text()


def test_another_programs_process_is_not_stopped(worker, tmp_path):
  """After a crash of the machine a process number belongs to anybody."""
  (tmp_path / "run").mkdir()
  other = subprocess.Popen(["sleep", "60"])
  # By its words it could be the run; it started at another time.
  alike = subprocess.Popen(
    ["bash", "-c", "echo; sleep 60; true", "supervise.sh"],
    stdout=subprocess.PIPE,
  )
  try:
    alike.stdout.readline()
    for process in (other, alike):
      stat = pathlib.Path(f"/proc/{process.pid}/stat").read_text()
      ticks = stat.rpartition(") ")[2].split()[19]
      for started in (None, ticks if process is other else "1", ""):
        (tmp_path / "run" / "pid").write_text(f"{process.pid}\n")
        if started is not None:
          (tmp_path / "run" / "started").write_text(f"{started}\n")
        result = worker("stop")
        assert "No run is in progress" in result.stderr
        assert result.returncode == 0
        time.sleep(0.05)
        assert process.poll() is None
    (tmp_path / "run" / "pid").write_text("-1\n")
    assert "No run is in progress" in worker("stop").stderr
  finally:
    (tmp_path / "run" / "pid").unlink()
    for process in (other, alike):
      process.kill()
      process.wait()
      if process.stdout:
        process.stdout.close()


# --- Again after a crash -----------------------------------------------------


@pytest.mark.parametrize(
  ("codes", "result", "tries"),
  [
    ("0", 0, 1),
    ("2", 2, 1),  # A user error: a restart would fail again.
    ("3", 3, 1),
    ("4 1 0", 0, 3),
    ("75 0", 0, 2),  # Preempted: saved, then resumed.
    ("9 9 9 9 9", 9, 3),  # It cannot start.
    ("75 75 75 75 75", 75, 4),  # Each has saved: the limit is RESTARTS.
  ],
)
def test_restarts(codes, result, tries, tmp_path):
  count = tmp_path / "count"
  script = f"""
echo x >> {count}
codes=({codes})
exit ${{codes[$(wc -l < {count}) - 1]}}
"""
  ended = run(
    "supervise.sh", "bash", "-c", script, RESTARTS="3", RESTART_SECONDS="0"
  )
  assert ended.returncode == result
  assert count.read_text().count("x") == tries
  assert ended.stderr.count("restart") == tries - 1


# Saves a higher step in its first tries, as many as SAVES.
SAVING = """
echo x >> "$COUNT"
tries=$(wc -l < "$COUNT")
[ "$tries" -gt "$SAVES" ] || mkdir -p "$RUN/checkpoints/$((tries * 8))"
exit 9
"""


@pytest.mark.parametrize(
  ("words", "run_name"),
  [
    (["--workdir=a 'run' $x"], "a 'run' $x"),
    (["--workdir", "run"], "run"),
    (["--config=c/digits.py"], "runs/digits"),
    (["--config=c/digits.py:debug"], "runs/digits-debug"),
  ],
)
def test_a_new_checkpoint_is_progress(words, run_name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / run_name / "checkpoints" / "4").mkdir(parents=True)
  (tmp_path / run_name / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir()
  ended = run(
    *["supervise.sh", "bash", "-c", SAVING, "bash", *words],
    COUNT=str(tmp_path / "count"),
    RUN=str(tmp_path / run_name),
    SAVES="4",
    RESTART_SECONDS="0",
  )
  assert ended.returncode == 9
  assert (tmp_path / "count").read_text().count("x") == 4 + 3
  assert "3 ends in a row without a new checkpoint in " in ended.stderr


def test_checkpoints_in_a_bucket_are_counted(path_with, tmp_path):
  path = path_with(
    gcloud='[ "$3" = "gs://b/a run/checkpoints/" ] &&'
    ' printf "gs://b/a run/checkpoints/%s/\n" $(ls "$RUN/checkpoints")'
  )
  ended = run(
    *["supervise.sh", "bash", "-c", SAVING, "--", "--workdir=gs://b/a run"],
    COUNT=str(tmp_path / "count"),
    RUN=str(tmp_path / "bucket"),
    PATH=path,
    SAVES="2",
    RESTART_SECONDS="0",
  )
  assert ended.returncode == 9
  assert (tmp_path / "count").read_text().count("x") == 2 + 3


def test_the_wait_doubles(path_with, tmp_path):
  path = path_with(sleep=f'echo "$1" >> {tmp_path}/waits')
  ended = run("supervise.sh", "false", RESTART_SECONDS="7", PATH=path)
  assert ended.returncode == 1
  assert (tmp_path / "waits").read_text() == "7\n14\n"
  ended = run("supervise.sh", "false", RESTART_SECONDS="1.5")
  assert ended.returncode == 2
  assert "expected a whole number" in ended.stderr


def test_a_signal_to_the_supervisor_ends_it_with_the_commands_code():
  script = "trap 'sleep .3; exit 75' TERM; echo up; while :; do sleep .1; done"
  process = subprocess.Popen(
    [str(LAUNCH / "supervise.sh"), "bash", "-c", script],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "up\n"
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=20)
  assert process.returncode == 75


# --- SLURM -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("code", "count", "requeued"),
  [
    ("0", "0", False),
    ("2", "0", False),
    ("75", "40", True),
    ("4", "0", True),
    ("4", "10", False),
  ],
)
def test_slurm_requeues_unless_a_retry_is_useless(
  path_with, tmp_path, code, count, requeued
):
  path = path_with(
    srun=f'echo "srun $*"; exit {code}',
    scontrol=f'echo "$*" > {tmp_path}/scontrol',
    python="exit 0",  # The recipe is fine.
  )
  result = run(
    "slurm.sbatch",
    "--config=configs/digits.py",
    PATH=path,
    SLURM_JOB_ID="77",
    SLURM_RESTART_COUNT=count,
  )
  assert result.returncode == int(code)
  assert "python -m imsvd_jax.main --config=configs/digits.py" in result.stdout
  assert (tmp_path / "scontrol").exists() == requeued
  if requeued:
    assert (tmp_path / "scontrol").read_text() == "requeue 77\n"


def test_a_dry_run_prints_what_slurm_would_run():
  result = run("slurm.sbatch", "--dry-run", "--config=configs/a b.py")
  assert result.returncode == 0, result.stderr
  (words,) = commands(result.stdout)
  assert words[0] == "srun"
  assert words[-4:] == [
    "python",
    "-m",
    "imsvd_jax.main",
    "--config=configs/a b.py",
  ]


@pytest.mark.proof  # Each line imports the package.
@pytest.mark.parametrize(
  ("script", "words", "job", "message"),
  [
    ("slurm.sbatch", [RECIPE, "--config.batch_size=0"], "77", "batch_size"),
    ("slurm.sbatch", [RECIPE, "--config.epoch=3"], "77", "mean 'epochs'"),
    ("slurm.sbatch", ["--check", RECIPE, "--config.epoch=3"], "", "'epoch'"),
    ("slurm.sbatch", ["--check", RECIPE, "--workdir=x"], "", None),
    ("slurm.sbatch", ["--chekc", RECIPE], "", "Unknown flag --chekc"),
    ("slurm.sbatch", [RECIPE], "", "submit it: sbatch"),
    ("gpu_node.sh", [RECIPE, "--config.epoch=3"], "", "'epoch'"),
    ("gpu_node.sh", [RECIPE, "--dry-run"], "", "Unknown flag --dry-run"),
    (
      "tpu_pod.sh",
      [*POD, "up", "run", *FLAGS, "--config.epocs=3"],
      "",
      "'epocs'",
    ),
    (
      "xpk.sh",
      ["a", "v6e-8", "b", *FLAGS[1:], "--config.epocs=3"],
      "",
      "'epocs'",
    ),
  ],
)
def test_a_mistake_in_the_recipe_starts_nothing(
  path_with, tmp_path, script, words, job, message
):
  programs = dict.fromkeys(
    ("srun", "scontrol", "gcloud", "xpk"), f"touch {tmp_path}/started"
  )
  programs["nvidia_smi"] = "exit 0"
  programs["python"] = f'exec {sys.executable} "$@"'
  result = run(
    script,
    *words,
    PATH=path_with(**programs),
    PYTHON="python",
    SLURM_JOB_ID=job,
  )
  assert result.returncode == (2 if message else 0), result.stderr
  assert (message or "") in result.stderr
  assert result.stderr.count("\n") == (1 if message else 0)
  assert result.stdout == ("" if message else "The recipe is fine.\n")
  assert not (tmp_path / "started").exists()


def test_slurm_signals_the_tasks_before_the_time_limit():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  settings = [x.split(None, 1)[1] for x in lines if x.startswith("#SBATCH")]
  assert "--signal=TERM@120" in settings  # Not B:, which only the shell gets.
  assert "--requeue" in settings
  assert "--open-mode=append" in settings


# --- Other people's launchers ------------------------------------------------


def test_xpk_gets_one_command_for_all_hosts():
  flags = ["--config=configs/digits.py", "--workdir=gs://b/a run"]
  result = run("xpk.sh", "--dry-run", "mine", "v5litepod-16", "image:1", *flags)
  assert result.returncode == 0, result.stderr
  (words,) = commands(result.stdout)
  assert words[:3] == ["xpk", "workload", "create"]
  assert {"--cluster=mine", "--tpu-type=v5litepod-16", "--num-slices=1"} < set(
    words
  )
  inner = shlex.split(words[-1].removeprefix("--command="))
  assert inner == ["python", "-m", "imsvd_jax.main", *flags]


def test_skypilot_starts_one_process_per_machine(path_with):
  task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
  assert task["setup"] == 'pip install -e ".[cuda12,gcs]"'
  result = subprocess.run(
    ["bash", "-c", task["run"]],
    cwd=ROOT,
    env={
      **os.environ,
      "PATH": path_with(python='echo "$JAX_PLATFORMS python $*"'),
      "CONFIG": "configs/digits.py",
      "RUN": "gs://b/a run",
      "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
      "SKYPILOT_NUM_NODES": "2",
      "SKYPILOT_NODE_RANK": "1",
      "JAX_PLATFORMS": "",
    },
    capture_output=True,
    text=True,
    check=True,
  )
  check, train = result.stdout.splitlines()
  assert check == (
    "cpu python -m imsvd_jax.commands.check_recipe --config=configs/digits.py"
  )
  assert train == (
    " python -m imsvd_jax.main --config=configs/digits.py"
    " --workdir=gs://b/a run"
    " --coordinator_address=10.0.0.1:8476 --num_processes=2 --process_id=1"
  )


# --- One machine with GPUs ---------------------------------------------------


def test_a_gpu_machine_is_one_supervised_process():
  result = run("gpu_node.sh", "--dry-run", "configs/a b.py", "--config.seed=1")
  assert result.returncode == 0
  (words,) = commands(result.stdout)
  assert words[0] == "env"
  assert words[-4:] == [
    "-m",
    "imsvd_jax.main",
    "--config=configs/a b.py",
    "--config.seed=1",
  ]
  assert any(word.endswith("supervise.sh") for word in words)


@pytest.mark.parametrize(
  ("script", "before"), [("gpu_node.sh", []), ("local.sh", ["2"])]
)
def test_the_config_may_be_the_trainers_flag_and_no_other(script, before):
  python = {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
  result = run(script, "--dry-run", *before, "--config=configs/x.py", **python)
  assert result.returncode == 0, result.stderr
  for words in commands(result.stdout):
    assert "--config=configs/x.py" in words
  result = run(script, *before, "--workdir=x", "configs/x.py", **python)
  assert result.returncode == 2
  assert "found --workdir=x where CONFIG is expected" in result.stderr
  assert result.stderr.count("\n") == 1


def test_a_machine_without_gpus_is_one_clear_line(path_with):
  bare = {"PATH": "/usr/bin:/bin"}
  result = run("gpu_node.sh", "configs/digits.py", PYTHON="none", **bare)
  assert result.returncode == 2
  assert "error: none not found; activate" in result.stderr
  result = run("gpu_node.sh", "configs/digits.py", PYTHON="true", **bare)
  assert result.returncode == 2
  assert "nvidia-smi not found" in result.stderr
  # A driver, but JAX for the CPU.
  result = run(
    "gpu_node.sh",
    "configs/digits.py",
    PATH=path_with(nvidia_smi="exit 0"),
    PYTHON=sys.executable,
    JAX_PLATFORMS="cpu",
  )
  assert result.returncode == 1
  assert "JAX sees no GPU" in result.stderr
