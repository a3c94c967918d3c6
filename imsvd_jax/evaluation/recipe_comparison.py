"""Trains recipes with several seeds and puts what they reached side by side."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from imsvd_jax import data
from imsvd_jax.base import console, devices, recipe_files
from imsvd_jax.base.config import flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation.scores import wilson_interval
from imsvd_jax.evaluation.tables import seed_interval
from imsvd_jax.runs import metrics, resume
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

ACCURACIES = {"knn": "k-NN", "linear": "linear"}
BASELINES = ("raw pixels", "random init")

# Columns of the table of diagnostics and how they are printed.
DIAGNOSTICS = {
  "information": "{:.0%}",
  "marginal_entropy_min": "{:.0%}",
  "max_probability": "{:.2f}",
  "argmax_agreement": "{:.0%}",
  "dead_bins": "{:.0%}",
  "embedding_std": "{:.2f}",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe as it was named on the command line.

  Attributes:
    argument: "configs/comparison.py:digits-imsvd".
    name: "digits-imsvd", or the file's name where there is no mode.
    config: What it returned.
  """

  argument: str
  name: str
  config: Any

  @property
  def data_name(self) -> str:
    """What the run trains on."""
    return self.config.data.name


@dataclasses.dataclass(frozen=True)
class Run:
  """What one finished run left in its workdir.

  Attributes:
    accuracies: {"trained": {"knn": ..., "linear": ..., "num_images": ...}}, and
      the baselines where the run measured them; shares, not percent.
    last: The last line of metrics.jsonl that has a loss.
  """

  accuracies: Mapping[str, Mapping[str, float]]
  last: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds per train step: median, least and greatest of the rounds."""

  median: float
  least: float
  greatest: float


def compare(
  recipes: Sequence[str],
  *,
  seeds: Sequence[int],
  workdir: str,
  timing_steps: int = 5,
) -> int:
  """Trains, measures, and prints and writes the tables.

  Args:
    recipes: "FILE.py" or "FILE.py:MODE" each.
    seeds: Every recipe runs with each.
    workdir: Runs go to WORKDIR/NAME-seedS, tables to WORKDIR/comparison.md.
    timing_steps: Steps per round of the timing, 0 for none.

  Returns:
    0, or 1 if a run failed.

  Raises:
    UserError: A recipe cannot be read, or has changed since a run of it ended,
      or its runs have no accuracy to compare.
  """
  loaded = [load_recipe(recipe) for recipe in recipes]
  if not loaded:
    raise UserError("No recipe given; expected one or more, FILE.py[:MODE].")
  names = [recipe.name for recipe in loaded]
  if len(set(names)) < len(names):
    raise UserError(f"Two recipes have one name; found {', '.join(names)}.")
  for recipe in loaded:
    if not recipe.config.eval.final:
      raise UserError(
        f"{recipe.argument} has eval.final=False and would end without an"
        " accuracy to compare; set it in the recipe."
      )
  root = pathlib.Path(workdir).expanduser().resolve()
  root.mkdir(parents=True, exist_ok=True)
  folders = {
    (recipe.name, seed): root / f"{recipe.name}-seed{seed}"
    for recipe in loaded
    for seed in seeds
  }
  for recipe in loaded:
    for seed in seeds:
      _check_unchanged(recipe, seed, folders[recipe.name, seed])
  failed = _train_all(loaded, seeds, folders, root)
  runs = {
    recipe.name: [
      read_run(folders[recipe.name, seed])
      for seed in seeds
      if (recipe.name, seed) not in failed
    ]
    for recipe in loaded
  }
  timings = _time_steps(loaded, timing_steps) if timing_steps else {}
  text = tables(loaded, runs, timings)
  (root / "comparison.md").write_text(text)
  print(text)
  console.say(f"Written to {root / 'comparison.md'}.")
  for name, seed in failed:
    console.say(f"error: {name} with seed {seed} failed; it is left out above.")
  return int(bool(failed))


def parse_seeds(texts: Iterable[str]) -> list[int]:
  """Returns the seeds as numbers.

  Raises:
    UserError: One is not a number.
  """
  try:
    return [int(text) for text in texts]
  except ValueError as error:
    raise UserError(
      f"--seeds={','.join(texts)}; expected numbers such as 0,1,2."
    ) from error


def load_recipe(argument: str) -> Recipe:
  """Returns the recipe that `FILE.py[:MODE]` names.

  Raises:
    UserError: There is no such file, it imports what is not there, or it does
      not know the mode.
  """
  path, mode = recipe_files.locate(argument)
  loader = importlib.machinery.SourceFileLoader("recipe", path)
  spec = importlib.util.spec_from_loader("recipe", loader)
  module = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(module)
    config = module.get_config(mode)
  except ImportError as error:
    raise UserError(recipe_files.import_failed(error)) from error
  except (AttributeError, SyntaxError, ValueError) as error:
    raise UserError(f"{argument}: {error}") from error
  return Recipe(argument, mode or pathlib.Path(path).stem, config)


def _check_unchanged(recipe: Recipe, seed: int, folder: pathlib.Path) -> None:
  """Raises if a run has ended that is not what the recipe says now."""
  if not (folder / "final.json").exists():
    return
  stored = flatten(resume.load_config(folder))
  # As JSON has it, which has no tuples.
  current = json.loads(json.dumps({**recipe.config.to_dict(), "seed": seed}))
  current = flatten(current)
  keys = sorted(stored.keys() | current.keys())
  changed = [key for key in keys if stored.get(key) != current.get(key)]
  if changed:
    raise UserError(
      f"{folder} holds a finished run of another configuration than"
      f" {recipe.argument} has now: {', '.join(changed)} differ(s). Remove the"
      " run, or choose another --workdir."
    )


def _train_all(recipes, seeds, folders, root) -> list[tuple[str, int]]:
  """Trains what has not ended yet; returns the runs that failed."""
  todo = [
    (recipe, seed)
    for recipe in recipes
    for seed in seeds
    if not (folders[recipe.name, seed] / "final.json").exists()
  ]
  start = time.monotonic()
  failed = []
  for done, (recipe, seed) in enumerate(todo):
    left = ""
    if done:
      seconds = (time.monotonic() - start) / done * (len(todo) - done)
      left = f", {console.duration(seconds)} left"
    console.say(
      f"\n=== {recipe.name}, seed {seed}: run {done + 1} of {len(todo)}{left}"
    )
    command = [sys.executable, "-m", "imsvd_jax.main"]
    command += [f"--config={recipe.argument}", f"--config.seed={seed}"]
    command += [f"--workdir={folders[recipe.name, seed]}"]
    # Runs that differ in their seed compile the same programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    environment = cache | os.environ
    code = subprocess.run(command, env=environment, check=False).returncode
    if code == 2 or code < 0 or code >= 75:
      raise UserError(
        f"{recipe.name} with seed {seed} ended with exit code {code}, as it"
        " says above; the same command continues."
      )
    if code:
      failed.append((recipe.name, seed))
  return failed


def read_run(folder: pathlib.Path) -> Run:
  """Returns what a finished run left.

  Raises:
    UserError: It has not ended, or evaluated nothing.
  """
  try:
    accuracies = json.loads((folder / "final.json").read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{folder} has no readable final.json; expected a run that has ended and"
      " has labelled held-out images."
    ) from error
  lines = [x for x in metrics.read_metrics(str(folder)) if "loss" in x]
  return Run(accuracies, lines[-1])


def _time_steps(recipes: Sequence[Recipe], steps: int) -> dict[str, Timing]:
  """Times the train step of every recipe, all in turn in each of three rounds.

  The machine's other work then falls on all alike. Batches are random pixels.
  """
  mesh = devices.make_mesh()
  jobs = {}
  for recipe in recipes:
    console.say(f"Timing {recipe.name}: compiling ...")
    source = data.make_source(recipe.config.data, "train")
    experiment = experiment_lib.build(recipe.config, source.num_examples)
    replicated = devices.replicated(mesh)
    step = step_lib.jit_train_step(experiment, replicated)
    init = jax.jit(
      lambda experiment=experiment: step_lib.init_state(experiment),
      out_shardings=replicated,
    )
    rng = np.random.default_rng(0)
    batch = jax.tree.map(
      lambda x, rng=rng: rng.integers(0, 256, x.shape).astype(x.dtype),
      experiment_lib.abstract_batch(recipe.config),
    )
    batch = devices.shard_batch(batch, mesh)
    state, _ = jax.block_until_ready(step(init(), batch))
    jobs[recipe.name] = [step, state, batch]
  seconds = {name: [] for name in jobs}
  for _ in range(3):
    for name, job in jobs.items():
      step, state, batch = job
      start = time.monotonic()
      for _ in range(steps):
        state, _ = step(state, batch)
      jax.block_until_ready(state)
      job[1] = state
      seconds[name].append((time.monotonic() - start) / steps)
  return {
    name: Timing(statistics.median(values), min(values), max(values))
    for name, values in seconds.items()
  }


def _term_names(config: Any) -> list[str]:
  """Names of the objective's terms, as the train step reports them."""
  experiment = experiment_lib.build(config, config.batch_size)
  state = jax.eval_shape(lambda: step_lib.init_state(experiment))
  _, values = jax.eval_shape(
    lambda state, batch: step_lib.train_step(experiment, state, batch),
    state,
    experiment_lib.abstract_batch(config),
  )
  return list(values["terms"])


def tables(
  recipes: Sequence[Recipe],
  runs: Mapping[str, Sequence[Run]],
  timings: Mapping[str, Timing],
) -> str:
  """Returns Markdown: for each data set accuracies, then terms and figures."""
  parts = []
  for data_name in dict.fromkeys(recipe.data_name for recipe in recipes):
    group = [recipe for recipe in recipes if recipe.data_name == data_name]
    group = [recipe for recipe in group if runs[recipe.name]]
    if not group:
      continue
    parts += [f"### {data_name}", ""]
    parts += _accuracy_table(group, runs, timings)
    parts += ["", *_figures_table(group, runs), ""]
  return "\n".join(parts)


def _accuracy_table(group, runs, timings) -> list[str]:
  every = [run for recipe in group for run in runs[recipe.name]]
  num_images = int(every[0].accuracies["trained"]["num_images"])
  header = ["", *(f"{x} % [95% interval]" for x in ACCURACIES.values())]
  header += ["seeds", "s per step [least, greatest]", "relative"]
  rows = []
  for name in BASELINES:
    rows_of = [r.accuracies[name] for r in every if name in r.accuracies]
    if rows_of:
      # Recipes that share network and seed share this too: a range says more.
      cells = [_range([row[key] for row in rows_of]) for key in ACCURACIES]
      rows.append([name, *cells, "", "", ""])
  for recipe in group:
    found = [run.accuracies["trained"] for run in runs[recipe.name]]
    cells = [
      format_mean([row[key] for row in found], num_images) for key in ACCURACIES
    ]
    rows.append([recipe.name, *cells, str(len(found))])
    timing = timings.get(recipe.name)
    if timing is None:
      rows[-1] += ["", ""]
      continue
    relative = timing.median / timings[group[0].name].median
    rows[-1] += [
      f"{timing.median:.3f} [{timing.least:.3f}, {timing.greatest:.3f}]",
      f"{relative:.2f}",
    ]
  note = (
    f"{num_images} held-out images. Interval: Student's t over the seeds, which"
    " covers what training does by chance; with one seed Wilson's over the"
    " images, which covers the choice of images only."
  )
  return [*_markdown(header, rows), "", note]


def _figures_table(group, runs) -> list[str]:
  header = ["at the end", "loss", "terms", *DIAGNOSTICS, "above floor"]
  rows = []
  for recipe in group:
    lines = [run.last for run in runs[recipe.name]]
    mean = {
      key: statistics.fmean(line[key] for line in lines) for key in lines[0]
    }
    terms = ", ".join(
      f"{name} {mean[name]:.3f}" for name in _term_names(recipe.config)
    )
    row = [recipe.name, f"{mean['loss']:.3f}", terms]
    row += [
      form.format(mean[key]) if key in mean else ""
      for key, form in DIAGNOSTICS.items()
    ]
    above = ""
    if "off_diagonal_floor" in mean:
      above = f"{mean['off_diagonal'] - mean['off_diagonal_floor']:+.2f}"
    rows.append([*row, above])
  return _markdown(header, rows)


def format_mean(values: Sequence[float], num_images: int) -> str:
  """Returns "98.3 [97.7, 98.9]": the mean and its 95% interval, in percent.

  Args:
    values: A share per seed.
    num_images: Held-out images, for the interval of a single seed.
  """
  mean = statistics.fmean(values)
  if len(values) == 1:
    low, high = wilson_interval(round(mean * num_images), num_images)
  else:
    _, (low, high) = seed_interval(values)
    low, high = max(0.0, low), min(1.0, high)
  return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _range(values: Sequence[float]) -> str:
  low, high = f"{100 * min(values):.1f}", f"{100 * max(values):.1f}"
  return low if low == high else f"{low} to {high}"


def _markdown(
  header: Sequence[str], rows: Sequence[Sequence[str]]
) -> list[str]:
  lines = [header, ["---"] * len(header), *rows]
  return ["| " + " | ".join(line) + " |" for line in lines]
