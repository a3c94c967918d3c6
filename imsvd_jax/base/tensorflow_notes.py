"""Hides what TensorFlow prints when it starts, among which ours are lost."""

import os


def hide(level: int) -> None:
  """Call it before TensorFlow is imported; the user's own settings win.

  Args:
    level: 2 hides notes and warnings; 3 also errors, which are raised too, or
      only say that there is no GPU.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", str(level))
  # Nothing here uses oneDNN, and it announces itself at every level.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
