"""Interrupted training of heads and of whole networks goes on bit for bit."""

import contextlib
import dataclasses
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath

from imsvd_jax.base.errors import Stopped, UserError
from imsvd_jax.evaluation import epochs, linear, offline, probe, protocols
from imsvd_jax.evaluation.evaluate_options import Options
from imsvd_jax.evaluation.features import Features
from imsvd_jax.evaluation.results import read_results
from tests.evaluation.pair import ROOT
from tests.evaluation.test_offline import digits_config, save_run

GENERATOR = np.random.default_rng(0)
LABELS = np.arange(70) % 3
IMAGES = (2 * np.eye(3, 6)[LABELS] + GENERATOR.normal(size=(70, 6))).astype(
  np.float32
)
TEST = Features(IMAGES[:30] + np.float32(0.3), LABELS[:30])


class StopAfter:
  """A stop request that comes after so many batches."""

  def __init__(self, batches):
    self._left = batches

  def requested(self, step):
    del step
    self._left -= 1
    return self._left == 0


def keeper_in(directory, stop_after=0, key=None):
  stop = StopAfter(stop_after)
  return epochs.Keeper(
    epath.Path(directory),
    lambda: contextlib.nullcontext(stop),
    key or {"protocol": "one"},
  )


def train_epoch(epoch, done=0):
  generator = np.random.default_rng(epoch)
  order = generator.permutation(70)
  noise = generator.normal(size=(70, 6)).astype(np.float32)
  for start in range(20 * done, 70, 20):
    rows = order[start : start + 20]
    yield {"image": IMAGES[rows] + noise[rows], "label": LABELS[rows]}


def train_linear(keeper):
  protocol = dataclasses.replace(
    protocols.PROTOCOLS["linear/imsvd"], epochs=3, learning_rate=0.5
  )
  return linear.train_linear(
    jax.jit(lambda images: 2 * images),
    *(train_epoch, TEST, protocol),
    num_classes=3,
    keeper=keeper,
  )


def train_probe(keeper):
  protocol = dataclasses.replace(
    protocols.PROTOCOLS["linear/probe"], epochs=3, batch_size=20
  )
  return probe.linear_probe(Features(IMAGES, LABELS), TEST, protocol, keeper)


def assert_same(one, two):
  assert jax.tree.structure(one) == jax.tree.structure(two)
  jax.tree.map(np.testing.assert_array_equal, one, two)


# After the first batch, within an epoch, at an epoch's last batch, after its
# end, after the last epoch; for the probe also in its second fit.
@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 6, 15])
@pytest.mark.parametrize("train", [train_linear, train_probe])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, train, stop_after):
  whole = train(None)
  with pytest.raises(Stopped) as stopped:
    train(keeper_in(tmp_path, stop_after))
  assert stopped.value.code == 75
  assert list(tmp_path.iterdir())
  with contextlib.suppress(Stopped):  # A second time, or the end.
    train(keeper_in(tmp_path, 2))
  keeper = keeper_in(tmp_path)
  assert_same(train(keeper), whole)
  assert_same(train(keeper_in(tmp_path)), whole)  # Nothing left to train.
  keeper.remove()
  assert train is train_probe or not tmp_path.exists()


def test_only_the_same_training_goes_on(tmp_path):
  with pytest.raises(Stopped):
    train_linear(keeper_in(tmp_path, 3))
  other = keeper_in(tmp_path, key={"protocol": "two"})
  assert other.restore(epochs.Standing(None)).epoch == 0
  assert_same(train_linear(other), train_linear(None))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "replaced"])
def test_a_damaged_file_starts_again(tmp_path, capfd, damage):
  keeper = keeper_in(tmp_path, 3)
  with pytest.raises(Stopped):
    train_linear(keeper)
  content = bytearray(keeper.path.read_bytes())
  content[len(content) // 2] ^= 1
  keeper.path.write_bytes(
    {
      "cut": content[: len(content) // 2],
      "flipped": content,
      "empty": b"",
      "replaced": b"no archive",
    }[damage]
  )
  assert_same(train_linear(keeper_in(tmp_path)), train_linear(None))
  assert "is damaged (" in capfd.readouterr().err


def test_a_file_that_cannot_be_read_is_kept(tmp_path, monkeypatch):
  keeper = keeper_in(tmp_path, 3)
  with pytest.raises(Stopped):
    train_linear(keeper)
  before = keeper.path.read_bytes()

  def fails(path):
    raise OSError(5, "Input/output error")

  with monkeypatch.context() as patch:
    patch.setattr(epochs.files, "read_if_there", fails)
    with pytest.raises(UserError, match=r"Cannot read .*Input/output error"):
      train_linear(keeper_in(tmp_path))
  assert keeper.path.read_bytes() == before


def test_a_disk_that_refuses_does_not_end_the_training(
  tmp_path, monkeypatch, capfd
):
  def full(path, content):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(epochs.files, "write_whole", full)
  monkeypatch.setattr(epochs, "EVERY_SECONDS", 0.0)
  assert_same(train_linear(keeper_in(tmp_path)), train_linear(None))
  assert "Cannot keep what is done so far" in capfd.readouterr().err
  with pytest.raises(Stopped) as stopped:
    train_linear(keeper_in(tmp_path, 3))
  assert stopped.value.code == 2


# --- The command --------------------------------------------------------------

SETTINGS = {
  "linear/imsvd": ("crops=run", "learning_rate=3"),
  "linear/probe": ("learning_rates=0.1,1",),
  "finetune/10pct": ("crops=run", "batch_size=16"),
}


def settings_of(epochs_, *names):
  return [f"epochs={epochs_}"] + [
    f"{name}:{setting}" for name in names for setting in SETTINGS[name]
  ]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return save_run(tmp_path_factory.mktemp("run"), digits_config())


def measure(workdir, output, *names):
  chosen = Options(
    (workdir,),
    names,
    tuple(settings_of(3, *names)),
    output=str(output),
    cache=f"{workdir}/features",
  )
  return [dict(r.values) for r in offline.evaluate_runs(chosen)]


@pytest.mark.parametrize(
  ("name", "batches"),
  [("linear/imsvd", 8), ("linear/probe", 20), ("finetune/10pct", 12)],
)
def test_a_stopped_measurement_goes_on(
  workdir, tmp_path, monkeypatch, name, batches
):
  whole = measure(workdir, tmp_path / "whole", name)
  stopping = lambda: contextlib.nullcontext(StopAfter(batches))
  monkeypatch.setattr(offline.interruption, "StopRequest", stopping)
  with pytest.raises(Stopped):
    measure(workdir, tmp_path / "parts", name)
  assert not (tmp_path / "parts" / "results.json").exists()
  monkeypatch.undo()
  assert measure(workdir, tmp_path / "parts", name) == whole
  assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == [
    "results.json",
    "tensorboard",
  ]


def start(workdir, output, every_seconds):
  """Starts the command on two protocols; the second is to be interrupted."""
  names = ("linear/imsvd", "finetune/10pct")
  program = (
    f"import sys; sys.argv[0] = 'imsvd'; from imsvd_jax.evaluation import"
    f" epochs; epochs.EVERY_SECONDS = {every_seconds};"
    " from imsvd_jax.__main__ import main; main()"
  )
  return subprocess.Popen(
    [
      *(sys.executable, "-c", program, "evaluate"),
      f"--workdir={workdir}",
      f"--protocol={','.join(names)}",
      *(f"--set={setting}" for setting in settings_of(12, *names)),
      f"--output={output}",
      f"--cache={workdir}/features",
    ],
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )


def wait_for(happened, process):
  deadline = time.monotonic() + 300
  while not happened():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.02)


@pytest.mark.proof
def test_signals_and_kills_lose_nothing(workdir, tmp_path):
  whole = start(workdir, tmp_path / "whole", 1000)
  _, said = whole.communicate()
  assert whole.returncode == 0, said
  parts = tmp_path / "parts"
  kept = lambda: sorted((parts / "unfinished").glob("*.npz"))
  for number, code in (
    (signal.SIGTERM, 75),
    (signal.SIGKILL, -9),
    (signal.SIGINT, 75),
  ):
    process = start(workdir, parts, 0.0)
    before = [path.stat().st_mtime_ns for path in kept()]
    changed = lambda old=before: (
      old != [path.stat().st_mtime_ns for path in kept()] and kept()
    )
    wait_for(changed, process)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert ("The same command goes on" in said) == (code == 75)
  last = start(workdir, parts, 1000)
  _, said = last.communicate()
  assert last.returncode == 0, said
  assert "Goes on after" in said
  assert not kept()
  one, two = (
    [
      entry["values"]
      for entry in read_results(tmp_path / name / "results.json")
    ]
    for name in ("whole", "parts")
  )
  assert one == two


@pytest.mark.proof
def test_sigterm_before_the_training_has_the_code_of_what_is_kept(
  workdir, tmp_path
):
  process = start(workdir, tmp_path, 1000)
  line = process.stderr.readline()
  while "linear/imsvd ..." not in line:
    line = process.stderr.readline()
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate()
  assert process.returncode == 75, said
