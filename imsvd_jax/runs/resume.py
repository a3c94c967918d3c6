"""The config of a run on disk, and whether another one may continue the run."""

import contextlib
import functools
import json
import logging
import os
from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from imsvd_jax.base.config import HARMLESS_KEYS, as_json, flatten
from imsvd_jax.base.errors import UserError
from imsvd_jax.runs import run_directory, verification

logger = logging.getLogger(__name__)


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
    with contextlib.suppress(verification.Damage):
      return verification.twice(read, directory)
  if step is None and run_directory.steps_on_disk(root) != steps:
    return _newest_meta(workdir)  # A run in progress has just deleted them.
  return None


def check_run(
  workdir: str | os.PathLike, config: ConfigDict, facts: Mapping[str, Any]
) -> None:
  """Checks that a config may continue the run in a directory.

  Args:
    workdir: The run's directory, with at least one checkpoint.
    config: The config that would continue it.
    facts: As for the `Checkpointer`.

  Raises:
    UserError: A value differs that must not change.
  """
  stored = load_facts(workdir)
  check_config(
    load_config(workdir) | stored,
    # Checkpoints of earlier versions have no facts.
    config.to_dict() | (facts if stored else {}),
    harmless=HARMLESS_KEYS,
    allow=config.allow_changes,
  )


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
      f" {'; '.join(refused.values())}. Restore these keys, use a new"
      f' --workdir, or allow them: --config.allow_changes="{tuple(refused)}".'
    )
  return list(changes)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
  """Returns "key: old -> new" for each key that differs, sorted by key."""
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
