"""Hides what decoders of images print about damaged files, and TensorFlow.

libjpeg, libpng and TensorFlow print it on standard error, past all logging.
Each file that cannot be read is one line of ours. That TensorFlow finds no GPU
is no news: images are read on the CPU, and JAX says what it computes on.
"""

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from absl import logging as absl_logging

from imsvd_jax.base import tensorflow_notes

_DECODERS_SAY = (
  r"^(Corrupt JPEG data|Premature end of JPEG|Not a JPEG file|JPEG datastream"
  r"|Unsupported (JPEG|marker|color)|Invalid (JPEG|SOS|progressive|component)"
  r"|Inconsistent progression|Bogus |Quantization table 0x|Huffman table 0x"
  r"|Arithmetic table 0x|Unknown Adobe|Warning: unknown JFIF|Sampling factors"
  r"|Improper call to JPEG|Empty (input file|JPEG)|Maximum supported image"
  r"|Application transferred too|Cannot (quantize|transcode)|Didn't expect more"
  r"|Input file read error|Premature end of input|Too many color components"
  r"|Missing Huffman code|Huffman code size table|Fractional sampling not"
  r"|CCIR601 sampling|Not implemented yet|Requested feature|DCT (coeff|scaled)"
  r"|Component index |Suspension not allowed|Unknown JFIF"
  r"|libpng |TIFF|Insufficient memory \(case)|jpeg_mem\.cc:"
)
_HIDDEN = f"{_DECODERS_SAY}|{tensorflow_notes.KNOWN}"


def hide() -> Callable[[], None]:
  """Passes what C libraries print on standard error through a filter.

  The filter is a process: it still has all lines when this one crashes. A
  signal to all processes of a job does not end it, only the end of the lines
  does. What Python prints and logs goes past it, at once.

  Returns:
    What undoes it.
  """
  held = {signal.SIGHUP, signal.SIGINT, signal.SIGTERM}
  before = signal.pthread_sigmask(signal.SIG_BLOCK, held)  # Inherited.
  try:
    if sys.stderr.fileno() != 2:
      return _nothing  # Somebody captures it.
    grep = subprocess.Popen(
      ["grep", "-a", "-v", "-E", "--line-buffered", _HIDDEN],
      stdin=subprocess.PIPE,
      stdout=2,
      env=os.environ | {"LC_ALL": "C"},
      start_new_session=True,
    )
  except (OSError, AttributeError):
    return _nothing  # Without grep, or without standard error.
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
  assert grep.stdin is not None
  sys.stderr.flush()
  original = sys.stderr
  direct = os.fdopen(
    os.dup(2), "w", 1, sys.stderr.encoding, errors="backslashreplace"
  )
  os.dup2(grep.stdin.fileno(), 2)
  grep.stdin.close()
  grep.returncode = 0  # It ends after us; nobody waits for it.
  _print_to(direct)

  def show() -> None:
    os.dup2(direct.fileno(), 2)  # The filter ends with its last line.
    if sys.stderr is direct:
      _print_to(original)

  return show


@contextlib.contextmanager
def hidden() -> Iterator[None]:
  """Hides the lines in a program that is not ours."""
  show = hide()
  try:
    yield
  finally:
    show()


def _nothing() -> None:
  pass


def _print_to(stream: TextIO) -> None:
  """Makes a stream, on a file that is not hidden, standard error."""
  sys.stderr = stream
  absl_logging.get_absl_handler().python_handler.setStream(stream)
  if faulthandler.is_enabled():  # By absl, on file descriptor 2.
    faulthandler.enable()
