"""TensorFlow's import, without what it prints past Python and its settings."""

import os
import re
import sys
import tempfile

from imsvd_jax.base import tensorflow_notes


def import_tensorflow() -> None:
  """Imports TensorFlow, and passes on what it prints that is news.

  Raises:
    ImportError: It cannot be imported.
  """
  if "tensorflow" in sys.modules:
    return
  sys.stderr.flush()
  direct = os.dup(2)
  with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    try:
      import tensorflow  # noqa: F401
    finally:
      os.dup2(direct, 2)
      os.close(direct)
      held.seek(0)
      text = held.read().decode(errors="replace")
      news = [
        line
        for line in text.splitlines()
        if not re.search(tensorflow_notes.KNOWN, line)
      ]
      if news:
        print(*news, sep="\n", file=sys.stderr, flush=True)
