"""Trains recipes with several seeds and tabulates their results."""

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from imsvd_jax.base import console, devices, files, recipe_files
from imsvd_jax.base.config import as_json, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.evaluation import protocols, results, tables
from imsvd_jax.evaluation.data_set import DataSet
from imsvd_jax.runs import metrics, resume
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training import step as step_lib

# Columns of the table of diagnostics and their formats.
DIAGNOSTICS = {
  "information": "{:.0%}",
  "marginal_entropy_min": "{:.0%}",
  "max_probability": "{:.2f}",
  "argmax_agreement": "{:.0%}",
  "dead_bins": "{:.0%}",
  "embedding_std": "{:.2f}",
}

_NOTE = (
  "Accuracy in percent on {num_images} held-out images, with its 95% interval:"
  " Student's t over the seeds, which covers chance in training; with one seed"
  " Wilson's over the images, which covers the choice of images alone."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe as it was named on the command line."""

  argument: str  # "configs/comparison.py:digits-imsvd".
  name: str  # "digits-imsvd", or the file's name where there is no mode.
  config: ConfigDict  # What it returned.


class _Job(NamedTuple):
  recipe: Recipe
  seed: int
  folder: pathlib.Path  # Of the run.


class Run(NamedTuple):
  """The results of one finished run."""

  # Entries of results.json: the closing table.
  results: Sequence[Mapping[str, Any]]
  last: Mapping[str, float]  # The last line of metrics.jsonl that has a loss.


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
    raise UserError(
      "No recipe given; expected one or more, NAME or FILE.py[:MODE]."
    )
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
  jobs = [
    _Job(recipe, seed, root / f"{recipe.name}-seed{seed}")
    for recipe in loaded
    for seed in seeds
  ]
  for job in jobs:
    _check_unchanged(*job)
  failed = _train_all(jobs, root)
  runs: dict[str, list[Run]] = {recipe.name: [] for recipe in loaded}
  for job in jobs:
    if job not in failed:
      runs[job.recipe.name].append(read_run(job.folder))
  timings = _time_steps(loaded, timing_steps) if timing_steps else {}
  text = report(loaded, runs, timings)
  files.write_whole(root / "comparison.md", text.encode())
  print(text)
  console.say(f"Written to {root / 'comparison.md'}.")
  for recipe, seed, _ in failed:
    console.say(
      f"error: {recipe.name} with seed {seed} failed; it is left out above."
    )
  return int(bool(failed))


def parse_seeds(texts: Iterable[str]) -> list[int]:
  """Returns the seeds as numbers; UserError if one is not a number."""
  try:
    return [int(text) for text in texts]
  except ValueError as error:
    raise UserError(
      f"--seeds={','.join(texts)}; expected numbers such as 0,1,2."
    ) from error


def load_recipe(argument: str) -> Recipe:
  """Returns the recipe that `NAME[:MODE]` or `FILE.py[:MODE]` names.

  Raises:
    UserError: See `recipe_files.load`.
  """
  config = recipe_files.load(argument)
  path, _, mode = argument.partition(":")
  return Recipe(argument, mode or pathlib.Path(path).stem, config)


def _check_unchanged(recipe: Recipe, seed: int, folder: pathlib.Path) -> None:
  """Raises if a run has ended and its recipe has changed since."""
  if not _closing_table(folder):
    return
  stored = flatten(resume.load_config(folder))
  current = flatten(as_json({**recipe.config.to_dict(), "seed": seed}))
  keys = sorted(stored.keys() | current.keys())
  changed = [key for key in keys if stored.get(key) != current.get(key)]
  if changed:
    raise UserError(
      f"{folder} holds a finished run of another configuration than"
      f" {recipe.argument} has now: {', '.join(changed)} differ(s). Remove the"
      " run, or choose another --workdir."
    )


def _train_all(jobs: Sequence[_Job], root: pathlib.Path) -> list[_Job]:
  """Trains the runs that have not ended; returns those that failed."""
  todo = [job for job in jobs if not _closing_table(job.folder)]
  start = time.monotonic()
  failed = []
  for done, job in enumerate(todo):
    recipe, seed, folder = job
    left = ""
    if done:
      seconds = (time.monotonic() - start) / done * (len(todo) - done)
      left = f", {console.duration(seconds)} left"
    console.say(
      f"\n=== {recipe.name}, seed {seed}: run {done + 1} of {len(todo)}{left}"
    )
    command = [sys.executable, "-m", "imsvd_jax.main"]
    command += [f"--config={recipe.argument}", f"--config.seed={seed}"]
    command += [f"--workdir={folder}"]
    # Runs that differ in their seed compile the same programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled")}
    environment = cache | os.environ
    # What a run prints as its result is progress here: to standard error.
    code = subprocess.run(
      command, env=environment, stdout=2, check=False
    ).returncode
    if code == 2 or code < 0 or code >= 75:
      raise UserError(
        f"{recipe.name} with seed {seed} ended with exit code {code}, as it"
        " says above; the same command continues."
      )
    if code:
      failed.append(job)
  return failed


def read_run(folder: pathlib.Path) -> Run:
  """Returns what a finished run left.

  Raises:
    UserError: It has not ended, or evaluated nothing.
  """
  found = _closing_table(folder)
  if not found:
    raise UserError(
      f"{folder / results.FILE_NAME} has no {' or '.join(protocols.FINAL)};"
      " expected a run that has ended and has labelled held-out images."
    )
  lines = [x for x in metrics.read_metrics(str(folder)) if "loss" in x]
  return Run(found, lines[-1])


def _closing_table(folder: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what a run measured at its end; [] if it has not ended."""
  entries = results.read_results(folder / results.FILE_NAME)
  return [e for e in entries if e["protocol"] in protocols.FINAL]


def _time_steps(
  recipes: Sequence[Recipe], steps: int
) -> dict[str, list[float]]:
  """Returns seconds per train step of every recipe in each of three rounds.

  All take turns, so that other load on the machine affects all alike. Batches
  are random pixels.
  """
  mesh = devices.make_mesh()
  jobs = {}
  for recipe in recipes:
    console.say(f"Timing {recipe.name}: compiling ...")
    num_examples = DataSet(recipe.config.data).train.num_examples
    experiment = experiment_lib.build(recipe.config, num_examples)
    replicated = devices.replicated(mesh)
    step = step_lib.jit_train_step(experiment, replicated)
    state = step_lib.initial_state(experiment, replicated)
    batch = experiment_lib.random_batch(recipe.config)
    batch = devices.shard_batch(batch, mesh)
    state, _ = jax.block_until_ready(step(state, batch))
    jobs[recipe.name] = step, state, batch
  seconds: dict[str, list[float]] = {name: [] for name in jobs}
  for _ in range(3):
    for name, (step, state, batch) in jobs.items():
      start = time.monotonic()
      for _ in range(steps):
        state, _ = step(state, batch)
      jax.block_until_ready(state)
      jobs[name] = step, state, batch
      seconds[name].append((time.monotonic() - start) / steps)
  return seconds


def _term_names(config: ConfigDict) -> list[str]:
  """Names of the objective's terms, as the train step reports them."""
  experiment = experiment_lib.build(config, config.batch_size)
  state = jax.eval_shape(lambda: step_lib.init_state(experiment))
  _, values = jax.eval_shape(
    lambda state, batch: step_lib.train_step(experiment, state, batch),
    state,
    experiment_lib.abstract_batch(config),
  )
  return list(values["terms"])


def report(
  recipes: Sequence[Recipe],
  runs: Mapping[str, Sequence[Run]],
  timings: Mapping[str, Sequence[float]],
) -> str:
  """Returns Markdown: per data set the accuracies, then the diagnostics."""
  parts = []
  for data_name in dict.fromkeys(recipe.config.data.name for recipe in recipes):
    group = [
      recipe
      for recipe in recipes
      if recipe.config.data.name == data_name and runs[recipe.name]
    ]
    if not group:
      continue
    parts += [f"### {data_name}", "", _accuracy_table(group, runs, timings)]
    num_images = runs[group[0].name][0].results[0]["num_images"]
    parts += ["", _NOTE.format(num_images=num_images)]
    parts += ["", _diagnostics_table(group, runs), ""]
  return "\n".join(parts)


def _accuracy_table(
  group: Sequence[Recipe],
  runs: Mapping[str, Sequence[Run]],
  timings: Mapping[str, Sequence[float]],
) -> str:
  more: dict[str, dict[str, str]] = {}
  if timings:
    found = {recipe.name: timings[recipe.name] for recipe in group}
    medians = {name: statistics.median(t) for name, t in found.items()}
    more["s per step (least to greatest)"] = {
      name: f"{medians[name]:.3f} ({min(t):.3f} to {max(t):.3f})"
      for name, t in found.items()
    }
    first = medians[group[0].name]
    more["relative"] = {n: f"{m / first:.2f}" for n, m in medians.items()}
  rows = [
    tables.Run(recipe.config.to_dict(), run.results, recipe.name)
    for recipe in group
    for run in runs[recipe.name]
  ]
  return tables.markdown_table(rows, more=more)


def _diagnostics_table(
  group: Sequence[Recipe], runs: Mapping[str, Sequence[Run]]
) -> str:
  header = ["at the end", "terms", "loss", *DIAGNOSTICS, "above floor"]
  rows = []
  for recipe in group:
    lines = [run.last for run in runs[recipe.name]]
    mean = {
      key: statistics.fmean(line[key] for line in lines) for key in lines[0]
    }
    terms = ", ".join(
      f"{name} {mean[name]:.3f}" for name in _term_names(recipe.config)
    )
    shown = [
      form.format(mean[key]) if key in mean else ""
      for key, form in DIAGNOSTICS.items()
    ]
    above = ""
    if "off_diagonal_floor" in mean:
      above = f"{mean['off_diagonal'] - mean['off_diagonal_floor']:+.2f}"
    rows.append([recipe.name, terms, f"{mean['loss']:.3f}", *shown, above])
  return tables.as_markdown(header, rows)
