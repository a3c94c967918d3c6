"""The site builds without a warning, and its tutorials run as written."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
# Tutorials train as written, but for one step of a tiny network.
TINY = {
  "digits": "--config.data.name=digits --config.data.num_examples=0",
  "folder_r18": "--config.data.name=folder --config.data.num_examples=0",
}

pytestmark = pytest.mark.proof


def environment() -> dict[str, str]:
  """With this Python's programs first, and imsvd among them."""
  programs = pathlib.Path(sys.executable).parent
  path = f"{programs}{os.pathsep}{os.environ['PATH']}"
  return {**os.environ, "PATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def blocks(page: pathlib.Path) -> list[tuple[str, str]]:
  """(language, text) of each block that runs on a CPU: bash and python.

  A block in the language `sh` needs a GPU, a pod, or a download.
  """
  found = re.findall(
    r"^```(bash|python)\n(.*?)^```$",
    page.read_text(),
    re.DOTALL | re.MULTILINE,
  )
  return [
    (language, shortened(text) if language == "bash" else text)
    for language, text in found
  ]


def shortened(text: str) -> str:
  def replace(match: re.Match[str]) -> str:
    return f"--config={match[1]}:debug {TINY[match[1]]}"

  return re.sub(r"--config=(\w+)(?= |$)", replace, text, flags=re.MULTILINE)


@pytest.mark.skipif(
  importlib.util.find_spec("sphinx") is None, reason="needs the extra docs"
)
def test_the_site_builds_without_a_warning(tmp_path):
  build = subprocess.run(
    [
      *(sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html"),
      *("-d", str(tmp_path / "cache"), ROOT / "docs", tmp_path / "site"),
    ],
    capture_output=True,
    text=True,
    env=environment(),
    check=False,
  )
  assert build.returncode == 0, build.stderr
  page = (tmp_path / "site/commands.html").read_text()
  assert "--coordinator_address" in page  # The commands' own help.
  page = (tmp_path / "site/reference.html").read_text()
  assert "imsvd_loss" in page


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_as_written(page, tmp_path):
  if page.stem == "pytorch":
    pytest.importorskip("torch")
  program = ""  # The Python blocks of a page continue each other.
  for language, text in blocks(page):
    if language == "python" and "import torch" in text:
      program = ""
    program += text if language == "python" else ""
    command = (
      ["bash", "-euo", "pipefail", "-c", text]
      if language == "bash"
      else [sys.executable, "-c", program]
    )
    done = subprocess.run(
      command,
      cwd=tmp_path,
      env=environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"


def test_every_block_that_needs_no_more_than_a_cpu_is_run():
  run = {page.stem for page in TUTORIALS if blocks(page)}
  assert run == {"digits", "photos", "pytorch", "objective"}
