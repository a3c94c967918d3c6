"""Features on disk, under a key of everything they depend on.

The key holds the checksum of the weights, the data and its preprocessing, so
another checkpoint or another crop is another file. A damaged file is replaced.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from imsvd_jax.base import agreement, console, files
from imsvd_jax.evaluation.features import Features


def cached_features(
  directory: Path, key: Mapping[str, Any], compute: Callable[[], Features]
) -> Features:
  """Returns features from disk, or computes and stores them.

  Every process must call this; all compute unless all find the file.

  Args:
    directory: Where the files are; created if absent.
    key: What the features are a function of, as JSON.
    compute: Gives the features of all images, as `features.extract` does.
  """
  text = json.dumps(key, sort_keys=True)
  name = hashlib.sha256(text.encode()).hexdigest()[:32]
  path = Path(directory) / f"features_{name}.npz"
  found = _read(path, text)
  # Of one process too: gathering and waiting return at once.
  everyone = multihost_utils.process_allgather(np.bool_(found is not None))
  if found is not None and np.all(everyone):
    return found
  features = compute()
  with agreement.together():  # No process looks before the file is there.
    if jax.process_index() == 0:
      _write(path, text, features)
  return features


def _read(path: Path, text: str) -> Features | None:
  if not path.is_file():
    return None
  try:
    # Opened here, because NumPy does not close a file that it cannot read.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      if str(stored["key"]) != text:
        raise ValueError("another key")
      return Features(stored["features"], stored.get("labels"))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    console.print_line(
      f"Cached features in {path} are damaged ({error}); computing them again."
    )
    return None


def _write(path: Path, text: str, features: Features) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {"key": text, "features": features.features}
  if features.labels is not None:
    arrays["labels"] = features.labels
  with (
    files.in_place_when_done(path) as unfinished,
    open(unfinished, "wb") as file,  # Given a name, NumPy would append ".npz".
  ):
    np.savez(file, **arrays)
