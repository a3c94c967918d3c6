"""Two processes that run one program together."""

import pathlib
import socket
import subprocess
from collections.abc import Callable, Mapping

ROOT = pathlib.Path(__file__).parents[2]


def run_pair(
  command: Callable[[int, int], list[str]], environment: Mapping[str, str]
) -> list[str]:
  """Runs `command(port, index)` twice at once; returns what they print."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  processes = [
    subprocess.Popen(
      command(port, index),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=environment,
    )
    for index in range(2)
  ]
  try:
    said = [process.communicate(timeout=600) for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], said
  return [output for output, _ in said]
