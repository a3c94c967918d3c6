"""Costs of the real train step, and the search for the largest batch."""

import collections
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import pytest

from configs import digits
from imsvd_jax.benchmarks import compiler_process, preflight_compile
from imsvd_jax.benchmarks.costs import chips, compiled_step, slices
from imsvd_jax.benchmarks.text import quantity
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib
from tests.run_command import (
  ROOT,
  check_refused,
  one_line_error,
  run_imsvd,
  run_python,
)

NUM_EXAMPLES = 1437
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='needs libtpu: pip install -e ".[tpu]"',
)


def debug_config(**overrides):
  config = digits.get_config("debug")
  config.update_from_flattened_dict(overrides)
  return config


# For compiling for TPUs that are not there, in a process of its own: the TPU's
# library and its settings stay out of this one.
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
DEBUG = "--config=configs/digits.py:debug"


def run_preflight(*flags, **environment):
  return run_imsvd("preflight", DEBUG, *flags, **NO_TPU, **environment)


@pytest.fixture(scope="module")
def cpu_report():
  return compiled_step.measure(
    debug_config(), slices.get_slice("cpu:8"), NUM_EXAMPLES
  )


# --- The report ---------------------------------------------------------------


def expected_state_bytes():
  experiment = experiment_lib.build(debug_config(), NUM_EXAMPLES)
  state = jax.eval_shape(lambda: step_lib.init_state(experiment))
  size = lambda tree: sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
  return size((state.params, state.batch_stats)), size(state.opt_state)


def check_figures(figures):
  """What holds for any compiler."""
  memory, parts = figures["memory"], figures["parts"]
  assert (memory["parameters"], memory["optimizer"]) == expected_state_bytes()
  images = 16 / 8 * 2 * 32 * 32 * 3  # uint8, two views of each.
  assert memory["batch"] == images + 2 * 16 / 8 * 4
  known = memory["parameters"] + memory["optimizer"] + memory["batch"]
  assert memory["peak"] > known
  assert memory["fits"]
  # Backward and forward of two views on two images per chip.
  assert parts["backbone"]["flops"] > 1e6
  assert parts["projector"]["flops"] > 0
  assert parts["objective"]["flops"] > 0
  assert parts["augment"]["flops"] == 0
  assert figures["hbm_bytes"] > 0
  all_reduce = all_reduces(figures)
  assert all_reduce["sent_bytes"] == pytest.approx(
    2 * 7 / 8 * all_reduce["bytes"]
  )
  assert figures["unknown_loops"] == 0


def all_reduces(figures):
  (found,) = (c for c in figures["collectives"] if c["kind"] == "all-reduce")
  return found


def test_costs_on_the_cpu(cpu_report):
  slice_ = slices.get_slice("cpu:8")
  figures = preflight_compile.as_dict(cpu_report, slice_, NUM_EXAMPLES)
  check_figures(figures)
  # The least that data parallelism must do: all-reduce every gradient.
  assert all_reduces(figures)["bytes"] > figures["memory"]["optimizer"]
  assert cpu_report.bound is None
  assert cpu_report.memory.available is None


@pytest.mark.proof
@needs_libtpu
def test_costs_on_a_tpu_that_is_not_there():
  result = run_preflight(
    "--config.model.dtype=bfloat16", "--topology=v5e:2x4", "--json"
  )
  assert result.returncode == 0, result.stderr
  figures = json.loads(result.stdout)
  check_figures(figures)
  memory, bound = figures["memory"], figures["bound"]
  assert 15 * chips.GIB < memory["available"] < 16 * chips.GIB
  assert memory["temporaries"] < 100e6
  # Gradients of both views together, in bfloat16, and BatchNorm's statistics.
  gradients = all_reduces(figures)["bytes"]
  assert memory["optimizer"] / 2 < gradients < 0.75 * memory["optimizer"]
  times = [bound[name] for name in ("compute", "memory", "network")]
  assert bound["seconds"] == max(times) > 0
  passes = sum(part["passes_flops"] for part in figures["parts"].values())
  assert passes > figures["flops"]  # The objective's passes.
  assert bound["compute"] == passes / 197e12
  # The recipe's own number of images, since its source makes them.
  assert figures["num_examples"] == 16
  assert bound["seconds_per_epoch"] == bound["seconds"]


@pytest.mark.proof
@needs_libtpu
def test_a_tpu_scatters_gradients_and_gathers_weights():
  """In the type that the network computes in, each weight once."""
  result = run_preflight(
    "--config.model.dtype=bfloat16",
    "--config.model.projector=(512,512)",
    "--topology=v5e:2x4",
    "--compare_sharding",
    "--json",
  )
  assert result.returncode == 0, result.stderr
  figures = json.loads(result.stdout)
  sent = {
    mode: collections.Counter(
      {c["kind"]: c["sent_bytes"] for c in one["collectives"]}
    )
    for mode, one in figures.items()
  }
  assert list(sent) == ["replicated", "optimizer", "all"]
  weights = figures["replicated"]["memory"]["parameters"]
  whole = sent["replicated"]
  for mode in ("optimizer", "all"):
    scattered = sent[mode]["reduce-scatter"] - whole["reduce-scatter"]
    assert 0.3 * weights < scattered < 0.6 * weights, mode  # bfloat16.
    assert sent[mode]["all-reduce"] < 0.3 * whole["all-reduce"], mode
  gathered = {
    mode: sent[mode]["all-gather"] - whole["all-gather"] for mode in sent
  }
  assert 0.4 * weights < gathered["all"] < 0.6 * weights
  assert gathered["optimizer"] < 1.1 * weights
  state = {
    mode: (one["memory"]["parameters"], one["memory"]["optimizer"])
    for mode, one in figures.items()
  }
  assert state["optimizer"][0] == weights
  assert state["all"][0] < weights / 6
  for mode in ("optimizer", "all"):
    assert state[mode][1] < state["replicated"][1] / 6


@pytest.mark.proof
@needs_libtpu
def test_a_batch_that_does_not_fit_is_told_by_a_real_compilation():
  result = run_preflight("--config.batch_size=400000", "--topology=v5e:1x1")
  assert result.returncode == 0, result.stderr
  said = re.search(
    r"DOES NOT FIT: needs (\S+) GiB of 15\.75 GiB, (\S+) GiB too much\.",
    result.stdout,
  )
  assert said, result.stdout
  needed, too_much = map(float, said.groups())
  assert needed > 15.75
  assert too_much == pytest.approx(needed - 15.75, abs=0.011)


def test_the_text_and_the_json_say_the_same(cpu_report):
  slice_ = slices.get_slice("cpu:8")
  text = preflight_compile.as_text(cpu_report, slice_, NUM_EXAMPLES)
  figures = preflight_compile.as_dict(cpu_report, slice_, NUM_EXAMPLES)
  assert json.loads(json.dumps(figures)) == figures
  assert "8 chips, batch 16 (2 per chip)" in text
  assert "No bound on the time" in text
  assert figures["memory"]["fits"]
  assert quantity(figures["flops"]) in text
  for one in figures["collectives"]:
    assert one["kind"] in text
  assert max(len(line) for line in text.splitlines()) <= 88


def test_the_table_of_all_modes(cpu_report):
  bound = compiled_step.Bound(compute=0.5, memory=0.25, network=0.0)
  full = compiled_step.Memory(1e9, 2e9, 1e6, peak=2**35, available=2**34)
  reports = {
    "replicated": dataclasses.replace(cpu_report, memory=full, parts={}),
    "all": dataclasses.replace(cpu_report, bound=bound),
  }
  text = preflight_compile.comparison(reports)
  rows = {line[:34].strip(): line[34:].split() for line in text.splitlines()}
  assert rows["sharding.state"] == list(reports)
  assert rows["fits"] == ["NO", "yes"]
  assert rows["peak, with padding"][:2] == ["32.00", "GiB"]
  assert rows["bound: compute"] == ["-", "500.00", "ms"]
  assert max(len(line) for line in text.splitlines()) <= 88


def test_a_bound_becomes_time_per_epoch(cpu_report):
  chip = chips.CHIPS["v5e"]
  slice_ = slices.Slice("v5e:2x4", chip, (2, 4), [None] * 8)
  bound = compiled_step._bound(cpu_report, slice_)
  report = dataclasses.replace(cpu_report, bound=bound)
  assert bound.memory == report.total("hbm_bytes") / 819e9
  sent = sum(c.sent_bytes for c in report.collectives)
  # 10 links between 8 chips, each with two ends and 50 GB/s either way.
  assert bound.network == pytest.approx(sent / (2 * 10 / 8 * 50e9))
  figures = preflight_compile.as_dict(report, slice_, 1600)
  assert figures["bound"]["seconds_per_epoch"] == 100 * bound.seconds
  assert figures["bound"]["images_per_second"] == 16 / bound.seconds
  text = preflight_compile.as_text(report, slice_, 1600)
  assert "per epoch of 1,600 images" in text
  assert "<- sets the bound" in text
  assert "per million images" in preflight_compile.as_text(report, slice_, None)


def test_a_schedule_is_priced_by_the_epoch():
  schedule, flops = [(0, 8), (1, 16)], {8: 1e9, 16: 4e9}
  phases, fewer = preflight_compile._phases(schedule, flops, epochs=4.0)
  assert [(p["from"], p["to"], p["size"]) for p in phases] == [
    (0, 1, 8),
    (1, 4.0, 16),
  ]
  assert fewer == pytest.approx(4 * 4 / (1 + 3 * 4))
  text = "\n".join(preflight_compile._phase_lines(phases, fewer, ""))
  assert "epochs 1 to 4" in text
  assert "1.23 times fewer FLOP than with 16 pixels throughout" in text


@pytest.mark.proof
def test_every_size_of_a_schedule_is_compiled():
  result = run_preflight(
    "--config.views.resolution_schedule=((0,16),(0.5,32))",
    "--config.accumulate_steps=2",
    "--topology=cpu:2",
    "--json",
  )
  assert result.returncode == 0, result.stderr
  figures = json.loads(result.stdout)
  small, large = figures["resolution_schedule"]["phases"]
  assert (small["size"], large["size"]) == (16, 32)
  assert small["flops_per_epoch"] < 0.5 * large["flops_per_epoch"]
  # An epoch is one step, of 16 images on two devices.
  assert large["flops_per_epoch"] == 2 * figures["flops"]
  assert figures["unknown_loops"] == 0


def test_what_does_not_fit_says_by_how_much():
  memory = compiled_step.Memory(
    1e9, 1e9, 1e6, peak=20 * 2**30, available=15.75 * 2**30
  )
  assert not memory.fits
  assert "DOES NOT FIT" in preflight_compile.verdict(memory)
  assert "4.25 GiB too much" in preflight_compile.verdict(memory)


@pytest.mark.parametrize(
  ("message", "needed"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required"
      " for HLO temporaries (47.68G) exceeds available HBM (15.75G).",
      47.68,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.42G"
      " of 15.75G hbm. Exceeded hbm capacity by 1.67G.",
      17.42,
    ),
  ],
)
def test_a_compilers_refusal_is_read(message, needed):
  found = compiled_step._out_of_memory(RuntimeError(message))
  assert found == (needed * 2**30, 15.75 * 2**30)


def test_another_error_of_the_compiler_is_not_swallowed():
  with pytest.raises(RuntimeError, match="unrelated"):
    compiled_step._out_of_memory(RuntimeError("unrelated"))


@pytest.mark.parametrize(
  ("op_name", "part"),
  [
    ("jit(train_step)/augment/vmap()/mul", "augment"),
    ("jit(train_step)/transpose(jvp(Encoder))/backbone/layer1_0", "backbone"),
    ("jit(train_step)/jvp(Encoder)/projector/dense_0/dot", "projector"),
    ("jit(train_step)/transpose(jvp(objective))/dot_general", "objective"),
    ("jit(train_step)/optimizer/add", "optimizer"),
    ("jit(train_step)/convert_element_type", "other"),
    ("", "other"),
  ],
)
def test_parts_of_the_step(op_name, part):
  assert compiled_step.part_of(op_name) == part


# --- Slices -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("v5e", "expected such as v5e:4x4"),
    ("v5e:4x4x", "Unknown topology"),
    ("v9:2x2", "Unknown chip 'v9'.*v4, v5e, v5p, v6e"),
    ("v5e:3x3", "No v5e slice.*4x4, 4x8"),
    ("v5e:4x4x4", "3 dimensions; v5e slices have 2"),
    ("v4:4x4", "2 dimensions; v4 slices have 3"),
    ("v4:3x3x3", "hosts of 2x2x1"),
    ("v4:0x2x2", "empty"),
    ("cpu:0", "empty"),
    ("cpu:9", "XLA_FLAGS"),
    ("cpu:2x4", "expected cpu:8"),
  ],
)
def test_a_wrong_topology_is_one_clear_line(name, message):
  with one_line_error(message):
    slices.get_slice(name)


def test_without_the_tpu_compiler_it_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with one_line_error(r'pip install "imsvd_jax\[tpu\]"'):
    slices.get_slice("v5e:4x4")


@needs_libtpu
def test_a_device_is_a_chip():
  sizes = {"v5e:1x1": 1, "v5e:16x16": 256, "v6e:8x8": 64}
  sizes |= {"v4:2x2x4": 16, "v5p:2x2x2": 8}
  result = run_python(
    "-c",
    "from imsvd_jax.benchmarks.costs import slices\n"
    f"for name in {list(sizes)}:\n"
    "  print(name, len(slices.get_slice(name).devices))",
    **NO_TPU,
  )
  assert result.returncode == 0, result.stderr
  lines = [line.split() for line in result.stdout.splitlines()]
  assert {name: int(count) for name, count in lines} == sizes


def test_every_chip_says_where_its_figures_come_from():
  for name, chip in chips.CHIPS.items():
    assert chip.name == name
    assert "docs.cloud.google.com" in chip.source
    assert 100 < chip.ridge < 1000


@pytest.mark.parametrize(
  ("chip", "shape", "links"),
  [
    ("v5e", (1, 1), 0),
    ("v5e", (2, 4), 2 * (4 + 2 * 3) / 8),
    ("v5e", (4, 4), 3),
    ("v5e", (16, 16), 4),  # A torus.
    ("v4", (2, 2, 1), 2),
    ("v4", (4, 4, 4), 6),
  ],
)
def test_links_of_a_slice(chip, shape, links):
  assert chips.links_per_chip(chips.CHIPS[chip], shape) == pytest.approx(links)


def test_a_batch_that_does_not_divide_is_one_clear_line():
  config = debug_config(batch_size=20)
  with one_line_error(r"batch_size=20 .*8 devices.*16 or 24"):
    compiled_step.measure(config, slices.get_slice("cpu:8"), NUM_EXAMPLES)


# --- The largest batch --------------------------------------------------------


def memory_model(slope, fixed, available, curve=0.0):
  """A machine whose memory grows with the batch; remembers what was tried."""
  tried = []

  def measure(batch):
    tried.append(batch)
    peak = fixed + slope * batch + curve * batch**2
    return compiled_step.Memory(fixed, 0.0, 0.0, peak=peak, available=available)

  return measure, tried


@pytest.mark.parametrize("start", [64, 1024, 4096, 65536])
@pytest.mark.parametrize("curve", [0.0, 1e-3])
def test_the_largest_batch_is_found_in_a_few_compilations(start, curve):
  measure, tried = memory_model(5.0, 1000.0, 16000.0, curve)
  found = compiled_step.largest_batch(measure, start=start, unit=64)
  fits = [b for b in range(64, 4096, 64) if measure(b).fits]
  tried = tried[: -len(range(64, 4096, 64))]
  assert found in tried  # It was compiled, not guessed.
  assert found % 64 == 0
  assert fits[-1] - found <= max(64, found / 32)
  assert found <= fits[-1]
  assert len(tried) <= 7


def test_a_batch_that_can_never_fit_is_one_clear_line():
  measure, _ = memory_model(5.0, 20000.0, 16000.0)
  with one_line_error("Not even a batch of 64 fits"):
    compiled_step.largest_batch(measure, start=1024, unit=64)


# --- The command line ---------------------------------------------------------


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--topology=v5e:3x3"], "No v5e slice has the shape of 'v5e:3x3'"),
    (["--topology=cpu:8", "--find-batch"], "--find_batch needs the memory"),
    ([], "--topology is missing. Give it, for example --topology=v5e:4x4."),
  ],
)
def test_a_mistake_is_one_clear_line(flags, message):
  check_refused(run_preflight(*flags), message)


@pytest.mark.parametrize(
  ("number", "message"),
  [
    (signal.SIGSEGV, "The compiler crashed (SIGSEGV)"),
    (signal.SIGKILL, "Something killed the compiler (SIGKILL)"),
  ],
)
def test_a_crash_of_the_compiler_is_one_clear_line(tmp_path, number, message):
  (tmp_path / "sitecustomize.py").write_text(
    "import os\n"
    f"if {compiler_process._IS_CHILD!r} in os.environ:\n"
    f"  os.kill(os.getpid(), {int(number)})\n"
  )
  result = run_preflight("--topology=cpu:8", PYTHONPATH=str(tmp_path))
  check_refused(result, message)


def test_a_terminated_preflight_takes_its_compiler_along():
  preflight_ = subprocess.Popen(
    [sys.executable, "-m", "imsvd_jax", "preflight", DEBUG, "--topology=cpu:8"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  children = pathlib.Path(
    f"/proc/{preflight_.pid}/task/{preflight_.pid}/children"
  )
  if not children.exists():
    preflight_.kill()
    pytest.skip("finds the children of a process under /proc")

  def is_python(child: str) -> bool:  # Another is the filter of its stderr.
    return b"python" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()

  while not (found := [*filter(is_python, children.read_text().split())]):
    assert preflight_.poll() is None
    time.sleep(0.05)
  preflight_.terminate()
  assert preflight_.wait(60) == 128 + signal.SIGTERM
  assert not pathlib.Path(f"/proc/{found[0]}").exists()
