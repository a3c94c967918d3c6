"""TensorFlow's import, without what it prints past Python and its settings."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import IO

from imsvd_jax.base import tensorflow_notes


def import_tensorflow() -> None:
  """Imports TensorFlow, and passes on what it prints that is news.

  Raises:
    ImportError: It cannot be imported.
  """
  if "tensorflow" in sys.modules:
    return
  with tempfile.TemporaryFile() as held:
    with _standard_error_in(held):
      import tensorflow  # noqa: F401
    held.seek(0)
    text = held.read().decode(errors="replace")
  news = [
    line
    for line in text.splitlines()
    if not re.search(tensorflow_notes.KNOWN, line)
  ]
  if news:
    print(*news, sep="\n", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _standard_error_in(file: IO[bytes]) -> Iterator[None]:
  """Redirects file descriptor 2, unless it is closed."""
  try:
    direct = os.dup(2)
  except OSError:
    yield
    return
  os.dup2(file.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(direct, 2)
    os.close(direct)
