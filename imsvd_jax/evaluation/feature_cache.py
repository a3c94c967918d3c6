"""Features on disk, under a key of everything they depend on.

The key holds the checksum of the weights, the data and its preprocessing, so
another checkpoint or another crop is another file. A damaged file is replaced.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imsvd_jax.base import console
from imsvd_jax.evaluation.features import Features


def cached_features(
  directory: Path,
  key: Mapping[str, Any],
  compute: Callable[[], Features],
  *,
  report: Callable[[str], None] = console.print_line,
) -> Features:
  """Returns features from disk, or computes and stores them.

  Every process must call this; all compute unless all find the file.

  Args:
    directory: Where the files are; created if absent.
    key: What the features are a function of, as JSON: "weights" (`checksum`),
      "data", "split", "preprocessing".
    compute: Gives the features of all images, as `features.extract` does.
    report: Takes a line when a damaged file is replaced.
  """
  text = json.dumps(key, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  path = Path(directory) / f"features_{name}.npz"
  found = _read(path, text, report)
  if _everyone(found is not None) and found is not None:
    return found
  features = compute()
  if jax.process_index() == 0:
    _write(path, text, features)
  if jax.process_count() > 1:  # No process looks before the file is there.
    multihost_utils.sync_global_devices(path.name)
  return features


def _everyone(found: bool) -> bool:
  if jax.process_count() == 1:
    return found
  return bool(np.all(multihost_utils.process_allgather(np.bool_(found))))


def _read(
  path: Path, text: str, report: Callable[[str], None]
) -> Features | None:
  if not path.exists():
    return None
  try:
    # Opened here, because NumPy does not close a file that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      if str(stored["key"]) != text:
        raise ValueError("another key")
      labels = stored.get("labels")
      return Features(stored["features"], labels, stored["indices"])
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    report(
      f"Cached features in {path} are damaged ({error}); computing them again."
    )
    return None


def _write(path: Path, text: str, features: Features) -> None:
  """Writes the file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
  arrays: dict[str, Any] = {
    "key": np.array(text),
    "features": features.features,
    "indices": features.indices,
  }
  if features.labels is not None:
    arrays["labels"] = features.labels
  with temporary.open("wb") as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
