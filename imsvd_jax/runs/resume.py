"""The config of a run on disk, and whether another one may continue the run."""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax.base import agreement, console, files
from imsvd_jax.base.config import ADDED_KEYS, HARMLESS_KEYS, as_json, flatten
from imsvd_jax.base.errors import Damage, UserError
from imsvd_jax.runs import environment, run_directory, verification
from imsvd_jax.runs.checkpointer import Checkpointer
from imsvd_jax.runs.metric_lines import Mark
from imsvd_jax.training import experiment as experiment_lib
from imsvd_jax.training.experiment import Experiment, Progress
from imsvd_jax.training.verdict import LABEL_FREE

logger = logging.getLogger(__name__)

# Keys on which the length of a run or its learning rate depends.
_PLAN = ("batch_size", "epochs", "optimizer")


def is_new(workdir: str) -> bool:
  """Returns whether there is no checkpoint to continue from."""
  root = files.absolute(workdir) / run_directory.CHECKPOINTS
  return not run_directory.steps_on_disk(root)


def open_checkpoints(
  config: ConfigDict, num_examples: int, workdir: str
) -> Checkpointer:
  """Opens a run's checkpoints, to start it or to continue it.

  Args:
    config: The recipe.
    num_examples: Images in the train split.
    workdir: The run's directory.

  Raises:
    UserError: The run there is one of another config, or may not be written.
  """
  facts = {
    # Data order depends on the number of images, which a folder's config does
    # not record.
    "images_found": num_examples,
    "environment": environment.settings(),
    "versions": environment.versions(),
  }
  checkpointer = Checkpointer(
    workdir,
    keep_last=config.checkpoint.keep_last,
    keep_every=config.checkpoint.keep_every,
    keep_best=config.checkpoint.get("keep_best", 0),
    keep_best_by=config.checkpoint.get("keep_best_by", LABEL_FREE),
    config=config.to_dict(),
    facts=facts,
    deadline_minutes=config.checkpoint.deadline_minutes,
  )
  if checkpointer.latest_step() is not None:
    with agreement.together(workdir):
      check_run(workdir, config, facts)
    if config.init_from:
      console.say("init_from is ignored: this run has checkpoints of its own.")
  return checkpointer


def load_config(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the config of the newest checkpoint, or else of config.json.

  Raises:
    UserError: There is neither.
  """
  meta = _newest_meta(workdir)
  if meta is not None:
    return meta["config"]
  directory, _ = run_directory.locate(workdir)
  try:
    return json.loads((directory / run_directory.CONFIG_FILE).read_text())
  except (OSError, ValueError) as error:
    raise UserError(
      f"{directory} holds no run's configuration ({error}). Expected the"
      " workdir of a training run."
    ) from error


def load_progress(
  workdir: str | os.PathLike, step: int, experiment: Experiment
) -> tuple[Progress, list[str]]:
  """Returns how far a run has come, and the keys of its plan that changed.

  Args:
    workdir: The run's directory.
    step: The checkpoint from which the run continues.
    experiment: What continues it.

  Raises:
    UserError: The new plan ends before the checkpoint.
  """
  config, meta = experiment.config, _meta(workdir, step)
  changes = _changes(
    flatten(meta["config"]), flatten(as_json(config.to_dict()))
  )
  changed = [key for key in changes if _covered(key, _PLAN)]
  found = meta["record"].get("progress", {"images": step * config.batch_size})
  progress = Progress(**found)
  planned = config.epochs * experiment.steps_per_epoch * config.batch_size
  # The earlier plan was rounded to its own batches.
  rounding = max(config.batch_size, meta["config"]["batch_size"]) / 2
  if changed and progress.images > planned + rounding:
    raise UserError(
      f"{workdir} is at image {progress.images} of {round(planned)} planned"
      f" (step {step}, epochs={config.epochs:g}): the plan ends before the"
      " checkpoint. Give more epochs, or use a new --workdir."
    )
  if "epochs" in changed or "optimizer.schedule" in changed:
    progress = progress._replace(
      changed_at=progress.images, changed_from=progress.learning_rate
    )
  return progress, changed


def was_ended(
  workdir: str | os.PathLike, step: int, config: ConfigDict
) -> bool:
  """Returns whether the verdict at a checkpoint ends the run; see `ends`."""
  state = _meta(workdir, step)["record"].get("state", "")
  return experiment_lib.ends(config, state)


def load_marks(workdir: str | os.PathLike, step: int) -> list[Mark]:
  """Returns what the newest checkpoints up to a step record of the metrics."""
  directory, _ = run_directory.locate(workdir)
  steps = run_directory.steps_on_disk(directory / run_directory.CHECKPOINTS)
  marks: list[Mark] = []
  for candidate in [s for s in steps if s <= step][-4:]:
    with contextlib.suppress(Damage):
      mark = _meta(workdir, candidate)["record"].get("metrics")
      marks = [*marks, Mark(**mark)] if mark else []
  return marks


def _meta(workdir: str | os.PathLike, step: int) -> dict[str, Any]:
  directory, _ = run_directory.locate(workdir)
  path = directory / run_directory.CHECKPOINTS / str(step)
  read = functools.partial(verification.read_meta, path)
  return {"record": {}} | verification.twice(read, path)


def load_facts(workdir: str | os.PathLike) -> dict[str, Any]:
  """Returns the `facts` of the newest checkpoint; {} if it has none."""
  meta = _newest_meta(workdir)
  return meta.get("facts", {}) if meta is not None else {}


def _newest_meta(workdir: str | os.PathLike) -> dict[str, Any] | None:
  """Returns the newest readable `meta`; None if there is none."""
  directory, step = run_directory.locate(workdir)
  root = directory / run_directory.CHECKPOINTS
  steps = run_directory.steps_on_disk(root)
  for candidate in [step] if step is not None else steps[::-1]:
    directory = root / str(candidate)
    read = functools.partial(verification.read_meta, directory)
    with contextlib.suppress(Damage):
      return verification.twice(read, directory)
  if step is None and run_directory.steps_on_disk(root) != steps:
    return _newest_meta(workdir)  # A run in progress has just deleted them.
  return None


def check_run(
  workdir: str | os.PathLike, config: ConfigDict, facts: Mapping[str, Any]
) -> list[str]:
  """Checks that a config may continue the run in a directory.

  Args:
    workdir: The run's directory, with at least one checkpoint.
    config: The config that would continue it.
    facts: As for the `Checkpointer`.

  Returns:
    The keys that differ, sorted.

  Raises:
    UserError: A value differs that must not change.
  """
  stored = load_facts(workdir)
  return check_config(
    load_config(workdir) | _known(stored, facts),
    # Checkpoints of earlier versions have no facts.
    config.to_dict() | (_known(facts, stored) if stored else {}),
    harmless=HARMLESS_KEYS,
    allow=(*config.allow_changes, "versions"),
  )


def _known(
  facts: Mapping[str, Any], others: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns facts without the settings that another version does not know."""
  return {
    key: {name: value[name] for name in value.keys() & others.get(key, {})}
    if isinstance(value, Mapping)
    else value
    for key, value in facts.items()
  }


def check_config(
  stored: Mapping[str, Any],
  current: Mapping[str, Any],
  *,
  harmless: Collection[str] = (),
  allow: Collection[str] = (),
) -> list[str]:
  """Compares the config of a run with the one that would continue it.

  Keys are dotted, such as "data.seed". A prefix covers whole parts of a key:
  "data" covers "data.seed", "da" does not; "*" covers every key. Every
  difference is logged.

  Args:
    stored: The config of the checkpoint.
    current: The config of the run that would continue.
    harmless: Prefixes of keys that change neither the state's shape nor the
      order of the data.
    allow: Prefixes of further keys that the user allows to differ.

  Returns:
    The keys that differ, sorted.

  Raises:
    UserError: Some differing key is neither harmless nor allowed.
  """
  changes = _changes(flatten(as_json(stored)), flatten(as_json(current)))
  refused = {}
  for key, change in changes.items():
    if _covered(key, harmless):
      logger.info("Resuming with a changed %s (harmless)", change)
    elif _covered(key, allow):
      logger.warning("Resuming with a changed %s (allowed)", change)
    else:
      refused[key] = change
  if refused:
    raise UserError(
      "This run was started with another configuration:"
      f" {'; '.join(refused.values())}. Restore these values, use a new"
      f' --workdir, or allow them: --config.allow_changes="{tuple(refused)}".'
    )
  return list(changes)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """Returns "key: old -> new" for each key that differs, sorted by key."""
  added = {key: ADDED_KEYS[key] for key in ADDED_KEYS.keys() & new.keys()}
  old = {**added, **old}
  return {
    key: f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
    for key in sorted(old.keys() | new.keys())
    if key not in old or key not in new or old[key] != new[key]
  }


def _shown(flat: Mapping[str, Any], key: str) -> str:
  return json.dumps(flat[key]) if key in flat else "(absent)"


def _covered(key: str, prefixes: Collection[str]) -> bool:
  return any(
    prefix == "*" or key == prefix or key.startswith(prefix + ".")
    for prefix in prefixes
  )
