"""All that matters on a GPU in one command that ends in time.

Each part is a command of its own, in a process of its own: a part that fails or
takes too long costs the others nothing. The most valuable parts come first.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from imsvd_jax.base import console
from imsvd_jax.base.errors import UserError, suggestion
from imsvd_jax.benchmarks.text import Findings

_LEAST = 10.0  # Seconds; a part is not started with less.
_ROUNDS = "--rounds=10"
# JAX takes 75% of a GPU's memory by itself.
_MEMORY = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
# Tried one by one on the step; docs/benchmarks.md says what each does.
XLA_FLAGS = {
  "no_command_buffer": "--xla_gpu_enable_command_buffer=",
  "latency_hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
  "no_triton_gemm": "--xla_gpu_enable_triton_gemm=false",
  "autotune_5": "--xla_gpu_autotune_level=5",
}


@dataclasses.dataclass(frozen=True)
class Part:
  """A command of the suite."""

  name: str  # Of its files in the output folder.
  words: tuple[str, ...]  # After `python -m`.
  seconds: float  # It is stopped after them.
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a part went."""

  name: str  # The part's.
  command: str  # As it was run.
  code: int | None  # None: stopped because its time was over.
  seconds: float  # By the clock, from start to end.
  numbers: Any  # What it printed as JSON; None if it printed none.
  last_line: str  # Of its log.


def parts(
  config: Sequence[str], *, batch_size: int, output: pathlib.Path
) -> list[Part]:
  """Returns the parts in their order.

  Args:
    config: The flags that name the recipe and change it.
    batch_size: The recipe's.
    output: Folder for results.
  """

  def command(name: str, *words: str) -> tuple[str, ...]:
    return ("imsvd_jax", "benchmark", name, "--json", *words)

  def step(*words: str, batch: int = batch_size) -> tuple[str, ...]:
    size = f"--config.batch_size={batch}"
    return command("step", *config, size, _ROUNDS, *words)

  torch = command("torch_step", *config, _ROUNDS)
  profile = f"--profile={output / 'profile'}"
  tests = pathlib.Path(__file__).parents[2] / "tests"
  return [
    Part("step", step(profile), 200, _MEMORY),
    Part("loss", command("loss", _ROUNDS), 80),
    Part("torch", torch, 60),
    Part("step_half", step("--noparts", batch=batch_size // 2), 100, _MEMORY),
    Part("torch_compiled", (*torch, "--compile"), 120),
    Part("precision", command("precision"), 60),
    Part(
      "loss_bf16x3",
      command(
        "loss", _ROUNDS, "--noalternatives", "--precision=BF16_BF16_F32_X3"
      ),
      50,
    ),
    Part(
      "loss_tf32",
      command("loss", _ROUNDS, "--noalternatives", "--precision=TF32_TF32_F32"),
      50,
    ),
    Part("tests", ("pytest", "-q", "-m", "gpu", str(tests)), 250, _MEMORY),
    *(
      Part(
        f"flag_{name}",
        step("--noparts"),
        100,
        {**_MEMORY, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}"},
      )
      for name, flag in XLA_FLAGS.items()
    ),
  ]


def benchmark(
  config: Sequence[str],
  *,
  batch_size: int,
  seconds: float,
  output: str,
  only: Sequence[str] = (),
) -> Findings:
  """Runs the parts until the time is over.

  Args:
    config: The flags that name the recipe and change it.
    batch_size: The recipe's.
    seconds: For all parts together.
    output: Folder for a JSON and a log of each part, and report.md.
    only: Names of the parts to run; all if empty.

  Raises:
    UserError: The folder cannot be written, or there is no such part.
  """
  path = pathlib.Path(output)
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f"--output={output} cannot be written: {error.strerror}."
    ) from error
  chosen = _choose(parts(config, batch_size=batch_size, output=path), only)
  end = time.monotonic() + seconds
  outcomes: list[Outcome] = []
  for part in chosen:
    left = end - time.monotonic()
    if left < _LEAST:
      console.print_line(f"{part.name}: left out, no time is left.")
      continue
    outcomes.append(_run(part, min(part.seconds, left), path))
    # After every part, so that an interruption loses nothing.
    (path / "report.md").write_text(as_markdown(outcomes))
  numbers = {
    "benchmark": "gpu",
    "parts": [dataclasses.asdict(outcome) for outcome in outcomes],
  }
  return Findings(as_markdown(outcomes), numbers)


def _choose(all_parts: list[Part], only: Sequence[str]) -> list[Part]:
  names = [part.name for part in all_parts]
  for name in only:
    if name not in names:
      raise UserError(
        f"Unknown part {name!r}.{suggestion(name, names)} Known:"
        f" {', '.join(names)}."
      )
  return [part for part in all_parts if not only or part.name in only]


def _run(part: Part, seconds: float, output: pathlib.Path) -> Outcome:
  command = [sys.executable, "-m", *part.words]
  printed, log = (output / f"{part.name}.{kind}" for kind in ("json", "log"))
  console.print_line(f"{part.name}: at most {seconds:.0f} s.")
  start = time.monotonic()
  with printed.open("wb") as stdout, log.open("wb") as stderr:
    process = subprocess.Popen(
      command,
      stdout=stdout,
      stderr=stderr,
      env={**os.environ, **part.environment},
      start_new_session=True,  # To stop it with all that it started.
    )
    code: int | None
    try:
      code = process.wait(seconds)
    except subprocess.TimeoutExpired:
      code = None
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
  outcome = Outcome(
    name=part.name,
    command=" ".join(
      [*(f"{k}={v!r}" for k, v in part.environment.items()), *part.words]
    ),
    code=code,
    seconds=time.monotonic() - start,
    numbers=_read_json(printed),
    last_line=_last_line(log) or _last_line(printed),
  )
  console.print_line(f"{part.name}: {_summary(outcome)}")
  return outcome


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_text())
  except ValueError:  # A part that failed, or that prints no JSON.
    return None


def _last_line(path: pathlib.Path) -> str:
  lines = path.read_text(errors="replace").strip().splitlines()
  return lines[-1] if lines else ""


def _summary(outcome: Outcome) -> str:
  """Returns the figure that matters of a part, or why there is none."""
  if outcome.code is None:
    return f"stopped after {outcome.seconds:.0f} s; {outcome.last_line}"
  numbers = outcome.numbers
  if outcome.code or numbers is None:
    return f"code {outcome.code}; {outcome.last_line}"
  kind = numbers["benchmark"]
  if kind in ("step", "torch_step"):
    rate = numbers["images_per_second"]
    text = f"{rate:,.0f} images/s, {2 * rate:,.0f} views/s"
    shares = numbers.get("shares") or {}
    return text + "".join(f", {k} {v:.1%}" for k, v in shares.items())
  if kind == "loss":
    return ", ".join(
      f"{one['name']} {1000 * one['seconds']['median']:.3g} ms"
      for one in numbers["results"]
      if one["seconds"]
    )
  return f"{len(numbers.get('errors', ()))} errors measured"


def as_markdown(outcomes: Sequence[Outcome]) -> str:
  """Returns the report."""
  lines = ["| part | result | seconds |", "|---|---|---|"]
  for outcome in outcomes:
    text = _summary(outcome).replace("|", "\\|")
    lines.append(f"| {outcome.name} | {text} | {outcome.seconds:.0f} |")
  lines.append("")
  lines += [f"- {one.name}: `{one.command}`" for one in outcomes]
  return "\n".join(lines) + "\n"
