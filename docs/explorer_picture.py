"""Takes the README's picture: one variable of the explorer of a trained run.

  imsvd train --config=fashion_mnist_r8 --workdir=runs/fashion
  python docs/explorer_picture.py --workdir=runs/fashion

Explains the run, opens the page of the variable that knows most about the
classes in headless Chromium, and writes docs/images/explorer.png.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys

import numpy as np

from imsvd_jax.explain import Analysis

PICTURE = pathlib.Path(__file__).parent / "images" / "explorer.png"
SIZE = (1180, 1190)  # Pixels.


def main() -> None:
  """Explains the run and takes the picture."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--variable", type=int, help="instead of the best one")
  flags = parser.parse_args()
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if chromium is None:
    sys.exit("Found neither chromium nor google-chrome; install one of them.")
  output = flags.workdir / "explain-picture"
  shutil.rmtree(output, ignore_errors=True)
  command = [sys.executable, "-m", "imsvd_jax", "explain"]
  command += [f"--workdir={flags.workdir}", f"--output={output}"]
  subprocess.run(command, check=True)
  variable = flags.variable
  if variable is None:
    nmi = Analysis.load(output / "analysis.npz").scores.nmi
    variable = int(np.argmax(nmi[:, 0]))  # Of the label, which is first.
  page = (output / "explorer" / "index.html").resolve().as_uri()
  subprocess.run(
    [
      chromium,
      "--headless",
      "--no-sandbox",
      "--hide-scrollbars",
      f"--window-size={SIZE[0]},{SIZE[1]}",
      "--virtual-time-budget=10000",  # Milliseconds; the page loads images.
      f"--screenshot={PICTURE}",
      f"{page}#/variable/{variable}",
    ],
    check=True,
  )


if __name__ == "__main__":
  main()
