"""Hides what TensorFlow prints when it starts, among which ours are lost."""

import os

# A regular expression, also of grep: lines that are no news at any level.
KNOWN = (
  r"^WARNING: All log messages before absl::InitializeLog"
  r"|^[IWE]0000 .* (port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc:"
  r"|^To enable the following instructions: "
)


def hide(level: int) -> None:
  """Call it before TensorFlow is imported; the user's own settings win.

  Args:
    level: 2 hides notes and warnings; 3 also errors, which are raised too, or
      only say that there is no GPU.
  """
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", str(level))
  # Nothing here uses oneDNN, and it announces itself at every level.
  os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
