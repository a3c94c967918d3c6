"""`benchmark gpu`: its parts, and PyTorch's step."""

import json
import time

import jax
import pytest

from configs import imagenet_r50
from imsvd_jax.base.errors import UserError
from imsvd_jax.benchmarks import gpu_suite, step_profile, torch_step
from imsvd_jax.training import experiment, step


def run(monkeypatch, tmp_path, parts, *, seconds=60.0):
  monkeypatch.setattr(gpu_suite, "parts", lambda *a, **k: parts)
  return gpu_suite.benchmark(
    [], batch_size=2, seconds=seconds, output=str(tmp_path / "out")
  )


def python(name, program, seconds=30.0, **environment):
  # `python -m code` would read from the keyboard; -m takes the part's words.
  return gpu_suite.Part(name, ("tests.run_code", program), seconds, environment)


def test_a_failure_and_a_timeout_cost_the_others_nothing(monkeypatch, tmp_path):
  parts = [
    python("fails", "raise SystemExit('no such GPU')"),
    python("hangs", "import time; time.sleep(99)", seconds=1.0),
    python(
      "works",
      "import os, json; print(json.dumps({'benchmark': 'step',"
      " 'images_per_second': float(os.environ['RATE']), 'shares': {}}))",
      RATE="50",
    ),
  ]
  start = time.monotonic()
  text, numbers = run(monkeypatch, tmp_path, parts)
  assert time.monotonic() - start < 30
  assert [part["code"] for part in numbers["parts"]] == [1, None, 0]
  assert json.loads(json.dumps(numbers)) == numbers
  assert "| fails | code 1; no such GPU |" in text
  assert "| hangs | stopped after 1 s" in text
  assert "| works | 50 images/s, 100 views/s |" in text
  assert (tmp_path / "out" / "report.md").read_text() == text


def test_no_part_starts_without_time(monkeypatch, tmp_path):
  _, numbers = run(monkeypatch, tmp_path, [python("one", "1")], seconds=5.0)
  assert numbers["parts"] == []


def test_user_mistakes(tmp_path):
  (tmp_path / "file").touch()
  for output, only, message in (
    (tmp_path / "file" / "x", [], "--output=.* cannot be written"),
    (tmp_path, ["stepp"], "Unknown part 'stepp'.*'step'"),
  ):
    with pytest.raises(UserError, match=message):
      gpu_suite.benchmark(
        [], batch_size=2, seconds=1.0, output=str(output), only=only
      )


@pytest.mark.proof
def test_the_step_of_a_tiny_recipe(tmp_path):
  """The first parts as they run on a GPU."""
  sizes = [f"--config.views.view{v}.size=16" for v in (1, 2)]
  config = ["--config=configs/digits.py:debug", *sizes]
  gpu_suite.benchmark(
    config,
    batch_size=16,  # Half of it on each of eight devices.
    seconds=900.0,
    output=str(tmp_path),
    only=["step", "step_half"],
  )
  whole, half = (
    json.loads((tmp_path / f"{name}.json").read_text())
    for name in ("step", "step_half")
  )
  assert (whole["batch_size"], half["batch_size"]) == (16, 8)
  assert whole["shares"]
  assert not half["shares"]
  by_part = step_profile.by_part(
    [step_profile.Operation(**one) for one in whole["profile"]]
  )
  assert by_part["backbone"] > by_part["augment"] > 0
  assert sum(by_part.values()) == pytest.approx(1)


TEXT = """
ENTRY %main (p: f32[2]) -> f32[2] {
  %add.1 = f32[2] add(%p, %p), metadata={op_name="jit(step)/augment/add"}
  ROOT %mul.2 = f32[2] multiply(%add.1, %p), metadata={op_name="jit(step)/\
transpose(jvp(Encoder))/backbone/mul"}
}
""".replace("\\\n", "")


def test_kernels_of_a_gpu_are_named_by_the_program():
  """Those of a graph bear the graph's name; other rows repeat them."""
  row = {"pid": 1, "tid": 7}
  events = [
    {"name": "thread_name", "args": {"name": "Stream #7"}, **row},
    {"name": "add_1", "dur": 30.0, "args": {"hlo_op": "add.1"}, **row},
    {"name": "mul_2", "dur": 60.0, "args": {"hlo_op": "graph_1"}, **row},
    {"name": "copy", "dur": 30.0, "args": {}, **row},
    {
      "name": "add_1",
      "dur": 9.0,
      "args": {"hlo_op": "add.1"},
      "pid": 1,
      "tid": 8,
    },
  ]
  found = step_profile.summarize({"traceEvents": events}, TEXT)
  assert [one.name for one in found] == ["mul.2", "add.1", "copy"]
  assert [one.share for one in found] == [0.5, 0.25, 0.25]
  assert step_profile.by_part(found) == {
    "backward backbone": 0.5,
    "augment": 0.25,
    "other": 0.25,
  }
  assert step_profile.by_kind(found)["mul"] == 0.5


def test_pytorch_has_the_same_network():
  pytest.importorskip("torch")
  config = imagenet_r50.get_config()
  config.model.projector = (64, 160)
  build = experiment.build(config, 1000)
  state = jax.eval_shape(lambda: step.init_state(build))
  ours = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  network = torch_step._network(config)
  assert sum(p.numel() for p in network.parameters()) == ours


@pytest.mark.proof
def test_pytorch_takes_steps():
  pytest.importorskip("torch")
  config = imagenet_r50.get_config()
  config.batch_size = 4
  config.views.view1.size = config.views.view2.size = 32
  config.model.projector = (64, 160)
  text, numbers = torch_step.benchmark(
    config, name="tiny", rounds=1, compiled=False
  )
  assert "in PyTorch" in text
  assert -8 < numbers["loss"] < 0
  config.objective.name = "vicreg"
  with pytest.raises(UserError, match="with imsvd's loss"):
    torch_step.measure(config, rounds=1, compiled=False)
